"""Rounding a matrix to a number format, number by number or so that its outputs change least.

Steps of a block are chosen when it is its turn, from the weights as they then are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from danlu.compress.compensate import Choice, Inputs, compensate
from danlu.compress.quantizing.formats.grid import Form, Grid


@dataclass(frozen=True)
class Rounded:
    """A matrix in a format.

    Attributes:
        packed: its bytes, uint8 [rows, bytes of a row].
        values: what they stand for, fp32 [rows, columns].
        grids: of each of its blocks of columns.
    """

    packed: Tensor
    values: Tensor
    grids: tuple[Grid, ...]


def round_in_place(weight: Tensor, rows: int, way: Callable[[Tensor], Rounded]) -> Rounded:
    """Round so many rows at a time, which do not know of each other, and put what they become into the weight itself.

    Args: weight: fp32 [rows, columns].
    """
    packed, grids = [], []
    for piece in weight.split(rows):
        rounded = way(piece)
        piece.copy_(rounded.values)
        packed.append(rounded.packed)
        grids.append(rounded.grids)
    joined = tuple(Grid.joined(blocks) for blocks in zip(*grids, strict=True))
    return Rounded(torch.cat(packed), weight, joined)


def round_plainly(weight: Tensor, form: Form, importance: Tensor | None = None) -> Rounded:
    """Each number to the nearest value, with steps that lose least of `importance`, fp32 [columns], times the square.

    Args: weight: fp32 [rows, columns]; columns fill the format's blocks.
    """
    important = torch.ones(weight.shape[1]) if importance is None else importance
    packed, values, grids = [], [], []
    for start in range(0, weight.shape[1], form.block):
        part = weight[:, start : start + form.block]
        grid = form.fit(part, important[start : start + form.block].expand_as(part))
        codes = grid.codes(part)
        packed.append(form.pack(codes, grid))
        values.append(grid.values(codes))
        grids.append(grid)
    return Rounded(torch.cat(packed, dim=1), torch.cat(values, dim=1), tuple(grids))


def round_compensated(weight: Tensor, form: Form, inputs: Inputs) -> Rounded:
    """Rounded column by column, the error of each made up for by those after it.

    Args: weight: fp32 [rows, columns]; columns fill the format's blocks.
    """
    rounds: list[_Round] = []

    def begin(start: int, part: Tensor) -> Choice:
        grid = form.fit(part, inputs.importance[start : start + form.block].expand_as(part))
        rounds.append(_Round(grid, torch.empty(part.shape[1], part.shape[0], dtype=torch.uint8)))
        return rounds[-1]

    values = compensate(inputs.aim(weight), inputs, form.block, begin)
    packed = [form.pack(each.codes.T.contiguous(), each.grid) for each in rounds]
    return Rounded(torch.cat(packed, dim=1), values, tuple(each.grid for each in rounds))


@dataclass(frozen=True)
class _Round:
    """A block that is being rounded: `codes`, uint8 [block, rows], are noted as its columns come."""

    grid: Grid
    codes: Tensor

    def __call__(self, column: int, x: Tensor) -> Tensor:
        codes = self.grid.codes(x[:, None], column)
        self.codes[column] = codes[:, 0]
        return self.grid.values(codes, column)[:, 0]
