"""Weights set to zero: half of a matrix or so, or two of every four.

By size (magnitude), by size times what comes in (Wanda, arXiv:2306.11695), or one column after another with those
still to come making up for it (SparseGPT, arXiv:2301.00774).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from danlu.artifact import Figures, figure
from danlu.compress.compensate import Choice, Inputs, compensate
from danlu.compress.product import Making, Product, Shelf, Source, read_part, start_walk, workplace
from danlu.compress.quantizing.quantizer import calibration_rows
from danlu.compress.walk import Products
from danlu.console import progress
from danlu.errors import DanluError, one_of
from danlu.model.checkpoint import Checkpoint
from danlu.model.mixture import Bank
from danlu.model.stored import without_memory

Method = Literal["magnitude", "wanda", "sparsegpt"]
METHODS: tuple[str, ...] = get_args(Method)
BLOCK = 128  # columns whose zeros are chosen together, as SparseGPT does
ROUTERS = ("router", "shared_gate")  # small, and their errors send tokens to other experts


@dataclass(frozen=True)
class Sparsity:
    """How many weights become zero, and how they are chosen.

    Attributes:
        method: one of METHODS.
        share: of a matrix, where there is no pattern.
        pattern: (zeros, of): so many of every so many neighbours in a row; None where they may stand anywhere.
    """

    method: str = "sparsegpt"
    share: float = 0.5
    pattern: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise DanluError(f"{self.method} is no way to choose zeros", fix=one_of(self.method, METHODS))
        if not 0 < self.share < 1:
            raise DanluError(f"a share of {self.share:g} of the weights cannot be set to zero", fix="say 0.5, or 50%")


def read_sparsity(method: str, share: str | None, pattern: str | None) -> Sparsity:
    """What a command asks for: a share, by default half, or a pattern. Raises DanluError where it is none."""
    if share is not None and pattern is not None:
        raise DanluError("a pattern says how many zeros there are", where="--share", fix="name one of the two")
    part = Sparsity.share if share is None else read_part(share)
    return Sparsity(method, part, None if pattern is None else read_pattern(pattern))


def read_pattern(text: str) -> tuple[int, int]:
    """2:4, two of every four stay -> (2, 4), two of every four become zero. Raises DanluError where it is none."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    kept, of = (int(number) for number in found.groups()) if found else (0, 0)
    if not 0 < kept < of:
        raise DanluError(f"{text} is no pattern of zeros", where="--pattern", fix="say 2:4, two of every four stay")
    return of - kept, of


def lowest(scores: Tensor, sparsity: Sparsity, by_row: bool) -> Tensor:
    """Where zeros go: at the lowest scores, bool of the same shape [rows, columns].

    Args:
        by_row: every row gets the same number of them; otherwise the matrix as a whole has its share.
    """
    if sparsity.pattern is not None:
        zeros, of = sparsity.pattern
        groups = scores.unflatten(1, (-1, of))
        chosen = groups.topk(zeros, -1, largest=False).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, chosen, True).flatten(1)
    flat = scores if by_row else scores.flatten()
    chosen = flat.topk(round(sparsity.share * flat.shape[-1]), -1, largest=False, sorted=False).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, chosen, True).view_as(scores)


def zero_by_magnitude(weight: Tensor, sparsity: Sparsity) -> Tensor:
    """The smallest numbers of a matrix, fp32 [rows, columns], are gone."""
    return weight.masked_fill(lowest(weight.abs(), sparsity, by_row=False), 0)


def zero_by_inputs(weight: Tensor, sparsity: Sparsity, products: Tensor) -> Tensor:
    """In each row those are gone whose size times the root of the sum of squares of their inputs is smallest (Wanda).

    Args: weight: fp32 [rows, columns]; products: fp32 [columns, columns], of inputs.
    """
    return weight.masked_fill(lowest(weight.abs() * products.diagonal().sqrt(), sparsity, by_row=True), 0)


def zero_compensated(weight: Tensor, sparsity: Sparsity, inputs: Inputs) -> Tensor:
    """Those are gone that others can make up for best, and the others do (SparseGPT).

    Args: weight: fp32 [rows, columns].
    """
    block = BLOCK if sparsity.pattern is None else sparsity.pattern[1]

    def begin(start: int, part: Tensor) -> Choice:
        cost = (part / inputs.factor.diagonal()[start : start + part.shape[1]]).square()
        gone = lowest(cost, sparsity, by_row=False)
        return lambda column, x: x.masked_fill(gone[:, column], 0)

    return compensate(weight, inputs, block, begin)


def prune_weights(
    checkpoint: Checkpoint,
    sparsity: Sparsity,
    calibration: str | None,
    out: Path,
    tokens: int = 16_384,
    dtype: torch.dtype = torch.float32,
) -> Product:
    """Set weights of a decoder's blocks to zero and write a Hugging Face directory.

    The matrices of attention and feed-forward are pruned, each by the same share; embedding, head, routers and vectors
    stay as they are. Inputs of a block are those that the pruned blocks before it give. The files are as large as
    before: zeros are stored, too.

    Args:
        checkpoint: any decoder.
        sparsity: how many zeros, and where.
        calibration: a text like what the model is for; not needed where only size counts.
        out: the directory.
        tokens: of the text, at most.
        dtype: of the stored weights.

    Raises DanluError where the text is missing or too short, a matrix cannot hold the pattern, or a method that looks
    at inputs meets experts, of which each sees others.
    """
    source = Source.of(checkpoint)
    names = _matrices(source, sparsity)
    if sparsity.method != "magnitude" and calibration is None:
        raise DanluError(f"{sparsity.method} looks at a text", where="--calibration", fix="name a text file")
    making = Making("prune", "compress/pruning/sparse", asdict(sparsity) | {"tokens": tokens}, checkpoint)
    with workplace(out) as folder, torch.inference_mode():
        shelf = Shelf(folder)
        if sparsity.method == "magnitude" or calibration is None:
            counted = _by_size(source, sparsity, names, shelf)
        else:
            counted = _by_text(source, sparsity, calibration_rows(checkpoint, calibration, tokens), names, shelf)
        shelf.keep_others(source)
        making.write(source.config, shelf, checkpoint.tokenizer, out, dtype)
    return making.sign(out, counted.figures(source.parameters))


@dataclass
class _Counted:
    """Zeros among the numbers of so many matrices."""

    matrices: int = 0
    numbers: int = 0
    zeros: int = 0

    def add(self, weight: Tensor) -> None:
        self.matrices += 1
        self.numbers += weight.numel()
        self.zeros += int((weight == 0).sum())

    def figures(self, parameters: int) -> Figures:
        return {
            "matrices": figure(self.matrices, "matrices"),
            "zeros": figure(self.zeros / self.numbers, "share", by="of the numbers of these matrices, counted"),
            "zeros_of_all": figure(self.zeros / parameters, "share", by="of all parameters, counted"),
        }


def _matrices(source: Source, sparsity: Sparsity) -> set[str]:
    """The weights that are pruned. Raises DanluError where one cannot be as is asked."""
    found, of = set(), 1 if sparsity.pattern is None else sparsity.pattern[1]
    for path, module in without_memory(source.config).named_modules():
        if not path.startswith("blocks.") or path.endswith(ROUTERS):
            continue
        if not isinstance(module, Bank) and type(module) is not nn.Linear:
            continue
        if isinstance(module, Bank) and sparsity.method != "magnitude":
            what = f"{sparsity.method} looks at what comes in, and each expert sees other tokens"
            raise DanluError(what, where=path, fix="use magnitude")
        columns = module.weight.shape[-1]
        if columns % of:
            what = f"rows of {columns} numbers cannot be cut into groups of {of}"
            raise DanluError(what, where=path, fix="take another pattern, or a share")
        found.add(f"{path}.weight")
    return found


def _by_size(source: Source, sparsity: Sparsity, names: set[str], shelf: Shelf) -> _Counted:
    counted = _Counted()
    with progress("prune", len(names), "matrices") as tick:
        for name in sorted(names):
            weight = source.makers[name]()
            made = zero_by_magnitude(weight.flatten(0, -2), sparsity).view_as(weight)
            counted.add(made)
            shelf.keep(name, made)
            tick.advance(1, name)
    return counted


def _by_text(source: Source, sparsity: Sparsity, rows: Tensor, names: set[str], shelf: Shelf) -> _Counted:
    walk, counted = start_walk(source, rows), _Counted()
    walk.embed()
    with progress("prune", source.config.layers, "blocks") as tick:
        for prefix, block, products in walk.blocks():
            way = _ways(sparsity, products)
            for name, weight in block.named_parameters():
                if prefix + name in names:
                    weight.data = way(name.removesuffix(".weight"), weight.data)
                    counted.add(weight.data)
                shelf.keep(prefix + name, weight.data)
            tick.advance(1, prefix.rstrip("."))
    return counted


def _ways(sparsity: Sparsity, products: Products) -> Callable[[str, Tensor], Tensor]:
    """From a layer's name and weight to what is left of it. Layers with the same inputs share what is made of them."""
    if sparsity.method == "wanda":
        return lambda name, weight: zero_by_inputs(weight, sparsity, products.found[name])
    alike = {name: id(each) for name, each in products.found.items()}
    made = {id(each): Inputs(each) for each in {id(each): each for each in products.found.values()}.values()}
    return lambda name, weight: zero_compensated(weight, sparsity, made[alike[name]])
