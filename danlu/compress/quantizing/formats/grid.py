"""The values that a run of weights may take once its scales are chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Of one block of a format, for many rows at once: a code c of part p stands for step[p] * levels[c] - low[p].

    Attributes:
        levels: fp32 [L], ascending.
        part: columns that share a step.
        step: fp32 [rows, parts], bit for bit what a reader of the file computes.
        low: the same, of what is subtracted; None for nothing.
        stored: what of it goes into the file, for the format that made it.
    """

    levels: Tensor
    part: int
    step: Tensor
    low: Tensor | None
    stored: Mapping[str, Tensor]

    def codes(self, x: Tensor, start: int = 0) -> Tensor:
        """The nearest codes, uint8 [rows, n], of fp32 [rows, n]: the block's columns from `start` on."""
        step, low = self._columns(start, x.shape[1])
        return nearest(x if low is None else x + low, step, self.levels)

    def values(self, codes: Tensor, start: int = 0) -> Tensor:
        """What codes [rows, n] stand for, fp32: to the bit what the gguf package reads."""
        step, low = self._columns(start, codes.shape[1])
        made = step * self.levels[codes.int()]
        return made if low is None else made - low

    def rows(self, chosen: slice) -> Grid:
        """The grid of some of its rows."""
        low = None if self.low is None else self.low[chosen]
        stored = {name: each[chosen] for name, each in self.stored.items()}
        return replace(self, step=self.step[chosen], low=low, stored=stored)

    @staticmethod
    def joined(grids: Sequence[Grid]) -> Grid:
        """One grid of all rows of several of one format."""
        first = grids[0]
        low = None if first.low is None else torch.cat([grid.low for grid in grids if grid.low is not None])
        stored = {name: torch.cat([grid.stored[name] for grid in grids]) for name in first.stored}
        return replace(first, step=torch.cat([grid.step for grid in grids]), low=low, stored=stored)

    def _columns(self, start: int, count: int) -> tuple[Tensor, Tensor | None]:
        if self.step.shape[1] == 1:
            return self.step, self.low
        parts = torch.arange(start, start + count, device=self.step.device) // self.part
        return self.step[:, parts], None if self.low is None else self.low[:, parts]


class Form(Protocol):
    """What numbers are rounded to, `block` columns at a time, whose grid is fitted first."""

    @property
    def block(self) -> int: ...

    def fit(self, x: Tensor, weight: Tensor) -> Grid: ...

    def scaled(self, grid: Grid, gain: Tensor) -> Grid: ...

    def pack(self, codes: Tensor, grid: Grid) -> Tensor: ...


def nearest(x: Tensor, step: Tensor, levels: Tensor) -> Tensor:
    """Codes, uint8, of the levels nearest to x / step; where the step is 0, of the level nearest to 0."""
    scaled = torch.where(step == 0, 0.0, x / step)
    if _is_even(levels):
        codes = torch.round(scaled - levels[0]).clamp_(0, len(levels) - 1)
        return codes.to(torch.uint8)
    # Borders between whole levels lie on halves, so that one table of halves finds what a search would, sooner.
    low, high = 2 * levels[0], 2 * levels[-1]
    halves = torch.arange(int(high - low) + 1) / 2 + levels[0] + 0.25
    table = torch.bucketize(halves, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return table[(torch.floor(2 * scaled).clamp_(low, high) - low).int()]


@lru_cache  # tensors are told apart by which they are, not by what they hold; formats have few
def _is_even(levels: Tensor) -> bool:
    """Whether neighbours are 1 apart."""
    return float(levels[-1] - levels[0]) == len(levels) - 1


def integers(low: int, high: int) -> Tensor:
    """Levels from `low` to `high`, fp32."""
    return torch.arange(low, high + 1, dtype=torch.float32)


def as_half(x: Tensor) -> Tensor:
    """fp32 as fp16 can hold it."""
    return x.half().float()
