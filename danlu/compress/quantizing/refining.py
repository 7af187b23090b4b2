"""Rounded once more, now that all of a matrix is rounded: each block's steps, then each code, given all the others.

Rounding column by column knows nothing of what comes later. Here a block's step becomes the least-squares one for its
codes and each code the best one for the rest of its row, turn by turn: coordinate descent on the sum of squares that
the outputs lose (QuantEase, arXiv:2309.01885, for codes), so that no turn makes it larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from danlu.compress.compensate import Inputs
from danlu.compress.quantizing.formats.grid import Columns, Form, Grid

TOGETHER = 32  # columns whose changes those after them learn of at once
FURTHEST = 0.5  # a gain is never further from 1: beyond, codes do not fit their steps


@dataclass(frozen=True)
class Block:
    """A block of columns as it is rounded.

    Attributes:
        grid: of its rows.
        codes: uint8 [block, rows]: a column lies in one piece.
    """

    grid: Grid
    codes: Tensor

    @property
    def values(self) -> Tensor:
        """What its codes stand for, fp32 [block, rows]."""
        return self.grid.values(self.codes.T).T.contiguous()


def refine(blocks: Sequence[Block], aim: Tensor, form: Form, inputs: Inputs, passes: int) -> list[Block]:
    """The blocks of a matrix, nearer to what it is to be.

    Args:
        aim: fp32 [rows, columns].
        inputs: whose products say what errors cost.
        passes: through all columns.
    """
    made = list(blocks)
    wanted = aim.T.contiguous()
    errors = torch.cat([each.values for each in made]) - wanted
    for _ in range(passes):
        for number, start in enumerate(range(0, len(wanted), form.block)):
            part = slice(start, start + form.block)
            products = inputs.products(part.start, min(part.stop, len(wanted)))
            within, pull = products[:, part], products @ errors
            scaled = _scaled(made[number], form, within, pull)
            pull += within @ (scaled.values - made[number].values)
            made[number] = _coded(scaled, within, pull)
            errors[part] = made[number].values - wanted[part]
    return made


def _scaled(block: Block, form: Form, within: Tensor, pull: Tensor) -> Block:
    """The block with better steps for its codes, in rows where the file can hold them.

    Args:
        within: fp32 [block, block], the products of its columns.
        pull: fp32 [block, rows], half the gradient of what is lost.
    """
    values = block.values
    along, curve = (values * pull).sum(0), (values * (within @ values)).sum(0)
    gain = torch.where(curve > 0, 1 - along / curve, 1.0).clamp(1 - FURTHEST, 1 + FURTHEST)
    change = form.scaled(block.grid, gain[:, None]).values(block.codes.T).T - values
    better = (change * (2 * pull + within @ change)).sum(0) < 0
    return Block(form.scaled(block.grid, torch.where(better, gain, 1.0)[:, None]), block.codes)


def _coded(block: Block, within: Tensor, pull: Tensor) -> Block:
    """The block with better codes for its steps; for the arguments see `_scaled`. `pull` is used up."""
    values = block.values
    columns, change = Columns(block.grid, len(values)), torch.empty_like(values)
    inverse = (-1 / within.diagonal()).tolist()
    for start in range(0, len(values), TOGETHER):
        end = min(start + TOGETHER, len(values))
        for column in range(start, end):
            best = torch.add(values[column], pull[column], alpha=inverse[column], out=change[column])
            torch.sub(columns.put(column, best), values[column], out=change[column])
            pull[column + 1 : end].addr_(within[column, column + 1 : end], change[column])
        pull[end:].addmm_(within[end:, start:end], change[start:end])
    return Block(block.grid, columns.codes())
