"""Rows whose ends the model that learns has written itself: it is corrected where its own writing leads it
(on-policy distillation, arXiv:2306.13649)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from danlu.data.stream import Batch
from danlu.model.transformer import Decoder
from danlu.model.writer import Writer


def continued(model: Decoder, batch: Batch, share: float) -> tuple[Batch, Tensor]:
    """The rows with their ends drawn from the model's own probabilities, and which targets are its own words.

    Chance is torch's, which a training step seeds by its number: a resumed run draws alike. Targets that were not
    learned before are not learned now, so that as many count.

    Args:
        model: in training; it writes as it would at rest, without gradients.
        batch: rows of one document each, or of documents that see each other.
        share: of a row's tokens; at least one token stays.

    Returns: the rows, and bool [B, T].
    """
    length = batch.tokens.shape[1]
    kept = max(length - round(share * length), 1)
    tokens, targets = batch.tokens.clone(), batch.targets.clone()
    if kept < length:
        tokens[:, kept:] = _write(model, tokens[:, :kept], length - kept)
    own = torch.zeros_like(targets, dtype=torch.bool)
    own[:, kept - 1 : -1] = targets[:, kept - 1 : -1] >= 0
    targets[:, :-1] = torch.where(own[:, :-1], tokens[:, 1:], targets[:, :-1])
    own[:, -1] = (targets[:, -1] >= 0) & (kept < length)
    return replace(batch, tokens=tokens, targets=targets), own


def _write(model: Decoder, prompts: Tensor, count: int) -> Tensor:
    """int64 [B, count], drawn one after another at temperature 1."""
    writer = Writer(model, prompts.tolist(), count)
    made = []
    for number in range(count):
        made.append(torch.multinomial(writer.logits.float().softmax(-1), 1)[:, 0])
        if number + 1 < count:
            writer.write(made[-1])
    return torch.stack(made, 1).clone()
