"""Changing the columns of a matrix one after another, while those still to come make up for what its outputs lose.

The least-squares answer, given how inputs go together (OBQ, arXiv:2208.11580; GPTQ, arXiv:2210.17323; SparseGPT,
arXiv:2301.00774). What a column is changed to, to a number of few bits or to 0, is the caller's choice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean square of an input, added to every one: inputs never seen still count a little
# The same where numbers are rounded and all that is lost is small: how inputs of one text go together then counts less
# than it did there. With 16,384 tokens errors on other texts are 4 to 8 % smaller than with 0.01.
ROUNDING = 0.2
CAUTION = 0.5  # of the same, where weights themselves are fitted to the inputs seen

TOGETHER = 32  # columns of a block whose errors those after them learn of at once

Choice = Callable[[int, Tensor], Tensor]  # from a block's column and fp32 [rows] to what stands for it, fp32 [rows]


class Inputs:
    """What a layer's inputs say about its weights.

    Args:
        products: fp32 [columns, columns], the sum over calibration tokens of the inputs' products; damped in place.
        drift: the same of (inputs in the original model - inputs) with the inputs; used up. None for nothing.
        damping: of the products.

    Attributes:
        products: fp32 [columns, columns], damped.
        ridge: what damping added to every square.
        importance: fp32 [columns], the damped sum of squares.
        factor: fp32 [columns, columns], the upper Cholesky factor of the inverse of the damped products.
        shift: fp32 [columns, columns] or None; see `aim`.
    """

    def __init__(self, products: Tensor, drift: Tensor | None = None, damping: float = DAMPING) -> None:
        # Matrices of this size are the largest things in memory: each takes the place of the one before it.
        self.shift = None if drift is None else _solved(products, drift.T).T
        self.products, self.ridge = products, _damp(products, damping)
        self.importance = self.products.diagonal().clone()
        inverse = torch.linalg.cholesky(self.products)
        torch.cholesky_inverse(inverse, out=inverse)
        self.factor = torch.linalg.cholesky(inverse, upper=True, out=inverse)

    def aim(self, weight: Tensor) -> Tensor:
        """The weights, fp32 [rows, columns], that best give from these inputs what the given ones gave in the original.

        With inputs x there and y here, min_V sum |V y - W x|^2 is at V = W + W (sum (x - y) y^T) (sum y y^T)^-1. What
        is left does not depend on how V is rounded, so that V is what rounding has to come near to: the asymmetric
        calibration of GPTAQ (arXiv:2504.02692), in closed form. It is damped towards W far more than the rounding is,
        as tokens that were not looked at drift otherwise.
        """
        return weight if self.shift is None else torch.addmm(weight, weight, self.shift)


def _solved(products: Tensor, sought: Tensor) -> Tensor:
    """The inverse of cautiously damped products times a matrix, in whose place it is put; fp32 [columns, columns]."""
    damped = products.clone()
    _damp(damped, CAUTION)
    lower = torch.linalg.cholesky(damped, out=damped)
    torch.linalg.solve_triangular(lower, sought, upper=False, out=sought)
    return torch.linalg.solve_triangular(lower.mT, sought, upper=True, out=sought)


def _damp(products: Tensor, share: float) -> float:
    """Add a share of their mean square to every square in place. Returns what was added."""
    ridge = share * float(products.diagonal().mean().clamp(min=1e-12))
    products.diagonal().add_(ridge)
    return ridge


def compensate(weight: Tensor, inputs: Inputs, block: int, begin: Callable[[int, Tensor], Choice]) -> Tensor:
    """What stands for a matrix, fp32 [rows, columns].

    Args:
        weight: fp32 [rows, columns].
        block: columns that are decided about together.
        begin: from a block's first column and its weights as they then are, fp32 [rows, block], to the choice of each.
    """
    left, factor = weight.clone(), inputs.factor
    made = torch.empty_like(left)
    for start in range(0, weight.shape[1], block):
        end = min(start + block, weight.shape[1])
        part = left[:, start:end]
        made[:, start:end], errors = _one_block(part, begin(start, part), factor[start:end, start:end])
        left[:, end:] -= errors @ factor[start:end, end:]
    return made


def _one_block(part: Tensor, choice: Choice, factor: Tensor) -> tuple[Tensor, Tensor]:
    """What stands for a block, and the errors that those after it make up for, each fp32 [rows, block].

    The sum of the errors' squares is what the outputs lose once they are made up for.

    Args: part: fp32 [rows, block]; factor: fp32 [block, block], the inputs' factor for its columns.
    """
    left = part.T.contiguous()  # a column lies in one piece
    made, errors = torch.empty_like(left), torch.empty_like(left)
    diagonal = factor.diagonal().tolist()
    for start in range(0, len(left), TOGETHER):
        end = min(start + TOGETHER, len(left))
        for column in range(start, end):
            made[column] = choice(column, left[column])
            torch.sub(left[column], made[column], out=errors[column]).div_(diagonal[column])
            left[column + 1 : end].addr_(factor[column, column + 1 : end], errors[column], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors[start:end], alpha=-1)
    return made.T, errors.T
