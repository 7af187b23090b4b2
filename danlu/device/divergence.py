"""How far a compressed file's guesses are from the original's, both computed by the engine that will be used."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from danlu.console import progress
from danlu.device.engine import CACHES, IGNORED, Engine, cross_entropy
from danlu.device.measure import Document
from danlu.errors import DanluError

Floats = NDArray[np.float64]


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
            stack.enter_context(Engine(path, context=context, threads=threads, cache=format))
            for path, format in ((original, CACHES[0]), (candidate, cache))
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
        targets = following[positions]
        (loss_before, _), (loss_after, _) = cross_entropy(before, targets), cross_entropy(after, targets)
        same = before.argmax(axis=1) == after.argmax(axis=1)
        parts = (divergence(before, after), same, loss_before, loss_after)
        sums += [*(part.sum(dtype=np.float64) for part in parts), len(positions)]
    return tuple(sums)


def divergence(reference: NDArray[np.float32], logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """KL(softmax(reference) || softmax(logits)) of each row, in nat, from float32 [N, vocab]; float32 [N]."""
    known, said = (each - each.max(axis=1, keepdims=True) for each in (reference, logits))
    shares = np.exp(known)
    total = shares.sum(axis=1, dtype=np.float64)
    behind = np.log(np.exp(said).sum(axis=1, dtype=np.float64)) - np.log(total)
    found = np.einsum("nv,nv->n", shares, known - said, dtype=np.float64) / total + behind
    return np.maximum(found, 0).astype(np.float32)  # by rounding alone it may fall below
