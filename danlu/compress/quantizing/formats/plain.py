"""Formats of 32 weights that share one step in fp16: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL; and binary Q1_0, of 128."""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import torch
from torch import Tensor

from danlu.compress.quantizing.formats.bits import halves, interleave
from danlu.compress.quantizing.formats.grid import Grid, as_half, integers
from danlu.compress.quantizing.formats.scales import fit_step, fit_step_and_low

BLOCK = 32
UNEVEN = gguf.quants.IQ4_NL.kvalues  # levels of IQ4_NL


@dataclass(frozen=True)
class Plain:
    """One of these formats.

    Attributes:
        kind: GGML's name of it.
        levels: what its codes stand for, before the step.
        offset: each block also stores what is added.
    """

    kind: gguf.GGMLQuantizationType
    levels: Tensor
    offset: bool = False
    block: int = BLOCK

    def fit(self, x: Tensor, weight: Tensor) -> Grid:
        """The grid that loses least of fp32 [rows, block], each number's square error counting by `weight` (as x)."""
        if not self.offset:
            step = fit_step(x, weight, self.levels, as_half)[:, None]
            return Grid(self.levels, self.block, step, None, {})
        step, low = (as_half(each)[:, None] for each in fit_step_and_low(x, weight, len(self.levels) - 1, False))
        return Grid(self.levels, self.block, step, low, {})

    def scaled(self, grid: Grid, gain: Tensor) -> Grid:
        """A grid, its steps and lows times a gain, fp32 [rows, 1], as far as the file can hold them."""
        low = None if grid.low is None else as_half(grid.low * gain)
        return Grid(grid.levels, grid.part, as_half(grid.step * gain), low, {})

    def pack(self, codes: Tensor, grid: Grid) -> Tensor:
        """The block's bytes, uint8 [rows, size], of codes [rows, block]."""
        head = [halves(grid.step)] + ([] if grid.low is None else [halves(-grid.low)])
        if len(self.levels) == 256 - 1:
            return torch.cat([*head, (codes.int() - 127).to(torch.int8).view(torch.uint8)], dim=1)
        if len(self.levels) == 2:
            return torch.cat([*head, interleave(codes, 1, 1)], dim=1)
        if len(self.levels) == 32:
            head.append(interleave(codes >> 4, 1, 1))
        return torch.cat([*head, interleave(codes & 15, 4, 16)], dim=1)


Q4_0 = Plain(gguf.GGMLQuantizationType.Q4_0, integers(-8, 7))
Q5_0 = Plain(gguf.GGMLQuantizationType.Q5_0, integers(-16, 15))
Q8_0 = Plain(gguf.GGMLQuantizationType.Q8_0, integers(-127, 127))
Q4_1 = Plain(gguf.GGMLQuantizationType.Q4_1, integers(0, 15), offset=True)
Q5_1 = Plain(gguf.GGMLQuantizationType.Q5_1, integers(0, 31), offset=True)
IQ4_NL = Plain(gguf.GGMLQuantizationType.IQ4_NL, torch.tensor(UNEVEN, dtype=torch.float32))
Q1_0 = Plain(gguf.GGMLQuantizationType.Q1_0, torch.tensor([-1.0, 1.0]), block=128)
