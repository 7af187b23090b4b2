"""What stands in for number formats whose blocks a model's rows, or its heads, do not fill: said as a search begins.

Which ones they are is decided where formats are (quantizing/formats/known.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from danlu.compress.quantizing.formats.known import FORMATS, fitting
from danlu.compress.quantizing.mixes import PLAIN, matrices_of
from danlu.compress.searching.asked import Asked
from danlu.compress.searching.sensitivity import formats
from danlu.compress.searching.starts import of_start
from danlu.console import say
from danlu.model.config import ModelConfig

LEAST = min(form.block for form in FORMATS.values())


def say_stand_ins(asked: Asked, models: Mapping[str, ModelConfig]) -> None:
    """Say which formats matrices, keys and values cannot have, why, and what they get.

    Args: models: the model and smaller ones that may be made of it, by name.
    """
    for line in (*of_caches(asked), *of_matrices(asked.types, models)):
        say(f"search: {line}")


def of_caches(asked: Asked) -> Iterator[str]:
    """A line for the formats of keys and values that heads do not fill."""
    left = [cache for cache in asked.wanted_caches if cache not in asked.caches]
    if left:
        heads = f"heads of {asked.checkpoint.config.head_width} numbers do not fill blocks of {' and '.join(left)}"
        yield f"{heads}: keys and values stay {' or '.join(asked.caches)}"


def of_matrices(types: Sequence[str], models: Mapping[str, ModelConfig]) -> Iterator[str]:
    """A line for each number of columns that does not fill blocks of all types, of a smaller model where it alone has
    such rows."""
    known: set[int] = set()
    for name, config in models.items():
        counts = Counter(shape[-1] for shape in matrices_of(config).values())
        for columns in sorted(set(counts) - known):
            instead = _of_columns(types, columns)
            if instead:
                yield f"{counts[columns]} matrices{of_start(name)} have rows of {columns:,} numbers: {instead}"
        known |= set(counts)


def _of_columns(types: Sequence[str], columns: int) -> str:
    if PLAIN in formats(types, columns):
        return f"blocks of {LEAST} are the smallest, and do not divide that, so they stay unrounded, in {PLAIN}"
    fit = {type: fitting(FORMATS[type], columns) for type in types}
    used = {type: form.kind.name.lower() for type, form in fit.items() if form is not None}
    return ", ".join(
        f"{form} stands in for {type} (blocks of {FORMATS[type].block})" for type, form in used.items() if form != type
    )
