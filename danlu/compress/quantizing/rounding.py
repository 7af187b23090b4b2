"""Rounding a matrix to a number format, number by number or so that its outputs change least.

Steps of a block are chosen when it is its turn, from the weights as they then are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from danlu.compress.compensate import Choice, Inputs, compensate
from danlu.compress.quantizing.formats.grid import Columns, Form, Grid
from danlu.compress.quantizing.refining import Block, refine
from danlu.train.memory import give_back

FINE = 2**7  # levels, from which on errors are too small to be worth refining
PASSES = 2  # of refining: four lose 2 % less than two in one and a half times as long


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

    def rows(self, chosen: slice) -> Rounded:
        """Some of its rows."""
        return Rounded(self.packed[chosen], self.values[chosen], tuple(grid.rows(chosen) for grid in self.grids))


def round_in_place(weight: Tensor, rows: int, way: Callable[[Tensor, slice], Rounded]) -> Rounded:
    """Round so many rows at a time, which do not know of each other, and put what they become into the weight itself.

    Args: weight: fp32 [rows, columns]; way: from some rows, and which these are.
    """
    packed, grids = [], []
    for start in range(0, len(weight), rows):
        some = slice(start, start + rows)
        piece = weight[some]
        rounded = way(piece, some)
        piece.copy_(rounded.values)
        packed.append(rounded.packed)
        grids.append(rounded.grids)
        if len(weight) > rows:
            give_back()  # what is kept lies between what was freed
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


def round_compensated(weight: Tensor, form: Form, inputs: Inputs, passes: int = PASSES) -> Rounded:
    """Rounded column by column, the error of each made up for by those after it, and refined.

    Args: weight: fp32 [rows, columns]; columns fill the format's blocks. passes: of refining, where steps are coarse.
    """
    aim, grids, columns = inputs.aim(weight), list[Grid](), list[Columns]()

    def begin(start: int, part: Tensor) -> Choice:
        grids.append(form.fit(part, inputs.importance[start : start + form.block].expand_as(part)))
        columns.append(Columns(grids[-1], part.shape[1]))
        return columns[-1].put

    compensate(aim, inputs, form.block, begin)
    blocks = [Block(grid, rounded.codes()) for grid, rounded in zip(grids, columns, strict=True)]
    worth = passes if len(grids[0].levels) < FINE else 0
    return _rounded(refine(blocks, aim, form, inputs, worth), form)


def round_again(weight: Tensor, form: Form, inputs: Inputs | None, values: Tensor, grids: Sequence[Grid]) -> Rounded:
    """What is rounded already, refined towards other weights; where no inputs are known, as it is.

    Args: weight: fp32 [rows, columns]; values: what it is now, as `weight`; grids: of its blocks of columns.
    """
    parts = zip(grids, values.split(form.block, 1), strict=True)
    blocks = [Block(grid, grid.codes(part).T.contiguous()) for grid, part in parts]
    if inputs is None:
        return _rounded(blocks, form)
    return _rounded(refine(blocks, inputs.aim(weight), form, inputs, PASSES), form)


def _rounded(blocks: Sequence[Block], form: Form) -> Rounded:
    packed = [form.pack(each.codes.T.contiguous(), each.grid) for each in blocks]
    values = torch.cat([each.values for each in blocks]).T.contiguous()
    return Rounded(torch.cat(packed, dim=1), values, tuple(each.grid for each in blocks))
