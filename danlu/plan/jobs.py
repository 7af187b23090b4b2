"""Training jobs as columns: what is trained, on what, and how it is cut. One row is one job; a search has thousands."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.float64]


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
        length: tokens of a row.
        tensor, pipeline, chunks, data, context, expert: degrees. `data` counts all copies that read other rows, those
            of `expert` included; `chunks` are groups of layers a process holds (interleaving).
        balanced: 1 where stages are cut by cost, the head counting as layers; else all get as many layers.
        zero: what the copies share out: 0 nothing, 1 optimizer state, 2 also gradients, 3 also weights.
        sharers, expert_sharers: copies that share it, and the same of the experts' part; at most `data * context`.
        sequence: 1 where tensor processes share out tokens between the matrices.
        micro_rows, micro_batches: rows of a micro-batch of one copy, and how many it computes in a step.
        recompute: 0 nothing, 1 attention's scores, 2 whole blocks.
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
    micro_rows: Column
    micro_batches: Column
    recompute: Column
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

    @classmethod
    def of(cls, **columns: float | Column) -> Jobs:
        """Jobs from numbers and columns. Raises TypeError where one lacks."""
        return cls(**{name: np.atleast_1d(np.asarray(value, np.float64)) for name, value in columns.items()})

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
    def world(self) -> Column:
        """Accelerators in all."""
        return self.tensor * self.pipeline * self.data * self.context
