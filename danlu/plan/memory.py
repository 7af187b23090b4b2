"""Where every byte goes on the fullest process of each end of a pipeline: a sum of named parts."""

from __future__ import annotations

import numpy as np

from danlu.plan.coefficient import Coefficient
from danlu.plan.counts import stage_layers, weights
from danlu.plan.jobs import Column, Jobs

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


def layer_activations(jobs: Jobs, c: dict[str, float]) -> Column:
    """Bytes that one layer keeps of one micro-batch for its backward pass."""
    cut = np.where(jobs.sequence > 0, jobs.tensor, 1)
    stream = c["stream"] * jobs.width / cut
    heads = c["heads"] * (2 * jobs.heads + 2 * jobs.kv_heads) * jobs.head_width / jobs.tensor
    mixture = jobs.expert_layers / jobs.layers
    inner = (1 - mixture) * jobs.feedforward
    inner = inner + mixture * (jobs.chosen * jobs.expert_width + jobs.shared_width)
    inner = c["inner"] * (1 + jobs.gated) * inner / jobs.tensor
    everything = jobs.tokens * (stream + heads + inner) * jobs.weight_bytes
    # Scores, their softmax and what dropout let through, where attention writes them down.
    scores = np.where(jobs.flash > 0, 0, 5 * jobs.heads / jobs.tensor * jobs.tokens * jobs.length)
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
    """Stages that can be the fullest: of an even cut the first and the last, of another one all."""
    last = jobs.pipeline - 1
    if not jobs.balanced.any():
        return [np.zeros(1), last]
    return [np.minimum(stage, last) for stage in range(int(jobs.pipeline.max()))]


def stage_memory(jobs: Jobs, c: dict[str, float], stage: Column) -> dict[str, Column]:
    """Bytes by part on a process of one stage, 0 being the first; `total` is the peak."""
    counted = weights(jobs)
    layers = stage_layers(jobs, stage)
    is_last = stage == jobs.pipeline - 1
    flying = np.minimum(jobs.pipeline - stage, jobs.micro_batches)
    head = counted.head + jobs.tied * (jobs.pipeline > 1) * jobs.width * jobs.vocab
    ends = np.where(stage == 0, counted.embedding, 0) + np.where(is_last, head, 0)
    share = counted.expert_layers / counted.layers
    dense = layers * (counted.attention + counted.norms + (1 - share) * counted.feedforward + share * counted.router)
    dense = (dense + ends) / jobs.tensor
    sparse = layers * share * counted.experts / (jobs.tensor * jobs.expert)
    sharers = np.maximum(jobs.sharers, 1)
    expert_sharers = np.maximum(jobs.expert_sharers, 1)

    def held(bytes_each: Column, level: int) -> Column:
        cut = jobs.zero >= level
        return bytes_each * (dense / np.where(cut, sharers, 1) + sparse / np.where(cut, expert_sharers, 1))

    interleaved = np.where(jobs.chunks > 1, 1 + (jobs.pipeline - 1) / (jobs.pipeline * jobs.chunks), 1)
    working = np.where(jobs.recompute > 1, layer_activations(jobs.but(recompute=0), c), 0)
    activations = flying * interleaved * layers * layer_activations(jobs, c) + working
    logits = np.where(is_last, jobs.tokens * jobs.outputs / jobs.tensor * c["logits"], 0)
    logits = logits + np.where(jobs.pipeline == 1, jobs.tokens * jobs.width * c["whole"], 0)
    gathered = c["gathered"] * (dense + sparse) / np.maximum(layers, 1) * jobs.weight_bytes
    parts = {
        "weights": held(jobs.weight_bytes, 3),
        "gradients": held(jobs.gradient_bytes, 2) * c["gradient"],
        "optimizer": held(jobs.state_bytes, 1),
        "activations": activations,
        "logits": logits,
        "gathered": np.where(jobs.zero == 3, gathered, 0),
        "step": np.maximum(held(np.full(1, c["step"]), 1) - activations - logits, 0),
        "fixed": np.full(1, c["fixed"] * GIB),
    }
    parts["total"] = sum(parts.values(), np.zeros(1))
    return {name: np.broadcast_to(part, parts["total"].shape) for name, part in parts.items()}
