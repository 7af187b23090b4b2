"""Low-rank adapters beside frozen weights (LoRA, arXiv:2106.09685), on a base of 16 bits or fewer (QLoRA,
arXiv:2305.14314): what learns, what is kept, and what computing with it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from danlu.errors import DanluError
from danlu.plan.jobs import KINDS, Column, Jobs
from danlu.plan.products import Times, linear_time, scaled

Target = Literal["all", "attention", "feedforward"]
TARGETS: tuple[Target, ...] = get_args(Target)
GLOBS = {
    "attention": ("blocks.*.attention.*",), "feedforward": ("blocks.*.feedforward.*",),
    "all": ("blocks.*.attention.*", "blocks.*.feedforward.*"),
}  # fmt: skip
# Bytes of a number of the base. 8 and 4 bits have a scale of 16 bits for every 32 numbers (GGUF's Q8_0 and Q4_0), or of
# 32 bits for every 64 (NF4): half a bit more.
BASE_BYTES = {16: 0.0, 8: 8.5 / 8, 4: 4.5 / 8}  # 0: that of the activations
KERNELS = 4  # that an adapted matrix adds to a forward pass: two products, scaling and adding


@dataclass(frozen=True)
class Lora:
    """Adapters to be trained. Raises DanluError where they cannot be.

    Attributes:
        rank: inner features.
        target: which linear layers of the blocks have one, in the words of `GLOBS`.
        base_bits: of a number of the frozen linear layers: 16, 8 or 4.
    """

    rank: int
    target: Target = "all"
    base_bits: int = 16

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise DanluError(f"adapters of rank {self.rank} hold nothing", where="--lora", fix="as in --lora 16")
        if self.target not in GLOBS:
            fix = f"known: {', '.join(GLOBS)}"
            raise DanluError(f"no linear layers are called {self.target}", where="--lora-target", fix=fix)
        if self.base_bits not in BASE_BYTES:
            known = f"known: {', '.join(map(str, BASE_BYTES))}"
            raise DanluError(f"a base of {self.base_bits} bits is not planned for", where="--base-bits", fix=known)

    @property
    def columns(self) -> dict[str, float]:
        """The columns of `Jobs` that say so."""
        return {
            "rank": self.rank, "adapted_attention": self.target != "feedforward",
            "adapted_feedforward": self.target != "attention", "base_bytes": BASE_BYTES[self.base_bits],
        }  # fmt: skip


def read_lora(rank: int | None, target: Target | None, bits: int | None) -> Lora | None:
    """Adapters as somebody asks for them, or None. Raises DanluError where they cannot be made as asked."""
    if rank is not None:
        return Lora(rank, target or "all", 16 if bits is None else bits)
    if target is not None or bits is not None:
        where = "--base-bits" if target is None else "--lora-target"
        raise DanluError("all weights learn, in full", where=where, fix="train adapters in their place: --lora 16")
    return None


def can_adapt(model: Mapping[str, float]) -> bool:
    """Whether adapters are planned for beside a model: one of a single stack, of plain attention and feed-forwards."""
    return not any(model.get(name, 0) for name in KINDS if not name.startswith(("window", "leading")))


def layer_adapters(jobs: Jobs) -> tuple[Column, Column]:
    """Adapters' weights of a layer, on average over layers: beside what every token passes, and beside experts.

    One of rank r beside a matrix of i inputs and o outputs has r (i + o).
    """
    dense = jobs.adapted_attention * _attention(jobs) + jobs.adapted_feedforward * _feedforward(jobs)
    return jobs.rank * dense, jobs.rank * jobs.adapted_feedforward * _experts(jobs, jobs.experts)


def used_adapters(jobs: Jobs) -> Column:
    """Adapters' weights of a layer that one token passes, on average over layers."""
    dense, _ = layer_adapters(jobs)
    return dense + jobs.rank * jobs.adapted_feedforward * _experts(jobs, jobs.chosen)


def _attention(jobs: Jobs) -> Column:
    """Inputs and outputs of query, key, value and output."""
    return 4 * jobs.width + 2 * (jobs.heads + jobs.kv_heads) * jobs.head_width


def _feedforward(jobs: Jobs) -> Column:
    """Inputs and outputs of plain feed-forwards, shared experts and routers."""
    mixture, matrices = jobs.expert_layers / jobs.layers, 2 + jobs.gated
    shared = np.where(jobs.shared_width > 0, matrices * (jobs.width + jobs.shared_width), 0)
    routed = shared + jobs.width + jobs.experts
    return (1 - mixture) * matrices * (jobs.width + jobs.feedforward) + mixture * routed


def _experts(jobs: Jobs, count: Column) -> Column:
    """Inputs and outputs of so many experts of every mixture."""
    return jobs.expert_layers / jobs.layers * count * (2 + jobs.gated) * (jobs.width + jobs.expert_width)


def adapted_matrices(jobs: Jobs) -> Column:
    """Matrices beside which a token meets an adapter, in a layer."""
    mixture = jobs.expert_layers / jobs.layers
    feedforwards = (1 - mixture) + mixture * (jobs.chosen + (jobs.shared_width > 0))
    return 4 * jobs.adapted_attention + jobs.adapted_feedforward * ((2 + jobs.gated) * feedforwards + mixture)


def learning(jobs: Jobs, layers: Column, dense: Column, sparse: Column) -> tuple[Column, Column]:
    """Of a process's weights, `dense` ones and those of experts (`sparse`), how many learn: all, or their adapters."""
    thin, banks = layer_adapters(jobs)
    thin, banks = layers * thin / jobs.tensor, layers * banks / (jobs.tensor * jobs.expert)
    return np.where(jobs.rank > 0, thin, dense), np.where(jobs.rank > 0, banks, sparse)


def base_bytes(jobs: Jobs) -> Column:
    """Bytes of a number of the blocks' linear layers at rest."""
    return np.where(jobs.base_bytes > 0, jobs.base_bytes, jobs.weight_bytes)


def moved_by_adapters(jobs: Jobs) -> Column:
    """Bytes that adding adapters' outputs moves in one layer, forward: three passes over what the matrices make."""
    outputs = jobs.adapted_attention * (jobs.width + (jobs.heads + 2 * jobs.kv_heads) * jobs.head_width)
    mixture = jobs.expert_layers / jobs.layers
    inner = (1 - mixture) * jobs.feedforward + mixture * (jobs.chosen * jobs.expert_width + jobs.shared_width)
    widths = (1 - mixture) + mixture * (jobs.chosen + (jobs.shared_width > 0))
    outputs = outputs + jobs.adapted_feedforward * ((1 + jobs.gated) * inner + jobs.width * widths)
    return 3 * jobs.tokens * outputs / jobs.tensor * jobs.weight_bytes


def adapter_times(jobs: Jobs, c: dict[str, float]) -> list[Times]:
    """Seconds forward and backward of one layer's adapters: their products, and adding what they make.

    Experts' adapters are as many products at once as there are experts here, each with its share of the tokens.
    """
    learns, one, tensor = jobs.but(rank=0), np.ones(1), jobs.tensor
    mixture, gates = jobs.expert_layers / jobs.layers, 1 + jobs.gated

    def pair(rows: Column, inputs: Column, outputs: Column, count: Column) -> Times:
        down = linear_time(rows, inputs, jobs.rank, count, learns, c)
        up = linear_time(rows, jobs.rank, outputs, count, learns, c)
        return down[0] + up[0], down[1] + up[1]

    def both(rows: Column, inner: Column, count: Column, share: Column) -> list[Times]:
        inner = np.maximum(inner / tensor, 1)
        ups, downs = pair(rows, jobs.width, inner, count), pair(rows, inner, jobs.width, count)
        return [scaled(share * gates, ups), scaled(share, downs)]

    queries, keys = jobs.heads * jobs.head_width / tensor, jobs.kv_heads * jobs.head_width / tensor
    found = [
        scaled(jobs.adapted_attention * often, pair(jobs.tokens, inputs, outputs, one))
        for often, inputs, outputs in ((1, jobs.width, queries), (2, jobs.width, keys), (1, queries, jobs.width))
    ]
    found += both(jobs.tokens, jobs.feedforward, one, jobs.adapted_feedforward * (1 - mixture))
    if mixture.any():
        held = np.maximum(jobs.experts / jobs.expert, 1)
        rows = np.maximum(jobs.tokens * jobs.chosen / held, 1)
        found += both(rows, jobs.expert_width, held, jobs.adapted_feedforward * mixture)
        shared = jobs.adapted_feedforward * mixture * (jobs.shared_width > 0)
        found += both(jobs.tokens, jobs.shared_width, one, shared)
    added = moved_by_adapters(jobs) / (jobs.memory_rate * c["memory"])
    return [*found, (added, added)]


def dequantise_time(jobs: Jobs, linear: Column, c: dict[str, float]) -> Column:
    """Seconds to make numbers to compute with of so many weights that rest in fewer bits, once."""
    moved = linear * (base_bytes(jobs) + jobs.weight_bytes) / (jobs.memory_rate * c["memory"])
    return np.where(base_bytes(jobs) < jobs.weight_bytes, moved, 0)
