"""What a model of few bits loses against the original on a text: divergence of a decoder, cosine of an encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from danlu.artifact import Figures
from danlu.compress.exports.inputs import round_inputs
from danlu.compress.quality import cut
from danlu.compress.quantizing.formats.grouped import Grouped
from danlu.errors import DanluError
from danlu.evaluate.bootstrap import interval
from danlu.evaluate.divergence import divergence
from danlu.model.checkpoint import Checkpoint, StoredModel
from danlu.model.config import ModelConfig
from danlu.model.sentence import SentenceEncoder
from danlu.tokenizer import Tokenizer

PIECES = 32  # of a text that are compared, at most, drawn evenly over it
SENTENCES = 512


def quality(
    original: StoredModel, other: StoredModel, tokenizer: Tokenizer, text: str, inputs: Grouped | None = None
) -> Figures:
    """The figure with its interval, by piece of text. Raises DanluError where the text is empty.

    Args: inputs: what those of the other's linear layers are rounded to while it runs; None leaves them exact.
    """
    if not text.strip():
        raise DanluError("is empty", where="--heldout")
    config = original.config
    assert isinstance(config, ModelConfig)
    if config.causal:
        return _divergence(original, other, tokenizer, text, inputs)
    return cosine(original.path, other.path, lines(text), inputs)


def lines(text: str) -> list[str]:
    """Lines of a text that say something, drawn evenly over it."""
    found = [line.strip() for line in text.splitlines() if line.strip()]
    return _evenly(found, SENTENCES)


def _evenly(found: list[str], count: int) -> list[str]:
    chosen = np.unique(np.linspace(0, len(found) - 1, min(count, len(found))).astype(int))
    return [found[place] for place in chosen]


def cosine(original: Path, other: Path, sentences: list[str], inputs: Grouped | None = None) -> Figures:
    """Of the vectors of sentences, in the mean. Those too long are cut alike. For `inputs` see `quality`."""
    before, after = (SentenceEncoder.open(path) for path in (original, other))
    if inputs is not None:
        round_inputs(after.model.blocks, inputs)
    ours, theirs = (encoder.encode(sentences, truncate=True) for encoder in (before, after))
    alike = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).double().numpy()
    by = f"of {len(sentences)} sentences' vectors to the original's{_said(inputs)}"
    return {"cosine": interval(alike).figure("", by)}


def _said(inputs: Grouped | None) -> str:
    return "" if inputs is None else ", inputs in few bits too"


def _divergence(
    original: StoredModel, other: StoredModel, tokenizer: Tokenizer, text: str, inputs: Grouped | None
) -> Figures:
    pieces = _evenly(cut(text), PIECES)
    sums, counts = np.zeros(len(pieces)), np.zeros(len(pieces))
    before, after = (Checkpoint(stored, tokenizer).load() for stored in (original, other))
    if inputs is not None:
        round_inputs(after.blocks, inputs)
    with torch.inference_mode():
        for number, piece in enumerate(pieces):
            tokens = torch.tensor(tokenizer.encode(piece, special=False))[None, : before.config.context]
            found = divergence(*(model.logits(model(tokens)) for model in (before, after)))
            sums[number], counts[number] = float(found.sum()), found.numel()
    by = f"of {len(pieces)} pieces of text, {int(counts.sum()):,} tokens{_said(inputs)}"
    return {"divergence": interval(sums, counts).figure("nat/token", by)}
