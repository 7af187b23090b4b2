"""Quantisation-aware tuning: steps, norms and biases of a rounded model change until it guesses as the original does.

The original teaches by its own probabilities. Codes stay; each block of them learns a gain of its step (and of what is
added), as in the last phase of EfficientQAT (arXiv:2407.11062): continuous numbers, 1/32 of the weights or fewer, which
a few hundred gradients can better. Codes passed by straight-through (arXiv:1308.3432) only got worse in so few steps
(adapting.py moves them by another way); norms and biases learn a gain of each number too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from danlu.compress.quantizing.formats.grid import Grid
from danlu.compress.quantizing.formats.known import Format
from danlu.compress.quantizing.lesson import Lesson
from danlu.compress.quantizing.rounding import Rounded
from danlu.compress.quantizing.spool import Spool
from danlu.model.checkpoint import Checkpoint

RATE = 3e-4  # relative change of a number a step, rising at first, then falling to 0
FIRST, SECOND = 0.9, 0.95  # how slowly Adam's moments change
TINY = 1e-20


class Gains:
    """Factors that learn, by Adam (arXiv:1412.6980).

    Attributes:
        values: fp32 of the shape asked for, at first 1.
    """

    def __init__(self, *shape: int) -> None:
        self.values, self._steps = torch.ones(shape), 0
        self._first, self._second = torch.zeros(shape), torch.zeros(shape)

    def learn(self, gradient: Tensor, rate: float) -> None:
        """One step, given the gradient, fp32, as `values`."""
        self._steps += 1
        self._first.lerp_(gradient, 1 - FIRST)
        self._second.lerp_(gradient.square(), 1 - SECOND)
        spread = (self._second / (1 - SECOND**self._steps)).sqrt_().add_(TINY)
        self.values.addcdiv_(self._first, spread, value=-rate / (1 - FIRST**self._steps))


class LearnedMatrix:
    """A matrix in a format, of each of whose blocks the gain learns.

    Args:
        grids: of its blocks of columns, each of all rows.
        weight: fp32 [rows, columns], what it was rounded to.
    """

    def __init__(self, form: Format, grids: tuple[Grid, ...], weight: Tensor) -> None:
        self.form, self._grids = form, grids
        self._blocks = weight.view(len(weight), len(grids), -1)
        self._gains = Gains(len(weight), len(grids))

    def values(self) -> Tensor:
        """What it now stands for, fp32 [rows, columns]."""
        return (self._blocks * self._gains.values[..., None]).flatten(1)

    def learn(self, gradient: Tensor, rate: float) -> None:
        """One step, given the gradient of `values`, fp32."""
        self._gains.learn((gradient.view_as(self._blocks) * self._blocks).sum(-1), rate)

    def rounded(self) -> Rounded:
        """Its bytes, and the values that they stand for."""
        packed, values, grids = [], [], []
        for block, grid, gain in zip(self._blocks.unbind(1), self._grids, self._gains.values.split(1, 1), strict=True):
            codes, made = grid.codes(block), self.form.scaled(grid, gain)
            packed.append(self.form.pack(codes, made))
            values.append(made.values(codes))
            grids.append(made)
        return Rounded(torch.cat(packed, 1), torch.cat(values, 1), tuple(grids))


class LearnedVector:
    """A norm's weights or a bias, fp32 [n]."""

    def __init__(self, weight: Tensor) -> None:
        self._weight, self._gains = weight.clone(), Gains(len(weight))

    def values(self) -> Tensor:
        """What it now is."""
        return self._weight * self._gains.values

    def learn(self, gradient: Tensor, rate: float) -> None:
        """One step, given the gradient, fp32."""
        self._gains.learn(gradient * self._weight, rate)


def tune(checkpoint: Checkpoint, spool: Spool, rows: Tensor, steps: int, tick: Callable[[int, str], None]) -> None:
    """Tune the blocks of a rounded model, and its last norm; what they become replaces what lay in the spool.

    Args:
        checkpoint: the original.
        spool: with grids.
        rows: int64 [n, T], token ids.
        steps: of 4 rows; all rows are seen once before any is seen again.
        tick: told of every step, with the divergence from the original.
    """
    lesson, learned = Lesson(checkpoint, spool), _learned(spool)
    weights = {name: weight for name, weight in lesson.student.named_parameters() if name in learned}
    for weight in weights.values():
        weight.requires_grad_()
    for share, apart in lesson.steps(rows, steps):
        for name, one in learned.items():
            gradient = weights[name].grad
            assert gradient is not None, f"{name} has no gradient"
            one.learn(gradient.float(), RATE * share)
            weights[name].data.copy_(one.values())
            weights[name].grad = None
        tick(1, f"{apart:.4f} nat from the original")
    for name, one in learned.items():
        if isinstance(one, LearnedMatrix):
            spool.keep(name, one.rounded(), one.form, spool.shapes[name])
        else:
            spool.keep_exact(name, one.values())


def _learned(spool: Spool) -> dict[str, LearnedMatrix | LearnedVector]:
    """What learns: matrices of blocks, norms and biases."""
    made: dict[str, LearnedMatrix | LearnedVector] = {}
    for name, weight in spool.weights.items():
        form = spool.forms.get(name)
        if form is not None and name.startswith("blocks.") and len(spool.shapes[name]) == 2:
            made[name] = LearnedMatrix(form, spool.grids[name], spool.values(name))
        elif isinstance(weight, Tensor) and weight.dim() == 1:
            made[name] = LearnedVector(weight)
    return made
