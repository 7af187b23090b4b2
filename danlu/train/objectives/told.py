"""A model learns from what a teacher told once of rows that are stored (see `danlu.data.told`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from danlu.data.told import ToldBatch
from danlu.errors import DanluError
from danlu.model.mixture import Routing
from danlu.model.told_loss import Told, linear_told
from danlu.model.transformer import Model
from danlu.train.objective import StackObjective, Words, word_head, word_weights


@dataclass(frozen=True)
class ToldDistillation(StackObjective):
    """alpha KL(teacher || model) over the words the teacher named and all others as one + (1 - alpha) of another
    objective (`danlu.model.told_loss.told_gradient`). Rows that no teacher was asked about, such as those that are held
    out, are judged by the other alone.

    Attributes:
        hard: the objective of the rows' own words.
        alpha: the teacher's share.

    Raises DanluError where it is out of its range.
    """

    hard: Words
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise DanluError(f"alpha {self.alpha} must be between 0 and 1", where="distillation")

    def hidden(self, model: Any, batch: Any, x: Tensor | None = None, routes: list[Routing] | None = None) -> Tensor:
        """As the hard objective's."""
        return self.hard.hidden(model, batch, x, routes)

    def score(self, model: Model, hidden: Tensor, batch: Any) -> Tensor:
        """In nat."""
        if not isinstance(batch, ToldBatch):
            return self.hard.score(model, hidden, batch)
        assert batch.told is not None and batch.logprobs is not None
        head, weight = word_head(model)
        return linear_told(
            head.features(hidden).flatten(0, 1),
            weight,
            batch.targets.flatten(),
            head.bias,
            Told(batch.told.flatten(0, 1), batch.logprobs.flatten(0, 1)),
            self.alpha,
            smoothing=self.hard.smoothing,
            z=self.hard.z,
            weights=word_weights(batch),
        )
