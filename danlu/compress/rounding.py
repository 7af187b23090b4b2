"""Rounding a matrix to a format so that its outputs, not its weights, change least.

Columns are rounded one after another, and what rounding one of them does to the outputs is made up for by the columns
that are still to come: the least-squares answer, given how inputs go together (OBQ, arXiv:2208.11580; GPTQ,
arXiv:2210.17323). Steps of a block are chosen when it is its turn, from the weights as they then are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from danlu.compress.formats.grid import Grid
from danlu.compress.formats.known import Format

DAMPING = 0.01  # of the mean square of an input, added to every one: inputs never seen still count a little


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


class Inputs:
    """What a layer's inputs say about its weights.

    Args:
        products: fp32 [columns, columns], the sum over calibration tokens of the inputs' products; used up here, as
            three matrices of this size at a time would be the largest thing in memory.

    Attributes:
        importance: fp32 [columns], the damped sum of squares.
        factor: fp32 [columns, columns], the upper Cholesky factor of the inverse of the damped products.
    """

    def __init__(self, products: Tensor) -> None:
        products.diagonal().add_(DAMPING * products.diagonal().mean().clamp(min=1e-12))
        self.importance = products.diagonal().clone()
        lower = torch.linalg.cholesky(products, out=products)
        self.factor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def round_compensated(weight: Tensor, form: Format, inputs: Inputs) -> Rounded:
    """Rounded column by column, the error of each made up for by those after it.

    Args: weight: fp32 [rows, columns]; columns fill the format's blocks.
    """
    left, factor = weight.clone(), inputs.factor
    packed, values = [], []
    for start in range(0, weight.shape[1], form.block):
        end = start + form.block
        part = left[:, start:end]
        grid = form.fit(part, inputs.importance[start:end].expand_as(part))
        codes, made, errors = _one_block(part, grid, factor[start:end, start:end])
        left[:, end:] -= errors @ factor[start:end, end:]
        packed.append(form.pack(codes, grid))
        values.append(made)
    return Rounded(torch.cat(packed, dim=1), torch.cat(values, dim=1))


def _one_block(part: Tensor, grid: Grid, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, values and scaled errors of a block, each [rows, block]."""
    left = part.T.contiguous()  # a column lies in one piece
    codes = torch.empty(left.shape, dtype=torch.uint8)
    values, errors = torch.empty_like(left), torch.empty_like(left)
    for column in range(len(left)):
        code = grid.codes(left[column, :, None], column)
        codes[column], values[column] = code[:, 0], grid.values(code, column)[:, 0]
        errors[column] = (left[column] - values[column]) / factor[column, column]
        left[column + 1 :].addr_(factor[column, column + 1 :], errors[column], alpha=-1)
    return codes.T.contiguous(), values.T, errors.T
