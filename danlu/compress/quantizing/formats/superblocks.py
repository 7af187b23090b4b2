"""Formats of 256 weights in parts whose steps are numbers of few bits themselves: Q2_K to Q6_K, and ternary TQ2_0.

Two levels of scales (K-quants of llama.cpp): a part's step is a small whole number times the block's, which is fp16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import gguf
import torch
from torch import Tensor

from danlu.compress.quantizing.formats.bits import halves, interleave, six_bits, sixteen_of_six_bits
from danlu.compress.quantizing.formats.grid import Grid, as_half, integers, inverse, nearest
from danlu.compress.quantizing.formats.scales import fit_step, fit_step_and_low

BLOCK = 256


@dataclass(frozen=True)
class Super:
    """One of these formats.

    Attributes:
        kind: GGML's name of it.
        levels: what its codes stand for, before the step.
        part: columns that share a step.
        steps: what a part's step can be, before the block's.
        lows: the same of what is subtracted; None where nothing is.
    """

    kind: gguf.GGMLQuantizationType
    levels: Tensor
    part: int
    steps: Tensor
    lows: Tensor | None = None
    block: int = BLOCK

    def fit(self, x: Tensor, weight: Tensor) -> Grid:
        """The grid that loses least of fp32 [rows, 256], each number's square error counting by `weight` (as x)."""
        rows, parts = len(x), BLOCK // self.part
        numbers, weights = x.reshape(-1, self.part), weight.reshape(-1, self.part)
        if self.lows is None:
            step, low = fit_step(numbers, weights, self.levels, lambda step: step), None
        else:
            step, low = fit_step_and_low(numbers, weights, len(self.levels) - 1, True)
        total = weights.sum(1).view(rows, parts)
        unit, step_codes = _shared(step.view(rows, parts), total, self.steps)
        stored = {"unit": unit, "steps": step_codes}
        if low is None or self.lows is None:
            return self._grid(stored)
        low_unit, low_codes = _shared(low.view(rows, parts), total, self.lows)
        return self._grid(stored | {"low_unit": low_unit, "lows": low_codes})

    def scaled(self, grid: Grid, gain: Tensor) -> Grid:
        """A grid, its steps and lows times a gain, fp32 [rows, 1], as far as the file can hold them."""
        units = {name: as_half(grid.stored[name] * gain) for name in ("unit", "low_unit") if name in grid.stored}
        return self._grid({**grid.stored, **units})

    def _grid(self, stored: Mapping[str, Tensor]) -> Grid:
        """What is stored, read as a reader of the file does."""
        steps = stored["unit"] * self.steps[stored["steps"].int()]
        lows = None if self.lows is None else stored["low_unit"] * self.lows[stored["lows"].int()]
        return Grid(self.levels, self.part, steps, lows, stored)

    def pack(self, codes: Tensor, grid: Grid) -> Tensor:
        """The block's bytes, uint8 [rows, size], of codes [rows, 256]."""
        unit, steps = halves(grid.stored["unit"]), grid.stored["steps"]
        match self.kind.name:
            case "Q2_K":
                scales = steps | grid.stored["lows"] << 4
                return torch.cat([scales, interleave(codes, 2, 32), unit, halves(grid.stored["low_unit"])], dim=1)
            case "Q3_K":
                low = interleave(codes & 3, 2, 32)
                return torch.cat([interleave(codes >> 2, 1, 32), low, sixteen_of_six_bits(steps), unit], dim=1)
            case "Q4_K" | "Q5_K":
                head = [unit, halves(grid.stored["low_unit"]), six_bits(steps, grid.stored["lows"])]
                fifth = [interleave(codes >> 4, 1, 32)] if self.kind.name == "Q5_K" else []
                return torch.cat([*head, *fifth, interleave(codes & 15, 4, 32)], dim=1)
            case "Q6_K":
                scales = (steps.int() - 128).to(torch.int8).view(torch.uint8)
                return torch.cat([interleave(codes & 15, 4, 64), interleave(codes >> 4, 2, 32), scales, unit], dim=1)
        return torch.cat([interleave(codes, 2, 32), unit], dim=1)


def _shared(wanted: Tensor, weight: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """One unit a row, fp32 [rows, 1] as stored, and codes, uint8 [rows, parts], of what is wanted, [rows, parts]."""
    unit = fit_step(wanted, weight, levels, as_half)[:, None]
    return unit, nearest(wanted * inverse(unit), levels)


_KIND = gguf.GGMLQuantizationType
Q2_K = Super(_KIND.Q2_K, integers(0, 3), 16, integers(0, 15), integers(0, 15))
Q3_K = Super(_KIND.Q3_K, integers(-4, 3), 16, integers(-32, 31))
Q4_K = Super(_KIND.Q4_K, integers(0, 15), 32, integers(0, 63), integers(0, 63))
Q5_K = Super(_KIND.Q5_K, integers(0, 31), 32, integers(0, 63), integers(0, 63))
Q6_K = Super(_KIND.Q6_K, integers(-32, 31), 16, integers(-128, 127))
TQ2_0 = Super(_KIND.TQ2_0, integers(-1, 1), BLOCK, integers(1, 1))
