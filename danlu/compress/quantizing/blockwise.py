"""The matrices of a decoder's blocks rounded one block after another, on what the rounded ones before it make."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from danlu.compress.beside import Beside
from danlu.compress.compensate import Inputs
from danlu.compress.quantizing.formats.known import Format
from danlu.compress.quantizing.rounding import Rounded, round_in_place
from danlu.compress.quantizing.spool import Spool
from danlu.train.memory import give_back

PIECE = 2**21  # numbers of a matrix rounded at once

# From a matrix's name, some of its rows, fp32 [rows, columns], which these are, its format and inputs.
Way = Callable[[str, Tensor, slice, Format, Inputs | None], Rounded]


def round_blocks(
    walk: Beside, forms: Mapping[str, Format | None], spool: Spool, way: Way, tick: Callable[[int, str], None]
) -> None:
    """Round every matrix that has a format, and put all weights of the blocks aside.

    Args:
        walk: embedded.
        tick: told of every block.
    """
    for turn in walk.blocks():
        weights = dict(turn.block.named_parameters())
        for names, inputs in turn.layers:
            for name in (f"{name}.weight" for name in names):
                put(turn.prefix + name, weights.pop(name), forms, inputs, spool, way)
        inputs = None  # of as many numbers as a block, and the next one's are to take their place
        for name, weight in weights.items():
            put(turn.prefix + name, weight, forms, None, spool, way)
        give_back()
        tick(1, turn.prefix.rstrip("."))


def put(
    name: str, weight: Tensor, forms: Mapping[str, Format | None], inputs: Inputs | None, spool: Spool, way: Way
) -> None:
    """Put a weight aside as its format has it, and make it that."""
    form = forms.get(name)
    if form is None:
        spool.keep_exact(name, weight.data)
        return
    flat = weight.data.contiguous().view(-1, weight.shape[-1])
    rounded = round_in_place(
        flat, max(PIECE // flat.shape[1], 1), lambda piece, rows: way(name, piece, rows, form, inputs)
    )
    spool.keep(name, rounded, form, tuple(weight.shape))
    weight.data = flat.view_as(weight)
