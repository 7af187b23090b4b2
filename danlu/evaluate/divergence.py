"""How far a model's guesses are from another one's: Kullback-Leibler divergence, position by position."""

from __future__ import annotations

import torch
from torch import Tensor

AT_ONCE = 2**24  # logits in fp32 at once: 64 MB, of which a few copies are alive


@torch.no_grad()
def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(logits)) of each position, in nat.

    Args: both [..., vocab], any float dtype. Returns: fp32 [...], not below 0.

    Raises ValueError where the shapes differ.
    """
    if reference.shape != logits.shape:
        raise ValueError(f"logits of one shape are needed, not {list(reference.shape)} and {list(logits.shape)}")
    words = reference.shape[-1]
    rows = max(1, AT_ONCE // words)
    parts = zip(reference.reshape(-1, words).split(rows), logits.reshape(-1, words).split(rows), strict=True)
    return torch.cat([_divergence(*part) for part in parts]).view(reference.shape[:-1])


def _divergence(reference: Tensor, logits: Tensor) -> Tensor:
    known, said = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    return (known.exp() * (known - said)).sum(-1).clamp(min=0)  # by rounding alone it may fall below
