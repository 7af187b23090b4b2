"""The steps of a grid that lose the least, by trying: each candidate rounds all numbers and is then fitted to them.

Losing is the sum of weight * (number - value)^2. With codes fixed the best step (and offset) is a weighted
least-squares fit, so that a candidate only has to find good codes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from danlu.compress.quantizing.formats.grid import inverse, to_levels

TRIED = 3  # candidates on either side of the plain choice
SPREAD = (
    0.3  # of one level, between candidates: 21 candidates 0.1 apart lose less by under 1 %, in three times the time
)


def fit_step(x: Tensor, weight: Tensor, levels: Tensor, store: Callable[[Tensor], Tensor]) -> Tensor:
    """A step for each row.

    Args:
        x: fp32 [rows, n].
        weight: fp32 [rows, n], not negative.
        levels: fp32 [L], ascending.
        store: what the file makes of steps, [rows].

    Returns: fp32 [rows], as stored.
    """
    peak = x.gather(1, x.abs().argmax(1, keepdim=True))[:, 0]
    x, weight = _by_column(x), _by_column(weight)
    pull = weight * x
    best = torch.full_like(peak, torch.inf)
    found = torch.zeros_like(peak)
    # Where the levels reach further down than up, the largest number may stand at either end.
    for end in {float(levels[0]), float(levels[-1])} - {0.0}:
        for place in range(-TRIED, TRIED + 1):
            step = peak / (end + SPREAD * place)
            values = to_levels(x * inverse(step), levels)
            along, norm = (pull * values).sum(0), values.square_().mul_(weight).sum(0)
            fitted = store(torch.where(norm > 0, along / norm, step))
            values = to_levels(x * inverse(fitted), levels)
            lost = values.mul_(fitted).sub_(x).square_().mul_(weight).sum(0)
            better = lost < best
            best, found = torch.where(better, lost, best), torch.where(better, fitted, found)
    return found


def fit_step_and_low(x: Tensor, weight: Tensor, top: int, below_zero: bool) -> tuple[Tensor, Tensor]:
    """A step and what is subtracted, for each row, of codes 0 to `top`.

    Args:
        x, weight: fp32 [rows, n].
        below_zero: the grid's lowest value may not be above 0.

    Returns: fp32 [rows] twice, not yet as stored.
    """
    x, weight = _by_column(x), _by_column(weight)
    least, most = x.amin(0), x.amax(0)
    if below_zero:
        least = least.clamp(max=0)
    best = torch.full_like(least, torch.inf)
    found, found_low = torch.zeros_like(least), -least
    levels = torch.arange(top + 1, dtype=torch.float32, device=x.device)
    for place in range(-TRIED, TRIED + 1):
        step, low = (most - least) / (top + SPREAD * place), -least
        for _ in range(2):
            step, low = _line(x, weight, to_levels((x + low).mul_(inverse(step)), levels), below_zero)
        values = to_levels((x + low).mul_(inverse(step)), levels)
        lost = values.mul_(step).sub_(low).sub_(x).square_().mul_(weight).sum(0)
        better = lost < best
        best = torch.where(better, lost, best)
        found, found_low = torch.where(better, step, found), torch.where(better, low, found_low)
    return found, found_low


def _line(x: Tensor, weight: Tensor, codes: Tensor, below_zero: bool) -> tuple[Tensor, Tensor]:
    """The weighted least-squares step and low of fixed codes: x ~ step * codes - low.

    Args: fp32 [n, rows]; weight may be the same for all rows, [n, 1].
    """
    heavy = weight * codes
    total, by_code, by_x = weight.sum(0), heavy.sum(0), (weight * x).sum(0)
    by_both, by_square = (heavy * x).sum(0), heavy.mul_(codes).sum(0)
    spread = total * by_square - by_code**2
    step = torch.where(spread > 0, (total * by_both - by_code * by_x) / spread, 0.0)
    low = torch.where(total > 0, (step * by_code - by_x) / total, 0.0)
    if below_zero:
        through_zero = torch.where(by_square > 0, by_both / by_square, 0.0)
        step, low = torch.where(low < 0, through_zero, step), low.clamp(min=0)
    return step.clamp(min=0), low


def _by_column(numbers: Tensor) -> Tensor:
    """fp32 [n, rows] of [rows, n], so that sums over n go along all rows at once; [n, 1] where all rows are one."""
    return numbers[:1].T if numbers.stride(0) == 0 else numbers.T.contiguous()
