"""What is minimised: functions from a model and a batch to a sum and a count, so that means survive any cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from danlu.data.stream import Batch
from danlu.model.config import Experts
from danlu.model.head import WordHead
from danlu.model.loss import linear_cross_entropy
from danlu.model.mixture import Routing, balance_loss, z_loss
from danlu.model.transformer import Decoder


@dataclass(frozen=True)
class Loss:
    """A loss before division.

    Attributes:
        sum: in nat, a scalar to call backward on.
        count: targets that it sums over.
        penalty: what else is minimised with it, times `count`; no part of the loss that is reported.
    """

    sum: Tensor
    count: int
    penalty: Tensor | float = 0.0


Objective = Callable[[Any, Any], Loss]  # from a model and one of its batches


def next_token(model: nn.Module, batch: Batch) -> Loss:
    """Cross-entropy of the next token and, with a mixture, the losses on its routers (see `danlu.model.mixture`)."""
    assert isinstance(model, Decoder) and isinstance(model.head, WordHead)
    routes: list[Routing] | None = None if model.config.experts is None else []
    hidden = model(batch.tokens, positions=batch.positions, segments=batch.segments, routes=routes)
    features = model.head.features(hidden).flatten(0, 1)
    total = linear_cross_entropy(features, model.head_weight, batch.targets.flatten(), model.head.bias)
    return Loss(total, batch.count, _penalty(routes, model.config.experts) * batch.count)


def _penalty(routes: list[Routing] | None, experts: Experts | None) -> Tensor | float:
    """The weighted losses on all routers of a batch."""
    if not routes or experts is None:
        return 0.0
    balance = experts.balance * balance_loss(routes, experts) if experts.balance else 0.0
    return balance + (experts.z * z_loss(routes) if experts.z else 0.0)
