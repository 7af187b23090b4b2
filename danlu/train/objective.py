"""What is minimised: functions from a model and a batch to a sum and a count, so that means survive any cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from danlu.data.stream import Batch
from danlu.model.loss import Finish, linear_cross_entropy, softmax_gradient_in_parts
from danlu.model.transformer import Decoder


@dataclass(frozen=True)
class Loss:
    """A loss before division: `sum` in nat (a scalar to call backward on), over `count` targets."""

    sum: Tensor
    count: int


Objective = Callable[[nn.Module, Batch], Loss]


def next_token(finish: Finish = softmax_gradient_in_parts) -> Objective:
    """Cross-entropy of the next token. `finish` is `softmax_gradient_in_parts`, or `softmax_gradient` compiled."""

    def objective(model: nn.Module, batch: Batch) -> Loss:
        assert isinstance(model, Decoder)
        hidden = model(batch.tokens, positions=batch.positions, segments=batch.segments)
        total = linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, batch.targets.flatten(), finish)
        return Loss(total, batch.count)

    return objective
