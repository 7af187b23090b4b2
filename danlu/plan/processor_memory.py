"""Danlu's own engine on a processor: the memory of a process as a sum of named parts.

What comes and goes in a step is counted from the engine's own code; what lies loose between, and what libraries hold,
runs on a machine teach.
"""

from __future__ import annotations

import numpy as np

from danlu.plan.coefficient import Coefficient
from danlu.plan.counts import stage_layers
from danlu.plan.jobs import Column, Jobs
from danlu.plan.layers import second
from danlu.plan.memory import GIB
from danlu.plan.processor import KEPT_PROBABILITIES, laid_out
from danlu.plan.time import local_learning, local_weights

CHUNK_LOGITS = 2**26  # held at once, as in danlu.model.loss

PROCESSOR_MEMORY: dict[str, Coefficient] = {
    "activations": Coefficient(1.0, 0.6, 1.8, 0.2, "share", "of what is counted for a layer and token"),
    "loss": Coefficient(1.0, 0.5, 2.0, 0.2, "share", "of what is counted for the head and its gradient"),
    "gathered": Coefficient(1.0, 0.3, 3.0, 0.4, "share", "of what is counted where weights are shared out"),
    "loose": Coefficient(0.15, 0.005, 0.5, 0.7, "share", "lost between blocks of what comes and goes in a step"),
    "fixed": Coefficient(0.4, 0.1, 2.0, 0.7, "GiB", "the interpreter, libraries and their buffers"),
    "group": Coefficient(0.35, 0.1, 2.0, 0.7, "GiB", "the same in each of several, which begin as copies of one"),
    "kernels": Coefficient(0.6, 0.05, 2.0, 0.5, "GiB", "of kernels for each number of tokens of an expert, in bf16"),
}


def processor_memory(jobs: Jobs, c: dict[str, float]) -> dict[str, Column]:
    """Bytes by part on the fullest process; `total` is the peak.

    Activations go as gradients come, and what is freed is used again: the peak is at the loss, at the beginning of the
    backward pass or at its end. Of what rests in files a layer or two are in memory.
    """
    own, shared = local_weights(jobs), np.where(jobs.zero > 0, np.maximum(jobs.sharers, 1), 1)
    kept, learning = own / shared, local_learning(jobs) / shared
    # In bf16 one process alone keeps rounded copies; several round what they gather for each use.
    computed_with = np.where(jobs.weight_bytes == 4, kept * 4, np.where(jobs.world == 1, own * 2, 0))
    computed_with = np.where(jobs.rank > 0, (own + learning) * jobs.weight_bytes, computed_with)
    activations, peak = _comes_and_goes(jobs, learning * 4, c)
    gathered = np.where(laid_out(jobs), _gathered(jobs) * c["gathered"], 0)
    parts = {
        "weights": computed_with * np.where(jobs.weights_at > 0, 2 / jobs.layers, 1),
        "optimizer": np.where(jobs.optimizer_at > 0, 0, learning * jobs.state_bytes),
        "activations": activations,
        "gathered": gathered,
        "loose": (peak + gathered) * c["loose"],
        "fixed": np.where(jobs.world > 1, c["group"], c["fixed"]) * GIB,
        # oneDNN keeps the last thousand; experts get another number of tokens every step, and need new ones.
        "kernels": np.where((jobs.expert_layers > 0) & (jobs.weight_bytes < 4), c["kernels"] * GIB, 0),
    }
    parts["gradients and loss"] = peak - activations
    parts["total"] = sum(parts.values(), np.zeros(1))
    return {name: np.broadcast_to(part, parts["total"].shape) for name, part in parts.items()}


def _comes_and_goes(jobs: Jobs, gradients: Column, c: dict[str, float]) -> tuple[Column, Column]:
    """Bytes of activations, and at most of them with logits and gradients. Args: gradients: bytes of all."""
    layer = _layer_activations(jobs) * c["activations"]
    whole = _layer_activations(jobs.but(recompute=0)) * c["activations"]
    flying = np.minimum(jobs.pipeline, jobs.micro_batches)
    activations = flying * stage_layers(jobs) * layer + jobs.tokens * jobs.width * 2 * jobs.weight_bytes
    if jobs.second_layers.any():
        activations = activations + jobs.second_layers * _layer_activations(second(jobs)) * c["activations"]
    activations = activations * np.where(jobs.activations_at > 0, 2 / jobs.layers, 1)
    # Of the words' vectors: the gradient in fp32, and with it logits, or what is scaled and rounded of it.
    table = np.where(jobs.rank > 0, 0, jobs.width * jobs.outputs / jobs.tensor)
    chunk = np.minimum(jobs.tokens * jobs.outputs / jobs.tensor, CHUNK_LOGITS) * jobs.weight_bytes
    rounded = table * np.where(jobs.weight_bytes < 4, 4 + jobs.weight_bytes, jobs.weight_bytes)
    working = np.where(jobs.recompute > 0, whole, 0)
    head = (4 * table + np.maximum(chunk, rounded + working)) * c["loss"]
    gradients = gradients * np.where(jobs.gradients_at > 0, 1 / jobs.layers, 1)
    first = activations + head + np.where(jobs.micro_batches > 1, gradients, 0)
    return activations, np.maximum(first, gradients + whole + table * jobs.weight_bytes)


def _gathered(jobs: Jobs) -> Column:
    """Bytes of weights that are put together for use, and of gradients before they are cut up: of the ends, a layer."""
    ends = jobs.width * jobs.vocab * (2 - jobs.tied) / jobs.tensor
    layer = (local_weights(jobs) * jobs.pipeline - ends) / jobs.layers
    parts = np.where(jobs.sharers > 1, 4 + 4 / np.maximum(jobs.sharers, 1), 0)
    # Laid out over one process alone, to round them for each use, weights take about 7 bytes more: measured.
    alone = np.where(jobs.sharers > 1, 0, local_weights(jobs) * 7)
    return ends * (2 * jobs.weight_bytes + parts) + 2 * layer * jobs.weight_bytes + alone


def _layer_activations(jobs: Jobs) -> Column:
    """Bytes that one layer keeps of one micro-batch for its backward pass.

    Of each norm its input in fp32, what it made and what came out of it; of attention queries, keys, values, what was
    mixed and probabilities; of a gated feed-forward both inner products, the gate's activation and their product.
    """
    cut = np.where(jobs.sequence > 0, jobs.tensor, 1)
    norms = jobs.width * ((8 + 2 * jobs.weight_bytes) / cut + 2 * jobs.weight_bytes)
    heads = (2 * jobs.heads + 2 * jobs.kv_heads) * jobs.head_width / jobs.tensor * jobs.weight_bytes
    share = jobs.expert_layers / jobs.layers
    features = (1 - share) * jobs.feedforward + share * (jobs.chosen * jobs.expert_width + jobs.shared_width)
    inner = (2 + 2 * jobs.gated) * features / jobs.tensor * jobs.weight_bytes
    routed = share * 3 * jobs.chosen * jobs.width * jobs.weight_bytes
    likely = jobs.heads / jobs.tensor * np.minimum(jobs.length, KEPT_PROBABILITIES) * jobs.weight_bytes
    everything = norms + heads + inner + routed + likely
    dear = 3 * jobs.width / cut * jobs.weight_bytes + heads + inner / 2 + routed
    inputs = jobs.width / cut * jobs.weight_bytes
    return jobs.tokens * np.where(jobs.recompute > 1, inputs, np.where(jobs.recompute > 0, dear, everything))
