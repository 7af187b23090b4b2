"""The examples of a side of rows, whatever files they lie in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from danlu.data.datasets import (
    LabelledText,
    Pair,
    Question,
    TaggedWords,
    read_labelled,
    read_pairs,
    read_parallel,
    read_questions,
    read_tagged,
)
from danlu.data.example import BadRow
from danlu.data.rows_settings import RowsSettings
from danlu.data.settings import Source
from danlu.data.sources import read
from danlu.errors import DanluError

RowSide = Literal["train", "heldout", "test"]
T = TypeVar("T")


def labelled_texts(data: RowsSettings, side: RowSide) -> list[LabelledText]:
    """Texts, or pairs of them, with labels or values. Raises DanluError naming the first line that is none."""
    if data.format == "labelled":
        return _each(data, side, read_labelled)
    found = []
    for where, row in _table(data, side):
        second = _text(row, "second", where) if "second" in row else None
        found.append(LabelledText(_text(row, "text", where), _label(row, where), second, where))
    return found


def tagged_words(data: RowsSettings, side: RowSide) -> list[TaggedWords]:
    """Sentences with a tag for each word. Raises DanluError naming the first line that is none."""
    if data.format == "tagged":
        return _each(data, side, read_tagged)
    return [_tagged(row, where) for where, row in _table(data, side)]


def questions(data: RowsSettings, side: RowSide) -> list[Question]:
    """Questions about passages."""
    return _each(data, side, read_questions)


def text_pairs(data: RowsSettings, side: RowSide) -> list[Pair]:
    """Pairs of texts. Raises DanluError naming the first line that is none."""
    if data.format == "parallel":
        read_side, written_side = (Path(file) for file in getattr(data, side))
        found = read_parallel(read_side, written_side, data.encoding)
    elif data.format == "pairs":
        found = _each(data, side, read_pairs)
    else:
        found = [(_text(row, "text", where), _text(row, "second", where)) for where, row in _table(data, side)]
    return [(second, first) for first, second in found] if data.swap else found


def _each(data: RowsSettings, side: RowSide, reader: Callable[[Path, str], list[T]]) -> list[T]:
    return [one for file in getattr(data, side) for one in reader(Path(file), data.encoding)]


def _table(data: RowsSettings, side: RowSide) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row of the tables stands, and its columns by what they are for."""
    for file in getattr(data, side):
        # The columns are not those of a text to tune on; the reader only asks whether they have numbers.
        source = Source(path=file).model_copy(update={"columns": dict(data.columns)})
        for name, rows in read(source):
            for row in rows:
                where = f"{name}:{row.origin.line}"
                if isinstance(row.value, BadRow):
                    raise DanluError(f"cannot be read: {row.value}", where=where)
                if not isinstance(row.value, dict):
                    raise DanluError("is no object with named fields", where=where)
                yield where, {role: _column(row.value, column, where) for role, column in data.columns.items()}


def _column(row: dict[Any, Any], column: str | int, where: str) -> Any:
    if column not in row:
        known = ", ".join(str(name) for name in row)
        raise DanluError(f"there is no column {column}", where=where, fix=f"the columns are {known}")
    return row[column]


def _text(row: dict[str, Any], role: str, where: str) -> str:
    value = row[role]
    if not isinstance(value, str) or not value.strip():
        raise DanluError(f"the column for {role} holds no text", where=where, fix="mend the row, or take it out")
    return value


def _label(row: dict[str, Any], where: str) -> str:
    value = row["label"]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        raise DanluError("the column for label holds neither a name nor a number", where=where)
    return str(value)


def _tagged(row: dict[str, Any], where: str) -> TaggedWords:
    columns = [row["words"], row["tags"]]
    lists = all(isinstance(one, list) and one and all(isinstance(part, str) for part in one) for one in columns)
    if not lists or len(columns[0]) != len(columns[1]):
        raise DanluError("words and tags are no two lists of texts, equally long", where=where)
    return TaggedWords(tuple(columns[0]), tuple(columns[1]), where)
