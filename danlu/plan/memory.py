"""Where every byte goes on the fullest process of each end of a pipeline: a sum of named parts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from danlu.plan.adapters import adapted_matrices, base_bytes, learning
from danlu.plan.coefficient import Coefficient
from danlu.plan.counts import Weights, stage_layers, weights
from danlu.plan.jobs import Column, Jobs
from danlu.plan.layers import attention_share, blocks_ahead, halves, plain_share, second, state_features, value_width
from danlu.plan.offload import UNDER_WAY, away, on_device

MEMORY: dict[str, Coefficient] = {
    "stream": Coefficient(8, 2, 20, 0.4, "numbers a feature", "kept of the residual stream by a layer and token"),
    "heads": Coefficient(2, 1, 6, 0.4, "numbers a feature", "kept of queries, keys and values, and attention's output"),
    "inner": Coefficient(1.5, 0.5, 4, 0.4, "numbers a feature", "kept of each inner matrix of the feed-forward"),
    "selective": Coefficient(0.5, 0.2, 1.0, 0.4, "share", "of a layer kept where cheap parts are computed again"),
    "compiled": Coefficient(0.88, 0.5, 1.0, 0.2, "share", "of that, where a compiler fuses elementwise work"),
    "logits": Coefficient(10, 2, 20, 0.5, "bytes a logit", "held while the loss is computed"),
    "whole": Coefficient(8, 0.5, 200, 1.0, "bytes a feature", "held besides by a model that is not cut into stages"),
    "gradient": Coefficient(1.0, 0.3, 2, 0.4, "share", "gradients held at the peak, against all of them"),
    "gathered": Coefficient(2.0, 0.1, 6, 0.5, "layers", "gathered at once where weights are shared out"),
    "step": Coefficient(4.0, 0.1, 12, 0.5, "bytes a weight", "made by the optimizer while it steps"),
    "fixed": Coefficient(1.0, 0.05, 12, 0.7, "GiB", "libraries, buffers of communication and what lies between"),
}

GIB = 2.0**30


def mixed_features(jobs: Jobs) -> Column:
    """Features of a token that attention keeps (queries, keys, values, and its output) or a state space, on average.

    Latent attention keeps keys and values of every head, and what they and the queries were squeezed to. A state space
    keeps what comes in with its gate, what was convolved, and its output before and after the norm.
    """
    values = value_width(jobs)
    plain = (2 * jobs.heads + 2 * jobs.kv_heads) * jobs.head_width * (1 + jobs.cross)
    latent = 2 * jobs.heads * (jobs.head_width + values) + (jobs.query_rank + jobs.key_rank + jobs.turned) * jobs.tensor
    share = attention_share(jobs)
    kept = share * np.where(jobs.key_rank > 0, latent, plain)
    inner, convolved = state_features(jobs)
    return kept + jobs.state_layers / jobs.layers * (3 * inner + 2 * convolved) / 2


def layer_activations(jobs: Jobs, c: dict[str, float]) -> Column:
    """Bytes that one layer keeps of one micro-batch for its backward pass, on average over the layers."""
    cut = np.where(jobs.sequence > 0, jobs.tensor, 1)
    stream = c["stream"] * jobs.width / cut * halves(jobs) / 2
    heads = c["heads"] * mixed_features(jobs) / jobs.tensor
    mixture = jobs.expert_layers / jobs.layers
    inner = plain_share(jobs) * jobs.feedforward
    inner = inner + mixture * (jobs.chosen * jobs.expert_width + jobs.shared_width)
    inner = c["inner"] * (1 + jobs.gated) * inner / jobs.tensor
    thin = jobs.rank * adapted_matrices(jobs)  # what adapters make between their two matrices
    everything = jobs.tokens * (stream + heads + inner + thin) * jobs.weight_bytes
    # Scores, their softmax and what dropout let through, where attention writes them down.
    written = 5 * jobs.heads / jobs.tensor * jobs.tokens * jobs.length * attention_share(jobs)
    scores = np.where(jobs.flash > 0, 0, written)
    kept = np.where((jobs.recompute > 0) & (jobs.flash > 0), c["selective"], 1.0) * everything
    everything = kept * np.where(jobs.compiled > 0, c["compiled"], 1.0) + np.where(jobs.recompute > 0, 0, scores)
    return np.where(jobs.recompute > 1, jobs.tokens * jobs.width / cut * jobs.weight_bytes, everything)


def device_memory(jobs: Jobs, c: dict[str, float]) -> dict[str, Column]:
    """Bytes by part on the fullest process; `total` is the peak.

    Early stages hold the most micro-batches, the last one holds the head and the logits: each is worked out and the
    fullest is told.
    """
    fullest: dict[str, Column] = {}
    for stage in stages_told(jobs):
        parts = stage_memory(jobs, c, stage)
        better = parts["total"] > fullest.get("total", np.zeros(1))
        fullest = {name: np.where(better, part, fullest.get(name, part)) for name, part in parts.items()}
    return fullest


def stages_told(jobs: Jobs) -> list[Column]:
    """Stages that can be the fullest: of an even cut the first and the last, of another one all.

    Where plain layers come before mixtures, it can be the first stage that has none of them, too.
    """
    last = jobs.pipeline - 1
    if not jobs.balanced.any():
        between = [np.minimum(np.ceil(jobs.leading / stage_layers(jobs)), last)] if jobs.leading.any() else []
        return [np.zeros(1), *between, last]
    return [np.minimum(stage, last) for stage in range(int(jobs.pipeline.max()))]


def mixtures_share(jobs: Jobs, layers: Column, stage: Column) -> Column:
    """Of a stage's layers, those with a mixture: all alike, but for plain ones that come first."""
    before = np.clip(jobs.leading - stage * layers, 0, layers) / np.maximum(layers, 1)
    return (1 - before) * jobs.expert_layers / np.maximum(jobs.layers - jobs.leading, 1)


def stage_weights(counted: Weights, layers: Column, share: Column, is_last: NDArray[np.bool_]) -> tuple[Column, Column]:
    """Of a stage's layers, before anything is cut: all but the experts, and the experts.

    Args: share: of its layers that hold a mixture.
    """
    plain = (counted.dense_layers + counted.expert_layers) / counted.layers - share
    mixture = share * (counted.router + counted.shared)
    dense = layers * (counted.mixing + counted.norms + plain * counted.feedforward + mixture)
    sparse = layers * share * counted.experts
    ahead = np.where(is_last, counted.blocks, 0)
    dense, sparse = dense + ahead * counted.ahead, sparse + ahead * counted.experts
    if counted.second is not None:  # such models are not cut into stages
        dense, sparse = dense + counted.second.dense, sparse + counted.second.sparse
    return dense, sparse


def further_activations(jobs: Jobs, c: dict[str, float], is_last: NDArray[np.bool_]) -> Column:
    """Bytes kept of one micro-batch by blocks that predict tokens beyond the next one, and by a second stack."""
    kept = np.where(is_last, blocks_ahead(jobs), 0) * layer_activations(jobs, c)
    if jobs.second_layers.any():
        other = second(jobs)
        handed = jobs.cross * other.tokens * other.width * jobs.weight_bytes  # to every layer of the first
        kept = kept + jobs.second_layers * layer_activations(other, c) + handed
    return kept


def stage_memory(jobs: Jobs, c: dict[str, float], stage: Column) -> dict[str, Column]:
    """Bytes by part on the device of a process of one stage, 0 being the first; `total` is the peak."""
    parts = on_device(jobs, *stage_parts(jobs, c, stage))
    parts["total"] = sum(parts.values(), np.zeros(1))
    return {name: np.broadcast_to(part, parts["total"].shape) for name, part in parts.items()}


def away_memory(jobs: Jobs, c: dict[str, float]) -> dict[int, Column]:
    """Bytes in the host's memory and on its disks, of the process of each end that has the most there."""
    ends = [away(jobs, stage_parts(jobs, c, stage)[0]) for stage in stages_told(jobs)]
    return {place: np.max(np.broadcast_arrays(*(each[place] for each in ends)), axis=0) for place in ends[0]}


def stage_parts(jobs: Jobs, c: dict[str, float], stage: Column) -> tuple[dict[str, Column], dict[str, Column]]:
    """Bytes by part of a process, wherever they rest; and what stays on the device of those that may rest elsewhere."""
    counted = weights(jobs)
    layers = stage_layers(jobs, stage)
    is_last = stage == jobs.pipeline - 1
    flying = np.minimum(jobs.pipeline - stage, jobs.micro_batches)
    head = counted.head + jobs.tied * (jobs.pipeline > 1) * jobs.width * jobs.vocab
    ends = np.where(stage == 0, counted.embedding, 0) + np.where(is_last, head, 0)
    dense, sparse = stage_weights(counted, layers, mixtures_share(jobs, layers, stage), is_last)
    # A learned table of positions is not cut by tensor degree: every process adds it to whole features.
    places = np.where(stage == 0, jobs.width * jobs.positions, 0)
    dense = (dense + ends - places) / jobs.tensor + places
    sparse = sparse / jobs.expert_ranks
    sharers = np.maximum(jobs.sharers, 1)
    expert_sharers = np.maximum(jobs.expert_sharers, 1)

    learns = learning(jobs, layers, dense, sparse)
    linear = layers * (counted.dense / counted.layers - counted.norms) / jobs.tensor
    frozen = _frozen_bytes(jobs, linear, dense - linear, sparse)

    def shared(bytes_dense: Column, bytes_sparse: Column, level: int) -> Column:
        cut = jobs.zero >= level
        return bytes_dense / np.where(cut, sharers, 1) + bytes_sparse / np.where(cut, expert_sharers, 1)

    def held(bytes_each: Column, level: int) -> Column:
        return bytes_each * shared(*learns, level)

    interleaved = np.where(jobs.chunks > 1, 1 + (jobs.pipeline - 1) / (jobs.pipeline * jobs.chunks), 1)
    # A layer that is computed again holds everything while its gradients are made.
    kept, whole = layer_activations(jobs, c), layer_activations(jobs.but(recompute=0), c)
    working = np.where(jobs.recompute > 0, whole - np.where(jobs.recompute > 1, 0, kept), 0)
    activations = flying * interleaved * layers * kept + working
    activations = activations + flying * further_activations(jobs, c, is_last)
    made = is_last & (jobs.fused_loss == 0)
    logits = np.where(made, (1 + jobs.ahead) * jobs.tokens * jobs.outputs / jobs.tensor * c["logits"], 0)
    logits = logits + np.where(jobs.pipeline == 1, jobs.tokens * jobs.width * c["whole"], 0)
    each, resting = np.maximum(layers, 1), base_bytes(jobs)
    apart = [(jobs.weights_at > 0) | (copies > 1) for copies in (sharers, expert_sharers)]  # what one copy lacks
    fetched = np.where(apart[0], dense, 0) + np.where(apart[1], sparse, 0)
    gathered = c["gathered"] * fetched / each * np.where(jobs.rank > 0, resting, jobs.weight_bytes)
    parts = {
        "weights": held(jobs.weight_bytes, 3) + shared(*frozen, 3),
        "gradients": held(jobs.gradient_bytes, 2) * c["gradient"],
        "optimizer": held(jobs.state_bytes, 1),
        "activations": activations,
        "logits": logits,
        "gathered": np.where((jobs.zero == 3) | (jobs.weights_at > 0), gathered, 0),
        "step": np.maximum(held(np.full(1, c["step"]), 1) - activations - logits, 0),
        "fixed": np.full(1, c["fixed"] * GIB),
        "dequantised": np.where(resting < jobs.weight_bytes, (linear + sparse) / each * jobs.weight_bytes, 0),
    }
    stays = {
        "gradients": np.minimum(
            UNDER_WAY * (learns[0] + learns[1]) / each * jobs.gradient_bytes, parts["gradients"] * sharers
        ),
        "activations": working + np.minimum(UNDER_WAY * layer_activations(jobs, c), activations - working),
    }
    return parts, stays


def _frozen_bytes(jobs: Jobs, linear: Column, others: Column, sparse: Column) -> tuple[Column, Column]:
    """Bytes of the weights that adapters learn beside: all but the experts, and the experts. None where all learn.

    Args: linear, sparse: weights of the blocks' linear layers and experts, which may have fewer bits than the others.
    """
    mixed = linear * base_bytes(jobs) + others * jobs.weight_bytes
    return np.where(jobs.rank > 0, mixed, 0), np.where(jobs.rank > 0, sparse * base_bytes(jobs), 0)
