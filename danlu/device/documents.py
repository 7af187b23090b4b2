"""The held-out documents a compressed model is scored on: the same for every candidate, and for the certificate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from danlu.console import warn
from danlu.data.stream import Rows, make_batch
from danlu.device.measure import Document
from danlu.evaluate.groups import groups_of, pooled
from danlu.evaluate.heldout import choose_rows
from danlu.tokenizer import Tokenizer

SEED = 0  # which rows and prompts are drawn, and the resampling: the same for every model and every run


@dataclass(frozen=True)
class Drawn:
    """Held-out documents that have anything to score, in the order of `danlu.evaluate.heldout.score`.

    Attributes:
        rows: all packed rows.
        chosen: int64 [n], those that were drawn.
        documents: in them, one by one.
        groups: the group of each, the unit that is resampled.
    """

    rows: Rows
    chosen: NDArray[np.int64]
    documents: list[Document]
    groups: list[str]

    @property
    def counts(self) -> NDArray[np.int64]:
        """Scored tokens of each document."""
        return np.array([document.count for document in self.documents], np.int64)

    @property
    def words(self) -> str:
        """What was drawn, in words."""
        return (
            f"{len(self.documents)} held-out documents in {len(set(self.groups))} groups, which are resampled; "
            f"{int(self.counts.sum()):,} tokens"
        )

    def pooled(self, *columns: ArrayLike) -> list[NDArray[np.float64]]:
        """Each column [documents] summed over the documents of a group."""
        return pooled(self.groups, *map(np.asarray, columns))

    def sample(self, tokens: int) -> list[int]:
        """`tokens` ids of real text: the documents one after the other, from the beginning again if they are short."""
        joined = [token for document in self.documents for token in document.tokens]
        return (joined * (tokens // len(joined) + 1))[:tokens]


def draw_heldout(data: Path, tokenizer: Tokenizer, tokens: int) -> Drawn:
    """Draw held-out rows of about `tokens` tokens and take them apart.

    Args:
        data: a data artifact, of which heldout/ and heldout.jsonl are read.
        tokenizer: the one the data was made with.

    Raises DanluError where nothing was held out.
    """
    rows = Rows.open(data / "heldout")
    chosen = choose_rows(rows, tokens, SEED)
    batch = make_batch(rows, chosen)
    documents, places = [], []
    for row, segments in enumerate(batch.segments):
        for segment in range(1, int(segments.max()) + 1):
            inside = segments == segment
            document = Document(batch.tokens[row, inside].tolist(), batch.targets[row, inside].tolist())
            if document.count:
                documents.append(document)
                places.append((chosen[row], segment))
    row_numbers, segment_numbers = np.array(places, np.int64).reshape(-1, 2).T
    groups = groups_of(data / "heldout.jsonl", tokenizer, rows, row_numbers, segment_numbers)
    if len(set(groups)) < 2:
        warn("the held-out documents drawn are of one group: no interval of the loss can be given")
    return Drawn(rows, chosen, documents, groups)
