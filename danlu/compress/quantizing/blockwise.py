"""The matrices of a decoder's blocks rounded one block after another, on what the rounded ones before it make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from danlu.compress.beside import Beside
from danlu.compress.compensate import Inputs
from danlu.compress.quantizing.formats.known import Format
from danlu.compress.quantizing.held import holds
from danlu.compress.quantizing.rounding import Rounded, round_in_place
from danlu.compress.quantizing.spool import Spool
from danlu.train.memory import give_back

PIECE = 2**21  # numbers of matrices rounded at once

# From names of matrices that lie below each other, some of their rows, fp32 [rows, columns], which these are, their
# format and inputs.
Way = Callable[[Sequence[str], Tensor, slice, Format, Inputs | None], Rounded]


def round_blocks(
    walk: Beside, forms: Mapping[str, Format | None], spool: Spool, way: Way, tick: Callable[[int, str], None]
) -> None:
    """Round every matrix that has a format, and put all weights of the blocks aside.

    Args:
        walk: embedded.
        tick: told of every block.
    """
    for turn in walk.blocks():
        for names, inputs in turn.layers:
            made = _round(walk, names, forms, inputs, spool, way)
            del inputs  # of as many numbers as a block, and no longer needed
            for name in names:
                walk.put(name, made.pop(name))
        for name in turn.others:
            walk.put(name, _round(walk, [name], forms, None, spool, way)[name])
        give_back()
        tick(1, turn.prefix.rstrip("."))


def _round(
    walk: Beside,
    names: Sequence[str],
    forms: Mapping[str, Format | None],
    inputs: Inputs | None,
    spool: Spool,
    way: Way,
) -> dict[str, Tensor]:
    """Round weights that are given the same inputs. Returns what stands for them, fp32, by their names."""
    weights = {name: walk.read(name) for name in names}
    for alike in _alike(weights, forms):
        put(alike, forms, inputs, spool, way)
    return weights


def _alike(weights: Mapping[str, Tensor], forms: Mapping[str, Format | None]) -> Iterator[dict[str, Tensor]]:
    """Matrices of one format that all is the same for, as many as may be rounded at once: a column of all of them takes
    hardly longer than one of the first."""
    found: dict[tuple[str, bool], dict[str, Tensor]] = {}
    for name, weight in weights.items():
        form = forms.get(name)
        key = ("", False) if form is None else (form.kind.name, holds(form, weight.data))
        together = found.setdefault(key, {})
        if together and sum(each.numel() for each in together.values()) + weight.numel() > PIECE:
            yield together
            found[key] = {name: weight}
        else:
            together[name] = weight
    yield from found.values()


def put(
    weights: Mapping[str, Tensor], forms: Mapping[str, Format | None], inputs: Inputs | None, spool: Spool, way: Way
) -> None:
    """Put weights of one format aside as it has them, and make them that."""
    form = forms.get(next(iter(weights), ""))
    if form is None:
        for name, weight in weights.items():
            spool.keep_exact(name, weight.data)
        return
    parts = [weight.data.contiguous().view(-1, weight.shape[-1]) for weight in weights.values()]
    flat = parts[0] if len(parts) == 1 else torch.cat(parts)
    names, piece = list(weights), max(PIECE // flat.shape[1], 1)
    rounded = round_in_place(flat, piece, lambda some, rows: way(names, some, rows, form, inputs))
    start = 0
    for (name, weight), part in zip(weights.items(), parts, strict=True):
        rows = slice(start, start + len(part))
        spool.keep(name, rounded.rows(rows), form, tuple(weight.shape))
        weight.data = flat[rows].view_as(weight)
        start = rows.stop
