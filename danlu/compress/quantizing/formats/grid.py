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

    def codes(self, x: Tensor) -> Tensor:
        """The nearest codes, uint8 [rows, n], of fp32 [rows, n]: the block's first columns."""
        step, low = self._columns(x.shape[1])
        return self.code((x if low is None else x + low).mul(inverse(step)))

    def values(self, codes: Tensor) -> Tensor:
        """What codes [rows, n] stand for, fp32: to the bit what the gguf package reads."""
        step, low = self._columns(codes.shape[1])
        made = step * self.level(codes)
        return made if low is None else made - low

    def to_levels(self, scaled: Tensor) -> Tensor:
        """The levels nearest to fp32 numbers, which are overwritten."""
        return to_levels(scaled, self.levels)

    def level(self, codes: Tensor) -> Tensor:
        """The levels of codes, fp32."""
        return codes + self.levels[0] if _is_even(self.levels) else self.levels[codes.int()]

    def code(self, scaled: Tensor) -> Tensor:
        """The codes, uint8, of the levels nearest to fp32 numbers, which are overwritten."""
        return nearest(scaled, self.levels)

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

    def _columns(self, count: int) -> tuple[Tensor, Tensor | None]:
        if self.step.shape[1] == 1:
            return self.step, self.low
        parts = torch.arange(count, device=self.step.device) // self.part
        return self.step[:, parts], None if self.low is None else self.low[:, parts]


class Columns:
    """A block's columns as they are rounded one after another; each lies in one piece.

    Attributes:
        values: what they have become, fp32 [columns, rows].
    """

    def __init__(self, grid: Grid, count: int) -> None:
        self._grid = grid
        self._step = grid.step.T.contiguous()
        self._inverse = inverse(self._step)
        self._low = None if grid.low is None else grid.low.T.contiguous()
        self._levels = torch.empty(count, len(grid.step))
        self.values = torch.empty_like(self._levels)

    def put(self, column: int, x: Tensor) -> Tensor:
        """Round fp32 [rows] to the nearest values of a column, and return these."""
        part, levels, values = column // self._grid.part, self._levels[column], self.values[column]
        if self._low is not None:
            x = torch.add(x, self._low[part], out=values)
        levels.copy_(self._grid.to_levels(torch.mul(x, self._inverse[part], out=levels)))
        torch.mul(levels, self._step[part], out=values)
        return values if self._low is None else values.sub_(self._low[part])

    def codes(self) -> Tensor:
        """Of all columns, uint8 [columns, rows]."""
        return self._grid.code(self._levels.clone())


class Form(Protocol):
    """What numbers are rounded to, `block` columns at a time, whose grid is fitted first."""

    @property
    def block(self) -> int: ...

    def fit(self, x: Tensor, weight: Tensor) -> Grid: ...

    def scaled(self, grid: Grid, gain: Tensor) -> Grid: ...

    def pack(self, codes: Tensor, grid: Grid) -> Tensor: ...


def inverse(step: Tensor) -> Tensor:
    """What numbers are multiplied by to be compared with levels; 0 where the step is none, so that the level is 0."""
    return step.reciprocal().nan_to_num_(0.0, 0.0, 0.0)


def to_levels(scaled: Tensor, levels: Tensor) -> Tensor:
    """The levels nearest to fp32 numbers, which are overwritten."""
    if _is_even(levels):
        return scaled.round_().clamp_(float(levels[0]), float(levels[-1]))
    return _look_up(scaled, levels, levels[_nearest_to_halves(levels).int()])


def nearest(scaled: Tensor, levels: Tensor) -> Tensor:
    """The codes, uint8, of the levels nearest to fp32 numbers, which are overwritten."""
    if _is_even(levels):
        return to_levels(scaled, levels).sub_(levels[0]).to(torch.uint8)
    return _look_up(scaled, levels, _nearest_to_halves(levels))


def _look_up(scaled: Tensor, levels: Tensor, table: Tensor) -> Tensor:
    """What a table of halves from the lowest level on says of numbers, which are overwritten."""
    low, high = 2 * float(levels[0]), 2 * float(levels[-1])
    place = scaled.mul_(2).floor_().clamp_(low, high).sub_(low).int()
    return table.index_select(0, place.view(-1)).view(place.shape)


@lru_cache  # tensors are told apart by which they are, not by what they hold; formats have few
def _nearest_to_halves(levels: Tensor) -> Tensor:
    """Codes, uint8, of the levels nearest to what lies in each half from the lowest to the highest.

    Borders between whole levels lie on halves, so that such a table finds what a search would, sooner.
    """
    halves = torch.arange(int(2 * (levels[-1] - levels[0])) + 1) / 2 + levels[0] + 0.25
    return torch.bucketize(halves, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


@lru_cache
def _is_even(levels: Tensor) -> bool:
    """Whether neighbours are 1 apart."""
    return float(levels[-1] - levels[0]) == len(levels) - 1


def integers(low: int, high: int) -> Tensor:
    """Levels from `low` to `high`, fp32."""
    return torch.arange(low, high + 1, dtype=torch.float32)


def as_half(x: Tensor) -> Tensor:
    """fp32 as fp16 can hold it."""
    return x.half().float()
