"""Texts as a model's own tokenizer reads them, with where each token stands in its text, and no longer than allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from danlu.console import warn
from danlu.errors import DanluError
from danlu.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True)
class Limit:
    """How long a row may be.

    Attributes:
        tokens: at most, with what the tokenizer puts around.
        truncate: cut what is longer, and say how many; otherwise it is an error.
        name: of what is limited, for messages.
    """

    tokens: int
    truncate: bool = False
    name: str = "text"


@dataclass(frozen=True, slots=True)
class Encoded:
    """One text, or two, as a model reads it.

    Attributes:
        ids: with what the tokenizer puts around.
        types: 0 or 1 for each.
        places: for each the characters [begin, end) it stands for, in its own text.
        sequences: for each 0 or 1, its text; None for what the tokenizer added.
    """

    ids: list[int]
    types: list[int]
    places: list[tuple[int, int]]
    sequences: list[int | None]


def encode_all(tokenizer: Tokenizer, texts: Sequence[str] | Sequence[tuple[str, str]]) -> list[Encoded]:
    """Texts, or pairs of them, as the tokenizer's own model reads them, on all cores."""
    backend = tokenizer.complete_backend
    with tokenizer.unknown_named([text for one in texts for text in ((one,) if isinstance(one, str) else one)]):
        made = backend.encode_batch(list(texts), add_special_tokens=True)
    return [Encoded(one.ids, one.type_ids, one.offsets, one.sequence_ids) for one in made]


def fitted(rows: list[Encoded], limit: Limit) -> list[Encoded]:
    """Rows that keep to a limit; what the tokenizer put at the end stays there.

    Raises DanluError where one is too long and must not be cut.
    """
    long = [number for number, row in enumerate(rows) if len(row.ids) > limit.tokens]
    if long and not limit.truncate:
        what = f"{limit.name} {long[0] + 1} has {len(rows[long[0]].ids):,} tokens; at most {limit.tokens:,} are allowed"
        raise DanluError(
            f"{what} ({len(long):,} of {len(rows):,} are longer)", fix="shorten them, or ask for truncation"
        )
    if long:
        warn(f"{len(long):,} of {len(rows):,} {limit.name}s were cut to {limit.tokens:,} tokens")
    return [_fit(row, limit.tokens) for row in rows]


def _fit(row: Encoded, longest: int) -> Encoded:
    if len(row.ids) <= longest:
        return row
    columns = {name: cut(getattr(row, name), row, longest) for name in ("ids", "types", "places", "sequences")}
    return replace(row, **columns)


def cut(column: list[T], row: Encoded, longest: int) -> list[T]:
    """What stays of a column of a row's tokens: its beginning and, where the tokenizer put it there, its last."""
    if len(column) <= longest:
        return column
    return column[:longest] if row.sequences[-1] is not None else [*column[: longest - 1], column[-1]]
