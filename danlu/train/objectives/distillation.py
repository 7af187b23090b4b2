"""A small model learns from a large one what it thinks of every word or label (arXiv:1503.02531)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from danlu.errors import DanluError
from danlu.model.loss import Taught, linear_distillation
from danlu.model.mixture import Routing
from danlu.model.transformer import Model
from danlu.train.objective import (
    IGNORED,
    Labels,
    Loss,
    StackObjective,
    Words,
    label_logits,
    routing_penalty,
    weighted_sum,
    word_head,
    word_weights,
)
from danlu.train.objectives.own_text import continued
from danlu.train.objectives.states import state_difference


@dataclass(frozen=True)
class Distillation(StackObjective):
    """alpha T^2 KL(teacher's softmax at temperature T || the model's) + (1 - alpha) of another objective.

    Attributes:
        hard: the objective of words or labels that both models are made for.
        teacher: reads the same batches; it is set to evaluate and gets no gradient.
        temperature: T, in units of logits.
        alpha: the teacher's share.
        reverse: the divergence of words is taken from the model's side.
        states: weight of the difference of hidden states (`state_difference`); no part of the loss that is reported.
        own: share of each row that the model writes itself while it learns (`continued`); what it has written is
            learned from the teacher alone.

    Raises DanluError where a setting is out of its range.
    """

    hard: Words | Labels
    teacher: Model
    temperature: float = 2.0
    alpha: float = 0.5
    reverse: bool = False
    states: float = 0.0
    own: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 <= self.alpha <= 1:
            what = f"temperature {self.temperature} must be more than 0, alpha {self.alpha} between 0 and 1"
            raise DanluError(what, where="distillation")
        self.teacher.eval()

    def hidden(self, model: Any, batch: Any, x: Tensor | None = None, routes: list[Routing] | None = None) -> Tensor:
        """As the hard objective's."""
        return self.hard.hidden(model, batch, x, routes)

    def score(self, model: Model, hidden: Tensor, batch: Any) -> Tensor:
        """In nat. Raises DanluError where the two models differ in their words or labels."""
        with torch.no_grad():
            taught = self.hard.hidden(self.teacher, batch)
        if isinstance(self.hard, Words):
            return self._words(self.hard, model, hidden, taught, batch, batch.targets, self.alpha)
        return self._labels(self.hard, model, hidden, taught, batch)

    def __call__(self, model: Any, batch: Any) -> Loss:
        """With what is asked for besides: hidden states, and rows that the model writes itself."""
        if not isinstance(self.hard, Words) or not (self.states or self.own):
            return super().__call__(model, batch)
        written = torch.zeros_like(batch.targets, dtype=torch.bool)
        if self.own and model.training:
            batch, written = continued(model, batch, self.own)
        routes: list[Routing] = []
        states: list[Tensor] = []
        known: list[Tensor] = []
        hidden = self.hard.hidden(model, batch, routes=routes, states=states)
        with torch.no_grad():
            taught = self.hard.hidden(self.teacher, batch, states=known)
        score = partial(self._words, self.hard, model, hidden, taught, batch)
        total = score(batch.targets.masked_fill(written, IGNORED), self.alpha)
        if written.any():
            total = total + score(batch.targets.masked_fill(~written, IGNORED), 1.0)
        penalty = routing_penalty(model, routes, batch)
        if self.states and model.training:
            penalty = penalty + self.states * state_difference(model, states, known, batch.targets != IGNORED)
        return Loss(total, batch.count, penalty)

    def _words(
        self, hard: Words, model: Model, hidden: Tensor, taught: Tensor, batch: Any, targets: Tensor, alpha: float
    ) -> Tensor:
        (head, weight), (teacher, known) = word_head(model), word_head(self.teacher)
        _alike(len(weight), len(known), "words")
        with torch.no_grad():
            features = teacher.features(taught).flatten(0, 1)
        return linear_distillation(
            head.features(hidden).flatten(0, 1),
            weight,
            targets.flatten(),
            head.bias,
            Taught(features, known, teacher.bias),
            self.temperature,
            alpha,
            smoothing=hard.smoothing,
            z=hard.z,
            weights=word_weights(batch),
            reverse=self.reverse,
        )

    def _labels(self, hard: Labels, model: Model, hidden: Tensor, taught: Tensor, batch: Any) -> Tensor:
        with torch.no_grad():
            wanted = label_logits(self.teacher, taught, batch).float() / self.temperature
        logits = label_logits(model, hidden, batch).float()
        _alike(logits.shape[-1], wanted.shape[-1], "labels")
        known, said = wanted.log_softmax(-1), (logits / self.temperature).log_softmax(-1)
        soft = (known.exp() * (known - said)).sum(-1) * self.temperature**2
        if not batch.labels.is_floating_point():
            soft = soft * (batch.labels != IGNORED)
        losses = self.alpha * soft + (1 - self.alpha) * hard.losses(logits, batch.labels)
        return weighted_sum(losses, batch.weights)


def _alike(pupil: int, teacher: int, what: str) -> None:
    if pupil != teacher:
        fix = f"take a teacher with the model's own {what}"
        raise DanluError(f"the model has {pupil:,} {what}, its teacher {teacher:,}", where="distillation", fix=fix)
