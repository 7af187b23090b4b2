"""How long a step takes: a sum of named parts, each from counts, datasheet figures and a few bounded coefficients."""

from __future__ import annotations

import numpy as np

from danlu.plan.adapters import KERNELS, adapted_matrices, adapter_times, base_bytes, dequantise_time, layer_adapters
from danlu.plan.coefficient import Coefficient
from danlu.plan.counts import Weights, layers_before_last, stage_layers, weights
from danlu.plan.jobs import Column, Jobs
from danlu.plan.layers import attention_share, blocks_ahead, expert_input, halves, plain_share, second, value_width
from danlu.plan.memory import MEMORY, layer_activations
from danlu.plan.mixing import attention_time, mixing_times
from danlu.plan.offload import RESTING
from danlu.plan.products import linear_time, unnarrowed
from danlu.plan.transfer import Held, transfer_time

TIME: dict[str, Coefficient] = {
    "gemm": Coefficient(0.66, 0.3, 1.0, 0.3, "of peak", "rate of a large matrix product"),
    "ramp": Coefficient(150, 1, 600, 1.0, "columns", "depth lost at the start of each tile of a product"),
    "waves": Coefficient(0.5, 0.05, 1.0, 0.7, "share", "how much of a last, unfilled wave of tiles is paid for"),
    "unaligned": Coefficient(0.3, 0.1, 1.0, 0.5, "share", "rate of products whose rows are no multiple of 16 bytes"),
    "narrow": Coefficient(0.7, 0.3, 1.0, 0.3, "share", "of the peak's gain that 8-bit and 4-bit products bring"),
    "memory": Coefficient(0.65, 0.3, 1.0, 0.3, "of peak", "rate of elementwise work over device memory"),
    "scores": Coefficient(1.0, 0.3, 4.0, 0.5, "passes", "work over scores, or over a scan, against the least known"),
    "norms": Coefficient(1.2, 0.3, 3.0, 0.5, "passes", "elementwise work between matrices, against the least known"),
    "launch": Coefficient(3e-5, 1e-6, 1e-4, 1.0, "s", "host time of a kernel"),
    "lockstep": Coefficient(0.05, 0.001, 0.5, 1.0, "share", "host time added by each doubling of tensor processes"),
    "near": Coefficient(0.7, 0.2, 1.2, 0.3, "of peak", "rate of collectives within a node"),
    "near_delay": Coefficient(1e-5, 1e-6, 2e-4, 1.0, "s", "delay of a collective within a node"),
    "far": Coefficient(0.7, 0.05, 1.2, 0.4, "of peak", "rate of collectives between nodes"),
    "crowding": Coefficient(0.2, 0.005, 0.6, 1.0, "power", "of the nodes, by which their rate to each other falls"),
    "far_delay": Coefficient(3e-5, 1e-6, 2e-3, 1.0, "s", "delay of a collective between nodes"),
    "shown": Coefficient(0.9, 0.05, 1.0, 0.3, "share", "of the sum of gradients that computing does not hide"),
    "hop": Coefficient(5e-5, 1e-6, 5e-3, 1.0, "s", "delay of handing a micro-batch to the next stage"),
    "fixed": Coefficient(5e-3, 1e-4, 0.3, 1.0, "s", "host time of a step"),
}

SORTED = 6  # times that a copy of a token is written or read on its way to an expert and back
KEPT = {name: each.start for name, each in MEMORY.items()}  # what a layer keeps, as is believed


def elementwise_time(jobs: Jobs, c: dict[str, float]) -> tuple[Column, Column]:
    """Seconds forward and backward of norms, residuals, activations and biases of one layer."""
    cut = np.where(jobs.sequence > 0, jobs.tensor, 1)
    stream = jobs.tokens * jobs.width / cut * 14 * halves(jobs) / 2
    share = jobs.expert_layers / jobs.layers
    features = plain_share(jobs) * jobs.feedforward
    features = features + share * (jobs.chosen * jobs.expert_width + jobs.shared_width)
    inner = jobs.tokens * features / jobs.tensor * (4 + 2 * jobs.gated)
    heads = jobs.tokens * jobs.heads * jobs.head_width / jobs.tensor * 6 * attention_share(jobs)
    # A mixture copies a token for each of its experts, sorts the copies on both sides of their way, and adds them up.
    copies = jobs.tokens / cut * share * jobs.chosen * expert_input(jobs) * SORTED
    moved = (stream + inner + heads + copies) * jobs.weight_bytes / 2 / np.where(jobs.compiled > 0, 2, 1)
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
    way_out = jobs.far_rate * c["far"] * jobs.node / shared / np.maximum(nodes / 2, 1) ** c["crowding"]
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

    def pair(rows: Column, width: Column, inner: Column, count: Column) -> tuple[Column, Column]:
        up = linear_time(rows, width, inner * matrices, count, jobs, c)
        down = linear_time(rows, inner, width, count, jobs, c)
        return up[0] + down[0], up[1] + down[1]

    share, without = jobs.expert_layers / jobs.layers, plain_share(jobs)
    plain = pair(tokens, jobs.width, np.maximum(jobs.feedforward / tensor, 1), one)
    if not share.any():
        return without * plain[0], without * plain[1]
    # An expert sees its share of the tokens of all processes that the experts are spread over.
    held = np.maximum(jobs.experts / jobs.expert, 1)
    rows = np.maximum(tokens * jobs.chosen / held, 1)
    sparse = pair(rows, expert_input(jobs), np.maximum(jobs.expert_width / tensor, 1), held)
    shared = pair(tokens, jobs.width, np.maximum(jobs.shared_width / tensor, 1), one)
    narrowed = narrowing_time(jobs, c)
    both = [without * p + share * (s + np.where(jobs.shared_width > 0, h, 0) + np.where(jobs.expert_input > 0, n, 0))
            for p, s, h, n in zip(plain, sparse, shared, narrowed, strict=True)]  # fmt: skip
    return both[0], both[1]


def narrowing_time(jobs: Jobs, c: dict[str, float]) -> tuple[Column, Column]:
    """Seconds forward and backward of the matrices before and after experts that see only so many features."""
    mine, one = jobs.tokens / np.where(jobs.sequence > 0, jobs.tensor, 1), np.ones(1)
    before = linear_time(mine, jobs.width, jobs.expert_input, one, jobs, c)
    after = linear_time(mine, jobs.expert_input, jobs.width, one, jobs, c)
    return before[0] + after[0], before[1] + after[1]


def exchange_time(jobs: Jobs, c: dict[str, float]) -> Column:
    """Seconds in which one layer's tokens travel to their experts and back, forward and backward."""
    # Processes that share the tokens out send only theirs; a node is sent a token once, whichever its experts there.
    mine = jobs.tokens / np.where(jobs.sequence > 0, jobs.tensor, 1)
    reach = jobs.expert_ranks  # that processes with other experts lie apart, tensor processes between them
    far = reach > jobs.node
    # Of experts chosen evenly: the other nodes that a token must reach, or the other processes of its own.
    nodes = np.maximum(np.ceil(reach / jobs.node), 1)
    reached = (nodes - 1) * (1 - (1 - 1 / nodes) ** jobs.chosen)
    copies = np.where(far, reached, jobs.chosen * (jobs.expert - 1) / jobs.expert)
    size = mine * copies * expert_input(jobs) * jobs.weight_bytes
    rate = np.where(far, jobs.far_rate * c["far"], jobs.near_rate * c["near"])
    delay = np.where(far, c["far_delay"], c["near_delay"])
    share = jobs.expert_layers / jobs.layers
    return np.where(jobs.expert > 1, share * 4 * (size / rate + delay), 0.0)


def layer_time(jobs: Jobs, c: dict[str, float]) -> tuple[Column, Column, Column]:
    """Seconds of a layer for a micro-batch, on average: of the host, of the device, and of it with communication."""
    tensor, again = jobs.tensor, np.where(jobs.recompute == 1, jobs.redone, jobs.recompute > 1)
    parts = [*mixing_times(jobs, c), feedforward_time(jobs, c), elementwise_time(jobs, c)]
    looked, looked_back = attention_time(jobs, c)
    device = looked * (1 + (jobs.recompute > 0)) + looked_back
    if jobs.rank.any():
        parts += adapter_times(jobs, c)
        linear = (_cut(weights(jobs), jobs) * jobs.pipeline - jobs.layers * jobs.vectors / jobs.tensor) / jobs.layers
        device = device + (2 + again) * dequantise_time(jobs, linear, c)
    for forward, back in parts:
        device = device + forward * (1 + again) + back
    # Two sums over tensor processes forward, as many when forward is done again, and two backward.
    stream = jobs.tokens * jobs.width * jobs.weight_bytes
    sums = (4 + 2 * again) * all_reduce_time(stream, tensor, np.ones(1), jobs, c) * halves(jobs) / 2
    together = np.where(jobs.beside > 0, longer(device, sums), device + sums)
    busy = longer(together + exchange_time(jobs, c), gather_time(jobs, c))

    heads = jobs.heads / tensor * jobs.micro_rows
    unfused = np.where((heads % 4 == 0) | (jobs.flash > 0), 0, 6)
    # A mixture routes, sorts, sends and brings back tokens in many small kernels.
    mixture = 40 * jobs.expert_layers / jobs.layers
    adapters = np.where(jobs.rank > 0, KERNELS * adapted_matrices(jobs), 0)
    kernels = ((24 + unfused + 2 * (tensor > 1)) * halves(jobs) / 2 + mixture + adapters) * (3 + again)
    return kernels * c["launch"] * (1 + c["lockstep"] * np.log2(tensor)), device, busy


def step_time(jobs: Jobs, c: dict[str, float]) -> dict[str, Column]:
    """Seconds of a step by part; `total` is what a step takes."""
    host, device, busy = layer_time(jobs, c)
    count, before = layers_before_last(jobs)
    ends = stage_layers(jobs, jobs.pipeline - 1)
    head, few, ahead = head_time(jobs, c), 20 * c["launch"], blocks_ahead(jobs)
    body = longer(count * host, count * busy)
    last = longer((ends + ahead) * host + few, (ends + ahead) * busy + head)
    whole = longer((jobs.layers + ahead) * host + few, (jobs.layers + ahead) * busy + head)
    piped = jobs.pipeline > 1
    slowest = np.where(piped, np.maximum(body, last), whole)
    one_batch = np.where(piped, before / np.maximum(count, 1) * body + last, whole)
    pure = longer(count * host, count * device) / np.maximum(body, 1e-30)
    named = {
        "compute": jobs.micro_batches * slowest * pure,
        "communication between layers": jobs.micro_batches * slowest * (1 - pure),
        "second stack": jobs.micro_batches * second_time(jobs, c),
        "bubble": np.maximum(one_batch - slowest, 0) / jobs.chunks + (jobs.pipeline - 1) * hop_time(jobs, c),
        "gradients": gradient_time(jobs, c),
        "optimizer": np.where(jobs.optimizer_at > 0, 0, optimizer_time(jobs, c)),
        "host": np.full(1, c["fixed"]),
        "offload": offload_time(jobs, slowest),
    }
    named["total"] = sum(named.values(), np.zeros(1))
    return named


def second_time(jobs: Jobs, c: dict[str, float]) -> Column:
    """Seconds of a second stack for a micro-batch, forward and backward: it comes before the first, or after it."""
    if not jobs.second_layers.any():
        return np.zeros(1)
    host, _, busy = layer_time(second(jobs), c)
    return np.where(jobs.second_layers > 0, longer(jobs.second_layers * host, jobs.second_layers * busy), 0.0)


def local_parts(jobs: Jobs) -> tuple[Column, Column]:
    """Weights that one process holds before anything is shared out among copies: all but the experts, and those.

    A learned table of positions is not cut by tensor degree: every process adds it to whole features.
    """
    counted, places, stage = weights(jobs), jobs.width * jobs.positions, jobs.tensor * jobs.pipeline
    ends = (counted.embedding - places) / jobs.tensor + places
    return counted.dense / stage + ends, counted.sparse / (jobs.expert_ranks * jobs.pipeline)


def local_weights(jobs: Jobs) -> Column:
    """Of both together."""
    dense, experts = local_parts(jobs)
    return dense + experts


def _cut(counted: Weights, jobs: Jobs) -> Column:
    return (counted.dense / jobs.tensor + counted.sparse / jobs.expert_ranks) / jobs.pipeline


def learning_parts(jobs: Jobs) -> tuple[Column, Column]:
    """Of those, the ones that learn: all, or the adapters beside them."""
    dense, experts = local_parts(jobs)
    thin, banks = (jobs.layers * each / (jobs.tensor * jobs.pipeline) for each in layer_adapters(jobs))
    return np.where(jobs.rank > 0, thin, dense), np.where(jobs.rank > 0, banks / jobs.expert, experts)


def local_learning(jobs: Jobs) -> Column:
    """Of both together."""
    dense, experts = learning_parts(jobs)
    return dense + experts


def offload_time(jobs: Jobs, computing: Column) -> Column:
    """Seconds of a step that what rests elsewhere takes beside a micro-batch's `computing`, and the host's update."""
    if not any(getattr(jobs, f"{part}_at").any() for part in RESTING):
        return np.zeros(1)
    sharers = np.maximum(jobs.sharers, 1)
    head = np.where(jobs.pipeline == 1, weights(jobs).head / jobs.tensor, 0)
    learning = (local_learning(jobs) + np.where(jobs.rank > 0, 0, head)) / np.where(jobs.zero > 0, sharers, 1)
    kept = stage_layers(jobs) * layer_activations(jobs, KEPT)
    bytes_each = np.where(jobs.rank > 0, base_bytes(jobs), jobs.weight_bytes)
    weighed = (local_weights(jobs) + head) / np.where(jobs.zero > 2, sharers, 1) * bytes_each
    return transfer_time(jobs, Held(weighed, learning * jobs.gradient_bytes, learning, kept), computing)


def gather_time(jobs: Jobs, c: dict[str, float]) -> Column:
    """Seconds of one layer's communication that runs beside its computing.

    Where weights are shared out, they are gathered twice and their gradient is cut up: three halves of a sum over all
    copies, for each micro-batch. Where rows are cut, keys and values travel.
    """
    other = weights(jobs).second
    own = local_weights(jobs) if other is None else local_weights(jobs) - _cut(other, jobs)
    size = own * jobs.pipeline / jobs.layers * np.where(jobs.rank > 0, base_bytes(jobs), jobs.weight_bytes)
    halves_of_sums = np.where(jobs.rank > 0, 1.0, 1.5)  # frozen weights have no gradient
    gathered = np.where(jobs.zero > 2, halves_of_sums * all_reduce_time(size, jobs.sharers, jobs.tensor, jobs, c), 0.0)
    # Keys and values of the whole row pass by every process of it: forward once, backward with their gradients.
    features = jobs.kv_heads * (jobs.head_width + value_width(jobs)) * attention_share(jobs)
    keys = jobs.tokens * jobs.context * features / jobs.tensor * jobs.weight_bytes
    return gathered + 1.5 * all_reduce_time(keys, jobs.context, jobs.tensor, jobs, c)


def gradient_time(jobs: Jobs, c: dict[str, float]) -> Column:
    """Seconds to sum gradients over the copies, and those of tied ends over the first and last stage.

    Of an expert there are fewer copies than of the rest. Copies that share weights out have cut the gradient up while
    they computed: what each kept is summed over the others.
    """
    copies, cut = jobs.data * jobs.context, jobs.zero > 2
    parts = zip(learning_parts(jobs), (np.ones(1), jobs.expert), (jobs.sharers, jobs.expert_sharers), strict=True)
    summed = np.zeros(1)
    for held, apart, sharers in parts:
        shared = np.where(cut, np.maximum(sharers, 1), 1)
        outer = np.maximum(copies / apart / shared, 1)
        size, span = held * jobs.weight_bytes / shared, jobs.tensor * apart * shared
        summed = summed + all_reduce_time(size, outer, span, jobs, c)
    tied = jobs.width * jobs.vocab / jobs.tensor * jobs.weight_bytes
    ends = all_reduce_time(tied, np.full(1, 2.0), jobs.world / jobs.pipeline, jobs, c)
    return summed * c["shown"] + np.where((jobs.pipeline > 1) & (jobs.tied > 0) & (jobs.rank == 0), ends, 0.0)


def optimizer_time(jobs: Jobs, c: dict[str, float]) -> Column:
    """Seconds to read and write gradients, masters, moments and weights: 34 bytes a weight."""
    dense, experts = learning_parts(jobs)
    kept = dense / np.where(jobs.zero > 0, np.maximum(jobs.sharers, 1), 1)
    kept = kept + experts / np.where(jobs.zero > 0, np.maximum(jobs.expert_sharers, 1), 1)
    return kept * 34 / (jobs.memory_rate * c["memory"])


def head_time(jobs: Jobs, c: dict[str, float]) -> Column:
    """Seconds of the head and the loss for a micro-batch, forward and backward, for each token that is predicted.

    Before each token beyond the next one, a matrix joins the last state with the vector of the word between.
    """
    one, plain = np.ones(1), unnarrowed(jobs)
    forward, back = linear_time(jobs.tokens, jobs.width, jobs.outputs / jobs.tensor, one, plain, c)
    moved = jobs.tokens * jobs.outputs / jobs.tensor * 24
    once = forward + back + moved / (jobs.memory_rate * c["memory"])
    if not jobs.ahead.any():
        return once
    joined = linear_time(jobs.tokens, 2 * jobs.width, jobs.width / jobs.tensor, one, jobs, c)
    return once + jobs.ahead * (once + joined[0] + joined[1])


def hop_time(jobs: Jobs, c: dict[str, float]) -> Column:
    """Seconds to hand a micro-batch's activations to the next stage and its gradient back."""
    size = jobs.tokens * jobs.width * jobs.weight_bytes
    far = jobs.world > jobs.node
    rate = np.where(far, jobs.far_rate * c["far"], jobs.near_rate * c["near"])
    return np.where(jobs.pipeline > 1, 2 * (c["hop"] + size / rate), 0.0)
