"""Numbers of few bits times a step that a run of columns, or a whole row, shares: what compressed-tensors stores.

Whole numbers of any bits, symmetric around 0, and floats of 8 bits (e4m3, arXiv:2209.05433).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from danlu.compress.quantizing.formats.grid import Grid, integers
from danlu.compress.quantizing.formats.scales import fit_step

FLOAT8 = torch.float8_e4m3fn
AT_ONCE = 128  # columns of a whole row's step that are decided about together


@dataclass(frozen=True)
class Grouped:
    """One of these formats.

    Attributes:
        bits: of a number.
        group: columns that share a step; None for whole rows.
        dtype: of the steps as they are stored.
        floating: numbers are floats of 8 bits.
    """

    bits: int
    group: int | None
    dtype: torch.dtype = torch.float16
    floating: bool = False

    @property
    def levels(self) -> Tensor:
        """What codes stand for, before the step; of floats, where those of largest size are."""
        if self.floating:
            return torch.tensor([torch.finfo(FLOAT8).min, torch.finfo(FLOAT8).max])
        return integers(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)

    def for_matrix(self, weight: Tensor, importance: Tensor) -> Grouped | Rows:
        """What rounds a matrix: where whole rows share a step, it is chosen before the first column is rounded."""
        if self.group is not None:
            return self
        return Rows(replace(self, group=weight.shape[1]).fit(weight, importance.expand_as(weight)))

    @property
    def block(self) -> int:
        """Columns that share a step."""
        assert self.group is not None
        return self.group

    def fit(self, x: Tensor, weight: Tensor) -> Grid:
        """The grid that loses least of fp32 [rows, group], each number's square error counting by `weight` (as x)."""
        if self.floating:
            return FloatGrid(self.levels, self.block, self._stored(x.abs().amax(1) / self.levels[1])[:, None], None, {})
        step = fit_step(x, weight, self.levels, self._stored)
        return Grid(self.levels, self.block, step[:, None], None, {})

    def scaled(self, grid: Grid, gain: Tensor) -> Grid:
        """A grid, its steps times a gain, fp32 [rows, 1], as far as the file can hold them."""
        return replace(grid, step=self._stored(grid.step * gain))

    def pack(self, codes: Tensor, grid: Grid) -> Tensor:
        """A byte a code; they are packed once a whole matrix is there, and its grids have the steps."""
        return codes

    def _stored(self, step: Tensor) -> Tensor:
        return step.to(self.dtype).float()


@dataclass(frozen=True)
class Rows:
    """A format whose steps, one a row, are already chosen."""

    grid: Grid
    block: int = AT_ONCE

    def fit(self, x: Tensor, weight: Tensor) -> Grid:
        """The grid of the rows, whatever block of theirs is meant."""
        return replace(self.grid, part=self.block)

    def scaled(self, grid: Grid, gain: Tensor) -> Grid:
        """The grid as it is: other blocks have the same steps."""
        return grid

    def pack(self, codes: Tensor, grid: Grid) -> Tensor:
        """A byte a code."""
        return codes


@dataclass(frozen=True)
class FloatGrid(Grid):
    """A grid whose numbers are floats of 8 bits: a code is the byte of one."""

    def to_levels(self, scaled: Tensor) -> Tensor:
        """The floats nearest to fp32 numbers."""
        return self._floats(scaled).float()

    def level(self, codes: Tensor) -> Tensor:
        """The floats of codes, fp32."""
        return codes.view(FLOAT8).float()

    def code(self, scaled: Tensor) -> Tensor:
        """The bytes of the floats nearest to fp32 numbers."""
        return self._floats(scaled).view(torch.uint8)

    def _floats(self, scaled: Tensor) -> Tensor:
        top = float(self.levels[1])
        return scaled.clamp(-top, top).to(FLOAT8)
