"""Danlu's own engine on a processor: the time of a step as a sum of named parts.

A processor works one thing after another: what an accelerator does beside each other is added up here. Operands of a
product are packed before they are multiplied, elementwise work and the optimizer move memory, and each operator costs
the host some microseconds. Parts follow the engine's own code, uncompiled (`danlu.model.tiled_attention`,
`danlu.model.loss`, `danlu.train.optimizer`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from danlu.plan.adapters import KERNELS, adapted_matrices, moved_by_adapters, used_adapters
from danlu.plan.coefficient import Coefficient
from danlu.plan.counts import stage_layers, weights
from danlu.plan.jobs import Column, Jobs
from danlu.plan.layers import second
from danlu.plan.time import elementwise_time, exchange_time, hop_time, local_learning, local_weights, offload_time

QUERIES = 128  # of a tile of attention, as in danlu.model.tiled_attention
KEPT_PROBABILITIES = 320  # a query and head, as in danlu.train.recompute
# Operators that the host starts for a layer's forward pass, as many again twice backward; for a tile of attention
# forward and backward; for an expert, and for a router; and around a layer whose weights are laid out over processes.
LAYER_KERNELS, TILE_KERNELS, EXPERT_KERNELS, ROUTER_KERNELS, GATHER_KERNELS = 50, (10, 16), 8, 20, 60
NEW_KERNELS = 6  # products of an expert that differ in shape, forward and backward

PROCESSOR_TIME: dict[str, Coefficient] = {
    "gemm": Coefficient(0.8, 0.3, 1.3, 0.2, "of peak", "rate of large matrix products within a step"),
    "rounded": Coefficient(0.75, 0.3, 1.3, 0.2, "share", "of that, in bf16: operands are packed in pairs first"),
    "packing": Coefficient(1.0, 0.05, 8, 0.7, "passes", "over the operands of a product, at memory's rate"),
    "tiles": Coefficient(0.5, 0.1, 1.1, 0.4, "of peak", "rate of attention's products, tile by tile"),
    "scores": Coefficient(4, 0.5, 30, 0.6, "passes", "over attention's scores, forward; as many again backward"),
    "norms": Coefficient(1.0, 0.1, 6, 0.6, "passes", "elementwise work between matrices, against the least known"),
    "loss": Coefficient(4, 0.5, 30, 0.6, "passes", "over logits, beside their products"),
    "memory": Coefficient(0.7, 0.2, 1.2, 0.3, "of peak", "rate of work that moves memory"),
    "threads": Coefficient(0.1, 0.01, 0.6, 0.7, "power", "of the number of processes, that all of them gain together"),
    "making": Coefficient(7e-4, 1e-5, 5e-3, 1.0, "s", "to make a kernel, in bf16, for a number of rows that is new"),
    "launch": Coefficient(1.5e-5, 1e-6, 1e-4, 0.7, "s", "host time of an operator"),
    "near": Coefficient(0.7, 0.1, 1.5, 0.5, "of peak", "rate of collectives between processes"),
    "near_delay": Coefficient(5e-4, 2e-5, 2e-2, 1.0, "s", "delay of a collective, waiting for each other included"),
    "far": Coefficient(0.7, 0.05, 1.2, 0.4, "of peak", "rate of collectives between machines"),
    "far_delay": Coefficient(5e-4, 2e-5, 2e-2, 1.0, "s", "delay of a collective between machines"),
    "hop": Coefficient(5e-4, 2e-5, 2e-2, 1.0, "s", "delay of handing a micro-batch to the next stage"),
    "fixed": Coefficient(2e-2, 2e-4, 0.2, 1.0, "s", "host time of a step"),
}


def processor_time(jobs: Jobs, c: dict[str, float]) -> dict[str, Column]:
    """Seconds of a step by part; `total` is what a step takes."""
    jobs = _sharing(jobs, c)
    layers = {name: stage_layers(jobs) * part for name, part in _layer_time(jobs, c).items()}
    if jobs.second_layers.any():
        for name, part in _layer_time(second(jobs), c).items():
            layers[name] = layers[name] + jobs.second_layers * part
    body = sum(layers.values(), np.zeros(1))
    named = {name: jobs.micro_batches * part for name, part in layers.items()}
    named["communication"] = named["communication"] + _shared_weights_time(jobs, c) + _copies_time(jobs, c)
    named |= {
        "head and loss": jobs.micro_batches * (1 + jobs.ahead) * _head_time(jobs, c),
        "bubble": (jobs.pipeline - 1) * (body / jobs.chunks + hop_time(jobs, c)),
        "optimizer": optimizer_time(jobs, c),
        "offload": np.maximum(offload_time(jobs, body) - optimizer_time(jobs, c), 0),
        "host": np.full(1, c["fixed"]) + np.where(jobs.world > 1, 6 * c["near_delay"], 0),
    }
    named["total"] = sum(named.values(), np.zeros(1))
    return {name: np.broadcast_to(part, named["total"].shape) for name, part in named.items()}


def _layer_time(jobs: Jobs, c: dict[str, float]) -> dict[str, Column]:
    """Seconds of one layer and micro-batch by part, forward and backward, on average over the layers."""
    again = jobs.recompute > 1
    looked, looked_back = _attention_time(jobs, c)
    once, back = elementwise_time(jobs.but(compiled=0), c)
    return {
        # A product goes backward as two, or as one where the matrix is frozen.
        "matrix products": _matrices_time(jobs, c) * (3 + again - (jobs.rank > 0))
        + _adapters_time(jobs, c) * (3 + again),
        "attention": looked * (1 + again) + looked_back,
        "elementwise": (once * (1 + (jobs.recompute > 0)) + back) * (jobs.weight_bytes + 4) / 4,
        "experts": _experts_time(jobs, c),
        "operators": _kernels(jobs) * c["launch"],
        "communication": _between_layers(jobs, c) + exchange_time(jobs, c),
    }


def _sharing(jobs: Jobs, c: dict[str, float]) -> Jobs:
    """The same jobs with what a process really gets of a shared machine: cores side by side gain less than apart."""
    gain = jobs.world ** c["threads"]
    return jobs.but(peak=jobs.peak * gain, memory_rate=jobs.memory_rate * gain)


def _product_time(flops: Column, numbers: Column, jobs: Jobs, c: dict[str, float]) -> Column:
    """Seconds of matrix products with so many operations, over operands and results of so many numbers."""
    packing = numbers * jobs.weight_bytes * c["packing"] / (jobs.memory_rate * c["memory"])
    return flops / (jobs.peak * c["gemm"] * _rounded(jobs, c)) + packing


def _rounded(jobs: Jobs, c: dict[str, float]) -> Column:
    """Share of its own peak that a step reaches in its precision, against fp32."""
    return np.where(jobs.weight_bytes < 4, c["rounded"], 1.0)


def _matrices_time(jobs: Jobs, c: dict[str, float]) -> Column:
    """Seconds forward of one layer's linear layers, the mean of plain layers and of mixtures."""
    counted, share = weights(jobs), jobs.expert_layers / jobs.layers
    plain, matrices = counted.dense_layers / jobs.layers, 2 + jobs.gated
    passed = counted.mixing + plain * counted.feedforward + share * (counted.router + counted.shared)
    met = passed + share * counted.experts * jobs.chosen / np.maximum(jobs.experts, 1)
    held = passed + share * counted.experts / jobs.expert
    features = 4 * jobs.width + 2 * (jobs.heads + jobs.kv_heads) * jobs.head_width
    features = features + plain * matrices * (jobs.width + jobs.feedforward)
    features = features + share * matrices * jobs.chosen * (jobs.width + jobs.expert_width)
    numbers = held / jobs.tensor + jobs.tokens * features / jobs.tensor
    return _product_time(2 * jobs.tokens * met / jobs.tensor, numbers, jobs, c)


def _experts_time(jobs: Jobs, c: dict[str, float]) -> Column:
    """Seconds that experts take of one layer beside their products.

    Each makes a gradient of the whole bank, mostly zeros, that is added to the others': four passes. In bf16 products
    over a number of tokens that was never met need a new kernel, and experts get another number every step.
    """
    share, held = jobs.expert_layers / jobs.layers, jobs.experts / jobs.expert
    bank = weights(jobs).experts / (jobs.expert * jobs.tensor)
    passes = held * bank * 4 * jobs.weight_bytes / (jobs.memory_rate * c["memory"])
    made = np.where(jobs.weight_bytes < 4, held * NEW_KERNELS * c["making"], 0)
    return share * (passes + made)


def _adapters_time(jobs: Jobs, c: dict[str, float]) -> Column:
    """Seconds forward of one layer's adapters, and of adding what they make."""
    used = used_adapters(jobs)
    numbers = used + jobs.tokens * (used / np.maximum(jobs.rank, 1) + 2 * jobs.rank * adapted_matrices(jobs))
    added = moved_by_adapters(jobs) / (jobs.memory_rate * c["memory"])
    return _product_time(2 * jobs.tokens * used, numbers, jobs, c) + added


def _pairs(jobs: Jobs) -> Column:
    """Pairs of a query and a key of a row that are computed: of causal attention whole tiles up to the diagonal."""
    tiled = jobs.length * (jobs.length + np.minimum(QUERIES, jobs.length)) / 2
    return np.where(jobs.causal > 0, tiled, jobs.length**2)


def _attention_time(jobs: Jobs, c: dict[str, float]) -> tuple[Column, Column]:
    """Seconds forward and backward of one layer's scores, softmax and mixtures."""
    row = _pairs(jobs)
    pairs = row * jobs.micro_rows * jobs.heads / (jobs.tensor * jobs.context)
    products = 4 * pairs * jobs.head_width / (jobs.peak * c["tiles"] * _rounded(jobs, c))
    passes = pairs * jobs.weight_bytes * c["scores"] / (jobs.memory_rate * c["memory"])
    kept = np.where(jobs.recompute == 0, np.minimum(KEPT_PROBABILITIES * jobs.length / row, 1), 0)
    return products + passes, 2 * products + passes + (1 - kept) * (products / 2 + passes)


def _kernels(jobs: Jobs) -> Column:
    """Operators of one layer and micro-batch, forward and backward."""
    again, share = jobs.recompute > 1, jobs.expert_layers / jobs.layers
    tiles = np.ceil(jobs.length / QUERIES)
    plain = LAYER_KERNELS + share * (ROUTER_KERNELS + EXPERT_KERNELS * jobs.experts / jobs.expert)
    gathered = np.where(laid_out(jobs), GATHER_KERNELS, 0)
    plain = plain + np.where(jobs.rank > 0, KERNELS * adapted_matrices(jobs), 0)
    return (plain + gathered) * (3 + again) + tiles * (TILE_KERNELS[0] * (1 + again) + TILE_KERNELS[1])


def laid_out(jobs: Jobs) -> NDArray[np.bool_]:
    """Whether weights are laid out over processes, over this one alone if need be, and rounded for each use."""
    return (jobs.world > 1) & ((jobs.sharers > 1) | (jobs.weight_bytes < 4))


def _head_time(jobs: Jobs, c: dict[str, float]) -> Column:
    """Seconds of the head and the loss of a micro-batch, forward and backward."""
    rows, words = jobs.tokens, jobs.outputs / jobs.tensor
    products = _product_time(2 * rows * jobs.width * words, rows * (jobs.width + words), jobs, c)
    products = products * (3 - (jobs.rank > 0))
    # The gradient of words' vectors is made, scaled, rounded and added up, the whole table each time.
    table = np.where(jobs.rank > 0, 0, jobs.width * words * (16 + 6 * jobs.weight_bytes))
    logits = rows * words * jobs.weight_bytes * c["loss"]
    return products + (table + logits) / (jobs.memory_rate * c["memory"])


def _moved(size: Column, times: Column | float, jobs: Jobs, c: dict[str, float]) -> Column:
    """Seconds of so many collectives that each bring a process `size` bytes."""
    return times * (size / (jobs.near_rate * c["near"]) + c["near_delay"])


def _between_layers(jobs: Jobs, c: dict[str, float]) -> Column:
    """Seconds of what tensor and context processes send each other about one layer and micro-batch."""
    stream = jobs.tokens * jobs.width * jobs.weight_bytes
    exchanges = np.where(jobs.recompute > 1, 12.0, 8.0)
    sums = np.where(jobs.tensor > 1, _moved(stream, exchanges, jobs, c), 0)
    keys = 2 * jobs.tokens * jobs.kv_heads * jobs.head_width / jobs.tensor * jobs.weight_bytes
    ring = np.where(jobs.context > 1, _moved(keys, 3 * (jobs.context - 1), jobs, c), 0)
    return sums + ring


def _shared_weights_time(jobs: Jobs, c: dict[str, float]) -> Column:
    """Seconds to gather weights that are shared out, forward and backward, and to cut up their gradient."""
    others = (jobs.sharers - 1) / np.maximum(jobs.sharers, 1)
    gathers = np.where(jobs.zero > 2, 2 * jobs.micro_batches, 1)
    scatters = np.where(jobs.zero > 1, jobs.micro_batches, 1)
    held, groups = local_weights(jobs) * others, stage_layers(jobs) + 1
    gathered = groups * _moved(held / groups * jobs.weight_bytes, gathers, jobs, c)
    scattered = groups * _moved(held / groups * 4, scatters, jobs, c)
    return np.where(jobs.sharers > 1, gathered + scattered, 0)


def _copies_time(jobs: Jobs, c: dict[str, float]) -> Column:
    """Seconds to sum gradients over copies that share nothing out."""
    copies = jobs.data * jobs.context / np.maximum(jobs.sharers, 1)
    size = local_weights(jobs) / np.maximum(jobs.sharers, 1) * 4 * 2 * (copies - 1) / copies
    return np.where(copies > 1, _moved(size, np.ones(1), jobs, c), 0)


def optimizer_time(jobs: Jobs, c: dict[str, float]) -> Column:
    """Seconds to clip, to update masters and moments, and to round masters into the copies computed with.

    Gradients are read twice and written once; AdamW reads four numbers and writes three; a copy reads one and writes
    half of one.
    """
    kept = local_learning(jobs) / np.where(jobs.zero > 0, np.maximum(jobs.sharers, 1), 1)
    size = kept * (40 + np.where(jobs.weight_bytes < 4, 6, 0))
    return size / (jobs.memory_rate * c["memory"])
