"""The held-out documents as the engine is given them: one at a time, each scored where the model had to learn."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from danlu.data.stream import Rows, make_batch
from danlu.device.measure import IGNORED, Document


def heldout_documents(rows: Rows, chosen: NDArray[np.int64]) -> list[Document]:
    """The documents of the chosen rows that have anything to score, in the order of `danlu.evaluate.heldout.score`.

    Args:
        rows: packed documents.
        chosen: int64 [n], row numbers.
    """
    batch = make_batch(rows, chosen)
    documents = []
    for tokens, targets, segments in zip(batch.tokens, batch.targets, batch.segments, strict=True):
        for segment in range(1, int(segments.max()) + 1):
            inside = segments == segment
            document = Document(tokens[inside].tolist(), targets[inside].tolist())
            if any(target != IGNORED for target in document.targets):
                documents.append(document)
    return documents


def sample_text(documents: list[Document], tokens: int) -> list[int]:
    """`tokens` ids of real text: the documents one after the other, from the beginning again if they are short."""
    joined = [token for document in documents for token in document.tokens]
    return (joined * (tokens // len(joined) + 1))[:tokens]
