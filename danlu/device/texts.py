"""Plain text as documents to score: pieces of one length, drawn evenly over it."""

from __future__ import annotations

import numpy as np

from danlu.device.engine import IGNORED
from danlu.device.measure import Document
from danlu.errors import DanluError
from danlu.tokenizer import Tokenizer

LENGTH = 512  # tokens of a document
FEWEST = 4  # documents; of fewer no interval can be given


def documents_of(text: str, tokenizer: Tokenizer, tokens: int, where: str, length: int = LENGTH) -> list[Document]:
    """Documents of about `tokens` tokens in all; what resampling draws are these.

    Args:
        where: what the text is called in an error.
        length: tokens of a document, at most.

    Raises DanluError where the text is too short.
    """
    ids = tokenizer.encode(text, special=False)
    length = min(length, LENGTH, len(ids) // FEWEST)
    if length < 2:
        what = f"has {len(ids):,} tokens, which are too few"
        raise DanluError(what, where=where, fix="take more text of the kind that the model is for")
    starts = np.arange(0, len(ids) - length + 1, length)
    count = min(len(starts), max(FEWEST, tokens // length))
    chosen = starts[np.linspace(0, len(starts) - 1, count).astype(int)]
    return [Document(ids[start : start + length], [*ids[start + 1 : start + length], IGNORED]) for start in chosen]
