"""Which documents belong together: those of one group (a module, a chat's author, a file) are no independent evidence.

The data stage splits by group, so a group is what was held out, and a group is what the bootstrap must draw; else
the interval says how sure we are of these very groups and not of new ones (Field and Welsh 2007,
doi:10.1111/j.1467-9868.2007.00593.x, on the cluster bootstrap).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from danlu.console import say
from danlu.data.example import Example
from danlu.data.stream import Rows
from danlu.data.template import Templater
from danlu.tokenizer import Tokenizer

READ_TOGETHER = 512  # examples rendered at a time


def groups_of(
    path: Path, tokenizer: Tokenizer, rows: Rows, row: NDArray[np.int64], segment: NDArray[np.int64]
) -> list[str]:
    """The group of each packed document, found by its tokens among the examples it was made from.

    Args:
        path: heldout.jsonl. An example without group is a group of its own, with all windows it was cut into.
        tokenizer: the one the rows were made with.
        rows: the packed rows.
        row, segment: int64 [documents], where each document lies.

    Returns: one name a document. A document that no example explains is a group of its own, and said to be.
    """
    wanted = {_key(rows, place, number): "" for place, number in zip(row.tolist(), segment.tolist(), strict=True)}
    templater = Templater(tokenizer, rows.window)
    with path.open(encoding="utf-8") as lines:
        numbered = enumerate(map(Example.read, lines), 1)
        while chunk := list(itertools.islice(numbered, READ_TOGETHER)):
            for (line, example), documents in zip(chunk, templater.documents([one for _, one in chunk]), strict=True):
                for document in documents if isinstance(documents, list) else ():
                    if (key := document.tokens.tobytes()) in wanted:
                        wanted[key] = example.origin.group or f"line {line}"
    if unknown := sum(not group for group in wanted.values()):
        say(f"evaluate: {unknown:,} held-out documents are not in {path.name}; each counts as a group of its own")
    keys = (_key(rows, place, number) for place, number in zip(row.tolist(), segment.tolist(), strict=True))
    return [wanted[key] or f"document {number}" for number, key in enumerate(keys)]


def pooled(groups: Sequence[str], *columns: NDArray[np.generic]) -> list[NDArray[np.float64]]:
    """Each column [documents] summed over the documents of a group: [groups], in the order of first appearance."""
    order = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    member = np.array([order[name] for name in groups], dtype=np.int64)
    return [np.bincount(member, column.astype(np.float64), len(order)).astype(np.float64) for column in columns]


def _key(rows: Rows, row: int, segment: int) -> bytes:
    return rows.tokens[row][rows.segments[row] == segment].astype(np.int32).tobytes()
