"""What is minimised: functions from a model and a batch to a sum and a count, so that means survive any cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from danlu.data.stream import Batch
from danlu.model.loss import linear_cross_entropy
from danlu.model.transformer import Decoder


@dataclass(frozen=True)
class Loss:
    """A loss before division: `sum` in nat (a scalar to call backward on), over `count` targets."""

    sum: Tensor
    count: int


Objective = Callable[[nn.Module, Batch], Loss]


def next_token(model: nn.Module, batch: Batch) -> Loss:
    """Cross-entropy of the next token."""
    assert isinstance(model, Decoder)
    hidden = model(batch.tokens, positions=batch.positions, segments=batch.segments)
    return Loss(linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, batch.targets.flatten()), batch.count)
