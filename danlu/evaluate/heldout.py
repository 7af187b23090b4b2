"""What a model makes of text it has never seen: loss and right tokens of every held-out document."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from danlu.console import progress
from danlu.data.stream import IGNORED, Batch, Rows, make_batch
from danlu.errors import DanluError
from danlu.evaluate.bootstrap import Interval
from danlu.model.loss import token_losses
from danlu.model.transformer import Decoder

TOKENS_AT_ONCE = 4096  # places in one forward pass; logits are never held, so memory stays with the blocks


@dataclass(frozen=True)
class Heldout:
    """Sums over the scored tokens of each held-out document.

    Attributes:
        row, segment: int64 [documents], where the document lies in the packed rows.
        losses: float64 [documents], nat.
        counts: int64 [documents], tokens the model had to produce.
        correct: int64 [documents], of these, the tokens its most likely choice got right.
    """

    row: NDArray[np.int64]
    segment: NDArray[np.int64]
    losses: NDArray[np.float64]
    counts: NDArray[np.int64]
    correct: NDArray[np.int64]


def perplexity(loss: Interval) -> Interval:
    """exp of a loss in nat per token, limits and all."""
    return Interval(*(math.exp(each) for each in loss))


def relative_perplexity(change: Interval) -> Interval:
    """The relative change of perplexity, a share, that a change of loss in nat per token makes: exp(change) - 1."""
    return Interval(*(math.expm1(each) for each in change))


def choose_rows(rows: Rows, tokens: int | None, seed: int) -> NDArray[np.int64]:
    """Row numbers to score, ascending: all, or as many drawn by the seed as `tokens` places fill, at least one."""
    if len(rows) == 0:
        raise DanluError("there is no held-out row to score", fix="hold out a larger share of the data")
    wanted = len(rows) if tokens is None else max(1, min(len(rows), tokens // rows.window))
    drawn = np.random.default_rng(seed).choice(len(rows), wanted, replace=False)
    return np.sort(drawn).astype(np.int64)


def score(model: Decoder, rows: Rows, chosen: NDArray[np.int64], label: str = "held-out") -> Heldout:
    """Score every document of the chosen rows, in the model's own precision.

    Args:
        model: weights on any device, in the dtype to compute with.
        rows: packed documents, which never see each other.
        chosen: int64 [n], row indices.
        label: what the progress line calls this.

    Raises DanluError where a token is outside the model's vocabulary.
    """
    at_once = max(1, TOKENS_AT_ONCE // rows.window)
    device = model.device
    parts: list[Heldout] = []
    with torch.inference_mode(), progress(label, len(chosen) * rows.window, "tokens") as tick:
        for start in range(0, len(chosen), at_once):
            indices = chosen[start : start + at_once]
            batch = make_batch(rows, indices)
            _check_vocabulary(model, batch)
            parts.append(_score_batch(model, batch.to(device), indices))
            tick.advance(len(indices) * rows.window)
    fields = ("row", "segment", "losses", "counts", "correct")
    return Heldout(*(np.concatenate([getattr(part, field) for part in parts]) for field in fields))


def _score_batch(model: Decoder, batch: Batch, indices: NDArray[np.int64]) -> Heldout:
    hidden = model(batch.tokens, positions=batch.positions, segments=batch.segments)
    scored = batch.targets != IGNORED
    loss, correct = token_losses(hidden[scored], model.head_weight, batch.targets[scored])
    place, _ = torch.nonzero(scored, as_tuple=True)
    document = torch.stack((place, batch.segments[scored].long()), dim=1).cpu().numpy()
    documents, member = np.unique(document, axis=0, return_inverse=True)

    def per_document(values: Tensor) -> NDArray[np.float64]:
        return np.bincount(member.reshape(-1), values.double().cpu().numpy(), len(documents)).astype(np.float64)

    return Heldout(
        row=indices[documents[:, 0]],
        segment=documents[:, 1],
        losses=per_document(loss),
        counts=per_document(torch.ones_like(correct)).astype(np.int64),
        correct=per_document(correct).astype(np.int64),
    )


def _check_vocabulary(model: Decoder, batch: Batch) -> None:
    largest, known = int(batch.tokens.max()), model.config.vocab_size
    if largest >= known:
        raise DanluError(
            f"the held-out data holds token {largest:,}, the model knows {known:,} tokens, counted from 0",
            fix="build the data with this model's tokenizer",
        )
