"""How far a compressed file's guesses are from the original's, both computed by the engine that will be used."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from danlu.console import progress
from danlu.device.engine import CACHES, IGNORED, Engine
from danlu.device.measure import Document
from danlu.errors import DanluError

Floats = NDArray[np.float64]
ROWS = 4  # computed at a time: with 50,000 words they stay in a processor's cache


@dataclass(frozen=True)
class Divergences:
    """Sums over the scored positions of each document, each [documents].

    Attributes:
        divergence: Kullback-Leibler divergence of the candidate from the original, float64, nat.
        same: positions at which both hold the same token for the most likely one.
        original_loss, loss: cross-entropy of the original and of the candidate, float64, nat.
        counts: scored positions.
    """

    divergence: Floats
    same: NDArray[np.int64]
    original_loss: Floats
    loss: Floats
    counts: NDArray[np.int64]


def score_divergence(
    original: Path,
    candidate: Path,
    documents: Sequence[Document],
    *,
    context: int = 2048,
    threads: int | None = None,
    cache: str = CACHES[0],
    label: str = "divergence",
) -> Divergences:
    """Read documents with both files, step by step beside each other, so that no logits need be kept.

    Args:
        original: the reference, an F32, F16 or BF16 GGUF.
        candidate: another GGUF with the same words.
        documents: what to score.
        context, threads: see Engine. Both files are held in memory.
        cache: the number format of the candidate's keys and values.
        label: what the progress line calls this.

    Raises DanluError where a file does not load, a document is longer than the context, or the words differ.
    """
    rows = []
    with ExitStack() as stack, progress(label, sum(len(each.tokens) for each in documents), "tokens") as tick:
        known, said = (
            stack.enter_context(Engine(path, context=context, threads=threads, cache=format, mapped=mapped))
            for path, format, mapped in ((original, CACHES[0], True), (candidate, cache, False))
        )
        if known.vocab_size != said.vocab_size:
            what = f"the original has {known.vocab_size:,} words, this file {said.vocab_size:,}"
            raise DanluError(what, where=candidate, fix="compare files of one model with one vocabulary")
        for document in documents:
            rows.append(_score(known, said, document))
            tick.advance(len(document.tokens))
    divergence, same, original_loss, loss, counts = np.array(rows, np.float64).reshape(-1, 5).T
    return Divergences(divergence, same.astype(np.int64), original_loss, loss, counts.astype(np.int64))


def _score(known: Engine, said: Engine, document: Document) -> tuple[float, ...]:
    """The sums of one document, in the order of the fields of Divergences."""
    ids, following = np.asarray(document.tokens, np.int32), np.asarray(document.targets, np.int32)
    wanted = following != IGNORED
    for engine in (known, said):
        engine.clear()  # both then take the same steps
    sums = np.zeros(5)
    for (positions, before), (_, after) in zip(known.scored(ids, wanted), said.scored(ids, wanted), strict=True):
        sums += [*compare(before, after, following[positions]), len(positions)]
    return tuple(sums)


def compare(reference: NDArray[np.float32], logits: NDArray[np.float32], targets: NDArray[np.int32]) -> Floats:
    """Sums over N rows of what two models make of the same words, from float32 [N, vocab] each.

    Args: targets: int32 [N], the words that follow.

    Returns: float64 [4]: KL(softmax(reference) || softmax(logits)) in nat, rows whose most likely word is the same, and
    the cross-entropies of both in nat.
    """
    sums = np.zeros(4)
    for start in range(0, len(targets), ROWS):
        part = slice(start, start + ROWS)
        (known, before, best), (said, after, found) = (_centred(each[part]) for each in (reference, logits))
        chances = np.exp(known)
        behind = np.einsum("nv,nv->n", chances, known - said) / chances.sum(axis=1) - before + after
        rows, chosen = np.arange(len(known)), targets[part]
        losses = (before - known[rows, chosen]).sum(), (after - said[rows, chosen]).sum()
        sums += [np.maximum(behind, 0).sum(), (best == found).sum(), *losses]  # by rounding alone it may fall below 0
    return sums


def _centred(logits: NDArray[np.float32]) -> tuple[NDArray[np.float32], Floats, NDArray[np.int64]]:
    """Logits with their largest taken off, the logarithm of the sum of e to them, and where the largest stands."""
    best = logits.argmax(axis=1)
    centred = logits - logits[np.arange(len(logits)), best][:, None]
    return centred, np.log(np.exp(centred).sum(axis=1).astype(np.float64)), best
