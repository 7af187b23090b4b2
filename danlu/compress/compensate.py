"""Changing the columns of a matrix one after another, while those still to come make up for what its outputs lose.

The least-squares answer, given how inputs go together (OBQ, arXiv:2208.11580; GPTQ, arXiv:2210.17323; SparseGPT,
arXiv:2301.00774). What a column is changed to, to a number of few bits or to 0, is the caller's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from danlu.compress.parts import Parts

DAMPING = 0.01  # of the mean square of an input, added to every one: inputs never seen still count a little
# The same where numbers are rounded and all that is lost is small: how inputs of one text go together then counts less
# than it did there. With 16,384 tokens errors on other texts are 4 to 8 % smaller than with 0.01.
ROUNDING = 0.2
CAUTION = 0.5  # of the same, where weights themselves are fitted to the inputs seen

TOGETHER = 32  # columns of a block whose errors those after them learn of at once; rows of products that are read so
AIMED = 256  # rows of the shift that are read at once

Choice = Callable[[int, Tensor], Tensor]  # from a block's column and fp32 [rows] to what stands for it, fp32 [rows]


class Inputs:
    """What a layer's inputs say about its weights.

    Args:
        products: fp32 [columns, columns] in one piece, the sum over calibration tokens of the inputs' products.
            It is used up.
        drift: rows of the same of (inputs in the original model - inputs) with the inputs, some after some, a multiple
            of `AIMED` each but for the last; used up too, before the next are asked for. None for nothing.
        damping: of the products.

    Attributes:
        ridge: what damping added to every square.
        importance: fp32 [columns], the damped sum of squares.
        factor: fp32 [columns, columns], the upper Cholesky factor of the inverse of the damped products.
    """

    def __init__(self, products: Tensor, drift: Iterable[Tensor] | None = None, damping: float = DAMPING) -> None:
        # Matrices of this size are the largest things in memory, so that there is one: each takes the place of the one
        # before it, and the products themselves and the shift (see `aim`), which are only read in order, may lie in
        # files.
        self._rows = Parts(rows.clone() for rows in products.split(TOGETHER))
        self.ridge = _ridge(products, damping)
        self.importance = products.diagonal() + self.ridge
        self._shift: Parts | None = None
        if drift is not None:
            self._shift = Parts(rows.clone() for some in _solved(products, drift) for rows in some.split(AIMED))
            for rows, stored in zip(products.split(TOGETHER), self._rows, strict=True):
                rows.copy_(stored)
        products.diagonal().copy_(self.importance)
        columns = products.mT  # symmetric, and as LAPACK has it: nothing is copied
        torch.linalg.cholesky(columns, out=columns)
        torch.cholesky_inverse(columns, out=columns)
        self.factor = torch.linalg.cholesky(columns, upper=True, out=columns)

    def products(self, start: int, end: int) -> Tensor:
        """Rows of the damped products, fp32 [end - start, columns]."""
        first = start // TOGETHER
        found = torch.cat([self._rows[index] for index in range(first, (end - 1) // TOGETHER + 1)])
        chosen = found[start - first * TOGETHER : end - first * TOGETHER]
        chosen[:, start:end].diagonal().copy_(self.importance[start:end])
        return chosen

    def aim(self, weight: Tensor) -> Tensor:
        """The weights, fp32 [rows, columns], that best give from these inputs what the given ones gave in the original.

        With inputs x there and y here, min_V sum |V y - W x|^2 is at V = W + W (sum (x - y) y^T) (sum y y^T)^-1. What
        is left does not depend on how V is rounded, so that V is what rounding has to come near to: the asymmetric
        calibration of GPTAQ (arXiv:2504.02692), in closed form. It is damped towards W far more than the rounding is,
        as tokens that were not looked at drift otherwise.
        """
        if self._shift is None:
            return weight
        aim = weight.clone()
        for columns, rows in zip(weight.split(AIMED, dim=1), self._shift, strict=True):
            aim.addmm_(columns, rows)
        return aim


def _solved(products: Tensor, drift: Iterable[Tensor]) -> Iterator[Tensor]:
    """Rows of drift times the inverse of cautiously damped products, fp32 [rows, columns] each, in their place. The
    products' place is used."""
    products.diagonal().add_(_ridge(products, CAUTION))
    lower = torch.linalg.cholesky(products.mT, out=products.mT)
    for rows in drift:
        sought = rows.T  # in columns, as LAPACK has it
        torch.linalg.solve_triangular(lower, sought, upper=False, out=sought)
        torch.linalg.solve_triangular(lower.mT, sought, upper=True, out=sought)
        yield rows


def _ridge(products: Tensor, share: float) -> float:
    """A share of their mean square."""
    return share * float(products.diagonal().mean().clamp(min=1e-12))


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
