"""Rounding a matrix to a number format, number by number or so that its outputs change least.

Steps of a block are chosen when it is its turn, from the weights as they then are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from danlu.compress.compensate import Choice, Inputs, compensate
from danlu.compress.formats.grid import Grid
from danlu.compress.formats.known import Format


@dataclass(frozen=True)
class Rounded:
    """A matrix in a format.

    Attributes:
        packed: its bytes, uint8 [rows, bytes of a row].
        values: what they stand for, fp32 [rows, columns].
    """

    packed: Tensor
    values: Tensor


def round_plainly(weight: Tensor, form: Format, importance: Tensor | None = None) -> Rounded:
    """Each number to the nearest value, with steps that lose least of `importance`, fp32 [columns], times the square.

    Args: weight: fp32 [rows, columns]; columns fill the format's blocks.
    """
    important = torch.ones(weight.shape[1]) if importance is None else importance
    packed, values = [], []
    for start in range(0, weight.shape[1], form.block):
        part = weight[:, start : start + form.block]
        grid = form.fit(part, important[start : start + form.block].expand_as(part))
        codes = grid.codes(part)
        packed.append(form.pack(codes, grid))
        values.append(grid.values(codes))
    return Rounded(torch.cat(packed, dim=1), torch.cat(values, dim=1))


def round_compensated(weight: Tensor, form: Format, inputs: Inputs) -> Rounded:
    """Rounded column by column, the error of each made up for by those after it.

    Args: weight: fp32 [rows, columns]; columns fill the format's blocks.
    """
    rounds: list[_Round] = []

    def begin(start: int, part: Tensor) -> Choice:
        grid = form.fit(part, inputs.importance[start : start + form.block].expand_as(part))
        rounds.append(_Round(grid, torch.empty(part.shape[1], part.shape[0], dtype=torch.uint8)))
        return rounds[-1]

    values = compensate(weight, inputs, form.block, begin)
    packed = [form.pack(each.codes.T.contiguous(), each.grid) for each in rounds]
    return Rounded(torch.cat(packed, dim=1), values)


@dataclass(frozen=True)
class _Round:
    """A block that is being rounded: `codes`, uint8 [block, rows], are noted as its columns come."""

    grid: Grid
    codes: Tensor

    def __call__(self, column: int, x: Tensor) -> Tensor:
        codes = self.grid.codes(x[:, None], column)
        self.codes[column] = codes[:, 0]
        return self.grid.values(codes, column)[:, 0]
