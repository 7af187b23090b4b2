"""The loss towards what a teacher told of a few words at each place, in place of all its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from danlu.model.loss import IGNORED, PART_LOGITS, LinearLoss, softmax_gradient, weighted_gradient


@dataclass(frozen=True)
class Told:
    """What a teacher said of N tokens: its likeliest words there, and by what they leave, how likely all others are.

    Attributes:
        ids: int64 [N, K], different words of the pupil's.
        logprobs: fp32 [N, K], in nat; in columns that no word stands in so low that e to it is 0, with the id of one of
            its row's words.
    """

    ids: Tensor
    logprobs: Tensor


def told_gradient(
    logits: Tensor, told: Told, targets: Tensor, alpha: float, smoothing: float = 0.0, z: float = 0.0
) -> Tensor:
    """The loss of each row in nat, fp32 [N]; `logits`, [N, vocab], are overwritten by its gradient.

    alpha KL(teacher || softmax(logits)) + (1 - alpha) hard loss, the divergence over K + 1 classes: each word that the
    teacher named, and all others as one. Both sides are distributions over these classes, so it is no less than 0, and
    is 0 only where they agree; it is never more than that over all words, and equals it where all are named.

    Args:
        told: of the same rows.
        targets, smoothing, z: of the hard loss; see `softmax_gradient`.
        alpha: the teacher's share.
    """
    rows = max(1, PART_LOGITS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    parts = zip(*(each.split(rows) for each in (logits, told.ids, told.logprobs, targets)), strict=True)
    losses = []
    for part, ids, known, chosen in parts:
        said = torch.log_softmax(part, -1, dtype=torch.float32)
        chances = known.exp()
        behind = torch.where(chances > 0, chances * (known - said.gather(-1, ids)), 0.0).sum(-1)
        unnamed = said.scatter(-1, ids, -torch.inf)
        others = unnamed.logsumexp(-1, keepdim=True)
        some = others > -torch.inf  # or else every word is named, and what is left is only rounding
        others = torch.where(some, others, 0.0)
        left = torch.where(some, (1 - chances.sum(-1, keepdim=True)).clamp(min=0), 0.0)
        soft = behind + torch.where(left > 0, left * (left.log() - others), 0.0)[:, 0]
        # Each other word's share of what is left is as the pupil has it.
        to_soft = said.exp_().sub_(unnamed.sub_(others).exp_().mul_(left))
        to_soft.scatter_add_(-1, ids, -chances)
        hard = softmax_gradient(part, chosen, smoothing, z)
        part.mul_(1 - alpha).add_(to_soft, alpha=alpha)
        losses.append(alpha * soft + (1 - alpha) * hard)
    return torch.cat(losses)


def linear_told(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    told: Told,
    alpha: float,
    *,
    smoothing: float = 0.0,
    z: float = 0.0,
    weights: Tensor | None = None,
) -> Tensor:
    """The sum of `told_gradient`'s losses over trained tokens, a float64 scalar. See `linear_cross_entropy`."""
    trained = (targets != IGNORED).nonzero()[:, 0]
    chosen, ids, known = targets[trained], told.ids[trained], told.logprobs[trained]

    def to_gradient(logits: Tensor, rows: slice) -> Tensor:
        return told_gradient(logits, Told(ids[rows], known[rows]), chosen[rows], alpha, smoothing, z)

    turned = weighted_gradient(to_gradient, weights, trained)
    return LinearLoss.apply(hidden[trained], weight, bias, turned, len(weight))
