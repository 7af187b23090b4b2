"""How long a step takes: a sum of named parts, each from counts, datasheet figures and a few bounded coefficients."""

from __future__ import annotations

import numpy as np

from danlu.plan.coefficient import Coefficient
from danlu.plan.counts import stage_layers, weights
from danlu.plan.jobs import Column, Jobs

# Tiles of a matrix product that libraries choose among, and the share of the best rate a smaller one reaches.
TILES = ((256, 128, 1.0), (128, 128, 0.9), (128, 64, 0.75), (64, 64, 0.55))


TIME: dict[str, Coefficient] = {
    "gemm": Coefficient(0.66, 0.3, 1.0, 0.3, "of peak", "rate of a large matrix product"),
    "ramp": Coefficient(150, 1, 600, 1.0, "columns", "depth lost at the start of each tile of a product"),
    "waves": Coefficient(0.5, 0.05, 1.0, 0.7, "share", "how much of a last, unfilled wave of tiles is paid for"),
    "unaligned": Coefficient(0.3, 0.1, 1.0, 0.5, "share", "rate of products whose rows are no multiple of 16 bytes"),
    "narrow": Coefficient(0.7, 0.3, 1.0, 0.3, "share", "of the peak's gain that 8-bit and 4-bit products bring"),
    "memory": Coefficient(0.65, 0.3, 1.0, 0.3, "of peak", "rate of elementwise work over device memory"),
    "scores": Coefficient(1.0, 0.3, 4.0, 0.5, "passes", "work over attention's scores, against the least known"),
    "norms": Coefficient(1.2, 0.3, 3.0, 0.5, "passes", "elementwise work between matrices, against the least known"),
    "launch": Coefficient(3e-5, 1e-6, 1e-4, 1.0, "s", "host time of a kernel"),
    "lockstep": Coefficient(0.05, 0.001, 0.5, 1.0, "share", "host time added by each doubling of tensor processes"),
    "near": Coefficient(0.7, 0.2, 1.2, 0.3, "of peak", "rate of collectives within a node"),
    "near_delay": Coefficient(1e-5, 1e-6, 2e-4, 1.0, "s", "delay of a collective within a node"),
    "far": Coefficient(0.7, 0.05, 1.2, 0.4, "of peak", "rate of collectives between nodes"),
    "far_delay": Coefficient(3e-5, 1e-6, 2e-3, 1.0, "s", "delay of a collective between nodes"),
    "shown": Coefficient(0.9, 0.05, 1.0, 0.3, "share", "of the sum of gradients that computing does not hide"),
    "hop": Coefficient(5e-5, 1e-6, 5e-3, 1.0, "s", "delay of handing a micro-batch to the next stage"),
    "fixed": Coefficient(5e-3, 1e-4, 0.3, 1.0, "s", "host time of a step"),
}


def product_time(
    rows: Column, columns: Column, depth: Column, count: Column, jobs: Jobs, c: dict[str, float]
) -> Column:
    """Seconds of `count` matrix products [rows, depth] x [depth, columns] at once: the best tile, or memory."""
    aligned = np.where((columns % 8 > 0) | (depth % 8 > 0), c["unaligned"], 1.0)
    narrow = np.where(jobs.gemm_bytes < jobs.weight_bytes, c["narrow"], 1.0)
    best = np.full(np.broadcast(rows, columns, depth, count, jobs.peak).shape, np.inf)
    for height, breadth, share in TILES:
        tiles = np.ceil(rows / height) * np.ceil(columns / breadth) * count
        filled = tiles / jobs.units
        waves = c["waves"] * np.ceil(filled) + (1 - c["waves"]) * np.maximum(filled, 1)
        rate = jobs.peak / jobs.units * c["gemm"] * share * aligned * narrow
        best = np.minimum(best, waves * 2 * height * breadth * (depth + c["ramp"]) / rate)
    moved = jobs.gemm_bytes * (rows * depth + depth * columns) + jobs.weight_bytes * rows * columns
    return np.maximum(best, count * moved / (jobs.memory_rate * c["memory"]))


def linear_time(
    rows: Column, inputs: Column, outputs: Column, count: Column, jobs: Jobs, c: dict[str, float]
) -> tuple[Column, Column]:
    """Seconds forward and backward of `count` linear layers at once, over so many tokens each."""
    forward = product_time(rows, outputs, inputs, count, jobs, c)
    back = product_time(rows, inputs, outputs, count, jobs, c) + product_time(inputs, outputs, rows, count, jobs, c)
    return forward, back


def unnarrowed(jobs: Jobs) -> Jobs:
    """The same jobs with products of the activations' own precision, as attention and the head are computed."""
    return jobs.but(peak=jobs.peak * jobs.gemm_bytes / jobs.weight_bytes, gemm_bytes=jobs.weight_bytes)


def attention_time(jobs: Jobs, c: dict[str, float]) -> tuple[Column, Column]:
    """Seconds forward and backward of scores, softmax and their product with the values, for one layer."""
    jobs = unnarrowed(jobs)
    heads = jobs.heads / jobs.tensor * jobs.micro_rows
    length, local = jobs.length, jobs.length / jobs.context
    plain = product_time(local, length, jobs.head_width, heads, jobs, c)
    plain = plain + product_time(local, jobs.head_width, length, heads, jobs, c)
    # Fused softmax of Megatron takes blocks of 4 rows of heads; else it is made of several plain kernels.
    passes = np.where(heads % 4 == 0, 6, 24)
    moved = heads * local * length * passes * c["scores"] / (jobs.memory_rate * c["memory"])
    share = 1 - 0.5 * jobs.causal
    flash = 4 * heads * local * length * jobs.head_width * share / (jobs.peak * c["gemm"] * 0.6)
    forward = np.where(jobs.flash > 0, flash, plain + moved)
    back = np.where(jobs.flash > 0, 2.5 * flash, 2 * plain + 1.5 * moved)
    return forward, back


def elementwise_time(jobs: Jobs, c: dict[str, float]) -> tuple[Column, Column]:
    """Seconds forward and backward of norms, residuals, activations and biases of one layer."""
    cut = np.where(jobs.sequence > 0, jobs.tensor, 1)
    stream = jobs.tokens * jobs.width / cut * 14
    share = jobs.expert_layers / jobs.layers
    features = (1 - share) * jobs.feedforward + share * (jobs.chosen * jobs.expert_width + jobs.shared_width)
    inner = jobs.tokens * features / jobs.tensor * (4 + 2 * jobs.gated)
    heads = jobs.tokens * jobs.heads * jobs.head_width / jobs.tensor * 6
    moved = (stream + inner + heads) * jobs.weight_bytes / 2 / np.where(jobs.compiled > 0, 2, 1)
    once = moved * c["norms"] / (jobs.memory_rate * c["memory"])
    return once, 1.6 * once


def all_reduce_time(size: Column, group: Column, span: Column, jobs: Jobs, c: dict[str, float]) -> Column:
    """Seconds to sum `size` bytes over `group` processes that lie `span` ranks apart.

    A ring moves 2 (n - 1) / n of the bytes over the slowest link. Groups that reach out of a node share its way out: as
    many as there are neighbours between two members.
    """
    inside = np.clip(jobs.node / span, 1, group)
    far = group * span > jobs.node
    near_time = 2 * (group - 1) / group * size / (jobs.near_rate * c["near"]) + c["near_delay"] * np.log2(group)
    nodes = np.maximum(group / inside, 1)
    shared = np.minimum(span, jobs.node)
    way_out = jobs.far_rate * c["far"] * jobs.node / shared
    far_time = 2 * (nodes - 1) / nodes * size / way_out + c["far_delay"] * np.log2(np.maximum(nodes, 1))
    far_time = far_time + 2 * (inside - 1) / inside * size / (jobs.near_rate * c["near"])
    return np.where(group > 1, np.where(far, far_time, near_time), 0.0)


def longer(one: Column, other: Column) -> Column:
    """The longer of two times that run beside each other, somewhat more where both are near."""
    top = np.maximum(one, other)
    return top * (1 + (np.minimum(one, other) / np.maximum(top, 1e-30)) ** 6) ** (1 / 6)


def feedforward_time(jobs: Jobs, c: dict[str, float]) -> tuple[Column, Column]:
    """Seconds forward and backward of the feed-forward of one layer, the mean of plain layers and of mixtures."""
    tokens, tensor, matrices = jobs.tokens, jobs.tensor, 1 + jobs.gated
    one = np.ones(1)

    def pair(rows: Column, inner: Column, count: Column) -> tuple[Column, Column]:
        up = linear_time(rows, jobs.width, inner * matrices, count, jobs, c)
        down = linear_time(rows, inner, jobs.width, count, jobs, c)
        return up[0] + down[0], up[1] + down[1]

    plain = pair(tokens, np.maximum(jobs.feedforward / tensor, 1), one)
    share = jobs.expert_layers / jobs.layers
    if not share.any():
        return plain
    # An expert sees its share of the tokens of all processes that the experts are spread over.
    held = np.maximum(jobs.experts / jobs.expert, 1)
    rows = np.maximum(tokens * jobs.chosen / held, 1)
    sparse = pair(rows, np.maximum(jobs.expert_width / tensor, 1), held)
    shared = pair(tokens, np.maximum(jobs.shared_width / tensor, 1), one)
    both = [(1 - share) * p + share * (s + np.where(jobs.shared_width > 0, h, 0))
            for p, s, h in zip(plain, sparse, shared, strict=True)]  # fmt: skip
    return both[0], both[1]


def exchange_time(jobs: Jobs, c: dict[str, float]) -> Column:
    """Seconds in which one layer's tokens travel to their experts and back, forward and backward."""
    # Processes that share the tokens out send only theirs; a node is sent a token once, whichever its experts there.
    mine = jobs.tokens / np.where(jobs.sequence > 0, jobs.tensor, 1)
    far = jobs.expert > jobs.node
    copies = np.where(far, np.minimum(jobs.chosen, np.ceil(jobs.expert / jobs.node)), jobs.chosen)
    size = mine * copies * jobs.width * jobs.weight_bytes * (jobs.expert - 1) / jobs.expert
    rate = np.where(far, jobs.far_rate * c["far"], jobs.near_rate * c["near"])
    delay = np.where(far, c["far_delay"], c["near_delay"])
    share = jobs.expert_layers / jobs.layers
    return np.where(jobs.expert > 1, share * 4 * (size / rate + delay), 0.0)


def step_time(jobs: Jobs, c: dict[str, float]) -> dict[str, Column]:
    """Seconds of a step by part; `total` is what a step takes."""
    tensor, again = jobs.tensor, jobs.recompute > 1
    queries, keys = jobs.heads * jobs.head_width, 2 * jobs.kv_heads * jobs.head_width
    one = np.ones(1)
    parts = [
        linear_time(jobs.tokens, jobs.width, (queries + keys) / tensor, one, jobs, c),
        linear_time(jobs.tokens, queries / tensor, jobs.width, one, jobs, c),
        feedforward_time(jobs, c),
        elementwise_time(jobs, c),
    ]
    looked, looked_back = attention_time(jobs, c)
    device = looked * (1 + (jobs.recompute > 0)) + looked_back
    for forward, back in parts:
        device = device + forward * (1 + again) + back
    # Two sums over tensor processes forward, as many when forward is done again, and two backward.
    stream = jobs.tokens * jobs.width * jobs.weight_bytes
    sums = (4 + 2 * again) * all_reduce_time(stream, tensor, one, jobs, c)
    exchange = exchange_time(jobs, c)
    gathered = gather_time(jobs, c)
    busy = longer(device + sums + exchange, gathered)

    heads = jobs.heads / tensor * jobs.micro_rows
    unfused = np.where((heads % 4 == 0) | (jobs.flash > 0), 0, 6)
    # A mixture routes, sorts, sends and brings back tokens in many small kernels.
    mixture = 40 * jobs.expert_layers / jobs.layers
    kernels = (24 + unfused + mixture + 2 * (tensor > 1)) * (3 + again)
    host = kernels * c["launch"] * (1 + c["lockstep"] * np.log2(tensor))

    count = stage_layers(jobs)
    ends = stage_layers(jobs, jobs.pipeline - 1)
    head, few = head_time(jobs, c), 20 * c["launch"]
    body = longer(count * host, count * busy)
    last = longer(ends * host + few, ends * busy + head)
    whole = longer(jobs.layers * host + few, jobs.layers * busy + head)
    piped = jobs.pipeline > 1
    slowest = np.where(piped, np.maximum(body, last), whole)
    one_batch = np.where(piped, (jobs.pipeline - 1) * body + last, whole)
    pure = longer(count * host, count * device) / np.maximum(body, 1e-30)
    named = {
        "compute": jobs.micro_batches * slowest * pure,
        "communication between layers": jobs.micro_batches * slowest * (1 - pure),
        "bubble": np.maximum(one_batch - slowest, 0) / jobs.chunks + (jobs.pipeline - 1) * hop_time(jobs, c),
        "gradients": gradient_time(jobs, c),
        "optimizer": optimizer_time(jobs, c),
        "host": np.full(1, c["fixed"]),
    }
    named["total"] = sum(named.values(), np.zeros(1))
    return named


def local_weights(jobs: Jobs) -> Column:
    """Weights that one process holds before anything is shared out among copies."""
    counted = weights(jobs)
    sparse = counted.expert_layers * counted.experts
    dense = counted.total - counted.embedding - counted.head - sparse
    return (dense + sparse / jobs.expert) / (jobs.tensor * jobs.pipeline) + counted.embedding / jobs.tensor


def gather_time(jobs: Jobs, c: dict[str, float]) -> Column:
    """Seconds of one layer's communication that runs beside its computing.

    Where weights are shared out, they are gathered twice and their gradient is cut up: three halves of a sum over all
    copies, for each micro-batch. Where rows are cut, keys and values travel.
    """
    size = local_weights(jobs) * jobs.pipeline / jobs.layers * jobs.weight_bytes
    gathered = np.where(jobs.zero > 2, 1.5 * all_reduce_time(size, jobs.sharers, jobs.tensor, jobs, c), 0.0)
    # Keys and values of the whole row pass by every process of it: forward once, backward with their gradients.
    keys = 2 * jobs.tokens * jobs.context * jobs.kv_heads * jobs.head_width / jobs.tensor * jobs.weight_bytes
    return gathered + 1.5 * all_reduce_time(keys, jobs.context, jobs.tensor, jobs, c)


def gradient_time(jobs: Jobs, c: dict[str, float]) -> Column:
    """Seconds to sum gradients over the copies, and those of tied ends over the first and last stage."""
    copies = jobs.data * jobs.context
    size = np.where(jobs.zero > 2, local_weights(jobs) / np.maximum(jobs.sharers, 1), local_weights(jobs))
    outer = np.where(jobs.zero > 2, copies / np.maximum(jobs.sharers, 1), copies)
    span = np.where(jobs.zero > 2, jobs.tensor * jobs.sharers, jobs.tensor)
    summed = all_reduce_time(size * jobs.weight_bytes, outer, span, jobs, c)
    tied = jobs.width * jobs.vocab / jobs.tensor * jobs.weight_bytes
    ends = all_reduce_time(tied, np.full(1, 2.0), jobs.world / jobs.pipeline, jobs, c)
    return summed * c["shown"] + np.where((jobs.pipeline > 1) & (jobs.tied > 0), ends, 0.0)


def optimizer_time(jobs: Jobs, c: dict[str, float]) -> Column:
    """Seconds to read and write gradients, masters, moments and weights: 34 bytes a weight."""
    kept = local_weights(jobs) / np.where(jobs.zero > 0, np.maximum(jobs.sharers, 1), 1)
    return kept * 34 / (jobs.memory_rate * c["memory"])


def head_time(jobs: Jobs, c: dict[str, float]) -> Column:
    """Seconds of the head and the loss for a micro-batch, forward and backward."""
    forward, back = linear_time(jobs.tokens, jobs.width, jobs.outputs / jobs.tensor, np.ones(1), unnarrowed(jobs), c)
    moved = jobs.tokens * jobs.outputs / jobs.tensor * 24
    return forward + back + moved / (jobs.memory_rate * c["memory"])


def hop_time(jobs: Jobs, c: dict[str, float]) -> Column:
    """Seconds to hand a micro-batch's activations to the next stage and its gradient back."""
    size = jobs.tokens * jobs.width * jobs.weight_bytes
    far = jobs.world > jobs.node
    rate = np.where(far, jobs.far_rate * c["far"], jobs.near_rate * c["near"])
    return np.where(jobs.pipeline > 1, 2 * (c["hop"] + size / rate), 0.0)
