"""Training jobs as columns: what is trained, on what, and how it is cut. One row is one job; a search has thousands."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.float64]

# Of a model made of one kind of layer, each with attention and a feed-forward.
KINDS: dict[str, float] = dict.fromkeys(
    (
        "leading", "expert_input", "query_rank", "key_rank", "turned", "value_width", "window", "window_layers",
        "without_attention", "without_feedforward", "state_layers", "state_heads", "state_head_width", "state_groups",
        "state_width", "state_kernel", "ahead", "ahead_blocks", "cross", "second_layers", "second_width",
        "second_heads", "second_kv_heads", "second_head_width", "second_feedforward", "second_gated", "second_causal",
        "second_vectors", "second_expert_layers", "second_length",
    ),
    0.0,
)  # fmt: skip
# Of columns that callers may leave out: layers of one kind, all weights learn, and everything rests on the device.
DEFAULTS: dict[str, float] = {
    **KINDS,
    "beside": 0, "redone": 0, "uneven": 0, "rank": 0, "adapted_attention": 0, "adapted_feedforward": 0, "base_bytes": 0,
    "weights_at": 0, "gradients_at": 0, "optimizer_at": 0, "activations_at": 0, "link_rate": 1, "host_rate": 1,
    "disk_rate": 1, "processor": 0,
    "fused_loss": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Jobs:
    """Columns of equal length, or of length 1 where all rows agree. Shapes count what the model is made of.

    Attributes:
        layers, width, heads, kv_heads, head_width, feedforward: of the model, as in ModelConfig.
        gated: 1 where the feed-forward has a gate.
        causal: 1 where scores of later places need not be computed.
        vocab, tied: rows of the embedding; 1 where the head shares them, or is none of words.
        outputs: numbers that the head makes of a token: the vocabulary, or labels.
        positions: rows of a learned table of positions, 0 for none.
        vectors: weights of norms, biases and gates in a layer, on average over the layers.
        ends: weights before and after the layers that belong to neither embedding nor head of words.
        experts, chosen, expert_width, shared_width: of a layer with a mixture; 0 experts for none.
        expert_layers: how many layers hold a mixture.
        leading: how many layers without one come before all those with one; else they are taken as evenly spread.
        expert_input: features that tokens are narrowed to before they go to experts, 0 for all of them.
        query_rank, key_rank: features that queries, and keys with values, are squeezed through (latent attention,
            arXiv:2405.04434); 0 for none. A head's `head_width` then counts its turned features too.
        turned, value_width: features of a head that are turned by place, their key shared by all heads; features of a
            head's value, 0 for as many as its queries have.
        window, window_layers: tokens that a layer with a sliding window sees, and how many layers have one.
        without_attention, without_feedforward: layers that have none.
        state_layers, state_heads, state_head_width, state_groups, state_width, state_kernel: layers with a state space
            (Mamba-2, arXiv:2405.21060), their heads, features of a head, groups that share what is written to the
            state and read from it, numbers of the state for a feature, and places that the convolution sees.
        ahead, ahead_blocks: tokens predicted beyond the next one (arXiv:2404.19737, as in arXiv:2412.19437), each by a
            block after the last layer and the head; and how many blocks have weights of their own.
        cross: 1 where layers also attend to what the second stack makes.
        second_layers, second_width, second_heads, second_kv_heads, second_head_width, second_feedforward, second_gated,
            second_causal, second_vectors, second_expert_layers: of a second stack, as of the first: an encoder beside
            its decoder, images beside texts. No layers for none.
        second_length: tokens of a row of the second stack, 0 for as many as the first's.
        length: tokens of a row.
        tensor, pipeline, chunks, data, context, expert: degrees. `data` counts all copies that read other rows, those
            of `expert` included; `chunks` are groups of layers a process holds (interleaving).
        balanced: 1 where stages are cut by cost, the head counting as layers; else all get as many layers.
        zero: what the copies share out: 0 nothing, 1 optimizer state, 2 also gradients, 3 also weights.
        sharers, expert_sharers: copies that share it, and the same of the experts' part; at most `data * context`.
        sequence: 1 where tensor processes share out tokens between the matrices.
        beside: 1 where what tensor processes sum travels piece by piece beside the products that make or take it.
        micro_rows, micro_batches: rows of a micro-batch of one copy, and how many it computes in a step.
        recompute: 0 nothing, 1 attention's scores, 2 whole blocks.
        uneven: 1 where the processes of `context` take neighbouring pieces of a row, so that the last sees all of it.
        redone: share of a layer's matrix products that recomputing of kind 1 does again besides.
        flash: 1 where attention never writes its scores.
        compiled: 1 where elementwise work is fused by a compiler.
        weight_bytes: bytes of a number of the weights and activations.
        gemm_bytes: bytes of a number in matrix products, 1 for fp8.
        state_bytes: bytes a weight of what the optimizer keeps: masters and moments.
        gradient_bytes: bytes a weight of a gradient while it is summed up.
        peak, memory_rate, units: of the accelerator: FLOP/s of the products' precision, bytes/s, multiprocessors.
        near_rate, far_rate: bytes/s of one accelerator to its neighbours in a node, and out of the node.
        node: accelerators of a node.
        release: of the training software, as a number; 0 where it is not told. No formula reads it: runs of one
            release are held alike when measured ones are learned from.
        fused_loss: 1 where logits are made and used up piece by piece.
        rank: of the adapters beside frozen weights (LoRA); 0 where all weights learn.
        adapted_attention, adapted_feedforward: 1 where those linear layers have adapters.
        base_bytes: bytes of a number of frozen linear layers at rest; 0 for `weight_bytes`.
        weights_at, gradients_at, optimizer_at, activations_at: where each rests: 0 on the device, 1 in its host's
            memory, 2 on the host's disks.
        link_rate, host_rate, disk_rate: bytes/s of an accelerator's share: of the link to its host, one way, of the
            host's memory, and of its disks.
        processor: 1 where that is the cores of a processor, for which there are formulas of their own.
    """

    layers: Column
    width: Column
    heads: Column
    kv_heads: Column
    head_width: Column
    feedforward: Column
    gated: Column
    causal: Column
    vocab: Column
    tied: Column
    outputs: Column
    positions: Column
    vectors: Column
    ends: Column
    experts: Column
    chosen: Column
    expert_width: Column
    shared_width: Column
    expert_layers: Column
    leading: Column
    expert_input: Column
    query_rank: Column
    key_rank: Column
    turned: Column
    value_width: Column
    window: Column
    window_layers: Column
    without_attention: Column
    without_feedforward: Column
    state_layers: Column
    state_heads: Column
    state_head_width: Column
    state_groups: Column
    state_width: Column
    state_kernel: Column
    ahead: Column
    ahead_blocks: Column
    cross: Column
    second_layers: Column
    second_width: Column
    second_heads: Column
    second_kv_heads: Column
    second_head_width: Column
    second_feedforward: Column
    second_gated: Column
    second_causal: Column
    second_vectors: Column
    second_expert_layers: Column
    second_length: Column
    length: Column
    tensor: Column
    pipeline: Column
    chunks: Column
    balanced: Column
    data: Column
    context: Column
    expert: Column
    zero: Column
    sharers: Column
    expert_sharers: Column
    sequence: Column
    beside: Column
    micro_rows: Column
    micro_batches: Column
    recompute: Column
    redone: Column
    uneven: Column
    flash: Column
    compiled: Column
    weight_bytes: Column
    gemm_bytes: Column
    state_bytes: Column
    gradient_bytes: Column
    peak: Column
    memory_rate: Column
    units: Column
    near_rate: Column
    far_rate: Column
    node: Column
    release: Column
    fused_loss: Column
    rank: Column
    adapted_attention: Column
    adapted_feedforward: Column
    base_bytes: Column
    weights_at: Column
    gradients_at: Column
    optimizer_at: Column
    activations_at: Column
    link_rate: Column
    host_rate: Column
    disk_rate: Column
    processor: Column

    @classmethod
    def of(cls, **columns: float | Column) -> Jobs:
        """Jobs from numbers and columns. Raises TypeError where one lacks that has no default."""
        told: dict[str, float | Column] = {**DEFAULTS, **columns}
        return cls(**{name: np.atleast_1d(np.asarray(value, np.float64)) for name, value in told.items()})

    def __len__(self) -> int:
        return max(len(getattr(self, field.name)) for field in fields(self))

    def take(self, rows: NDArray[np.intp]) -> Jobs:
        """Some rows."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return Jobs(**{name: column[rows] if len(column) > 1 else column for name, column in columns.items()})

    def but(self, **columns: float | Column) -> Jobs:
        """The same jobs with other columns."""
        return replace(self, **{name: np.atleast_1d(np.asarray(value, np.float64)) for name, value in columns.items()})

    @property
    def tokens(self) -> Column:
        """Tokens that one process sees of a micro-batch."""
        return self.micro_rows * self.length / self.context

    @property
    def expert_ranks(self) -> Column:
        """Processes of a stage that a layer's experts are cut over: by expert degree, and each by tensor degree.

        Where the first is larger than there are copies, tensor processes hold experts of their own.
        """
        return np.minimum(self.tensor * self.expert, self.tensor * self.data * self.context)

    @property
    def world(self) -> Column:
        """Accelerators in all."""
        return self.tensor * self.pipeline * self.data * self.context
