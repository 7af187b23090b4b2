"""What a model of few bits loses against the original on a text: divergence of a decoder, cosine of an encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from danlu.artifact import Figures
from danlu.compress.quality import cut
from danlu.errors import DanluError
from danlu.evaluate.bootstrap import interval
from danlu.evaluate.divergence import divergence
from danlu.model.checkpoint import Checkpoint, StoredModel
from danlu.model.config import ModelConfig
from danlu.model.sentence import SentenceEncoder
from danlu.tokenizer import Tokenizer

PIECES = 32  # of a text that are compared, at most, drawn evenly over it
SENTENCES = 512


def quality(original: StoredModel, other: StoredModel, tokenizer: Tokenizer, text: str) -> Figures:
    """The figure with its interval, by piece of text. Raises DanluError where the text is empty."""
    if not text.strip():
        raise DanluError("is empty", where="--heldout")
    config = original.config
    assert isinstance(config, ModelConfig)
    if config.causal:
        return _divergence(original, other, tokenizer, text)
    return cosine(original.path, other.path, lines(text))


def lines(text: str) -> list[str]:
    """Lines of a text that say something, drawn evenly over it."""
    found = [line.strip() for line in text.splitlines() if line.strip()]
    return _evenly(found, SENTENCES)


def _evenly(found: list[str], count: int) -> list[str]:
    chosen = np.unique(np.linspace(0, len(found) - 1, min(count, len(found))).astype(int))
    return [found[place] for place in chosen]


def cosine(original: Path, other: Path, sentences: list[str]) -> Figures:
    """Of the vectors of sentences, in the mean. Those too long are cut alike."""
    ours, theirs = (SentenceEncoder.open(path).encode(sentences, truncate=True) for path in (original, other))
    alike = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).double().numpy()
    return {"cosine": interval(alike).figure("", f"of {len(sentences)} sentences' vectors to the original's")}


def _divergence(original: StoredModel, other: StoredModel, tokenizer: Tokenizer, text: str) -> Figures:
    pieces = _evenly(cut(text), PIECES)
    sums, counts = np.zeros(len(pieces)), np.zeros(len(pieces))
    before, after = (Checkpoint(stored, tokenizer).load() for stored in (original, other))
    with torch.inference_mode():
        for number, piece in enumerate(pieces):
            tokens = torch.tensor(tokenizer.encode(piece, special=False))[None, : before.config.context]
            found = divergence(*(model.logits(model(tokens)) for model in (before, after)))
            sums[number], counts[number] = float(found.sum()), found.numel()
    by = f"of {len(pieces)} pieces of text, {int(counts.sum()):,} tokens"
    return {"divergence": interval(sums, counts).figure("nat/token", by)}
