"""A model that can answer before its last block: its own norm and head learn to read earlier states, too.

The layers behind an exit are then only asked where the exit was wrong (LayerSkip, arXiv:2404.16710).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from danlu.errors import DanluError
from danlu.model.config import AnyConfig, ModelConfig
from danlu.model.loss import Taught, linear_distillation
from danlu.model.mixture import Routing
from danlu.model.transformer import Model
from danlu.train.objective import Loss, StackObjective, Words, routing_penalty, word_head, word_weights


@dataclass(frozen=True)
class EarlyExits(StackObjective):
    """Words at the end, which alone are reported, and besides them the mean loss of all exits.

    An exit learns half from the targets and half from what the end says, which it is to foresee; the end gets no
    gradient from that.

    Attributes:
        hard: the objective at the end.
        layers: the numbers of blocks behind which an exit is.
    """

    hard: Words
    layers: tuple[int, ...]

    def hidden(self, model: Any, batch: Any, x: Tensor | None = None, routes: list[Routing] | None = None) -> Tensor:
        """As the hard objective's."""
        return self.hard.hidden(model, batch, x, routes)

    def score(self, model: Any, hidden: Tensor, batch: Any) -> Tensor:
        """At the end, in nat."""
        return self.hard.score(model, hidden, batch)

    def __call__(self, model: Any, batch: Any) -> Loss:
        """Raises DanluError where an exit is not before the last block."""
        check_exits(model.config, self.layers)
        routes: list[Routing] = []
        states: list[Tensor] = []
        hidden = self.hard.hidden(model, batch, routes=routes, states=states)
        penalty = routing_penalty(model, routes, batch)
        if model.training:
            exits = [self._exit(model, model.norm(states[number]), hidden, batch) for number in self.layers]
            penalty = penalty + torch.stack(exits).mean()
        return Loss(self.score(model, hidden, batch), batch.count, penalty)

    def _exit(self, model: Model, early: Tensor, hidden: Tensor, batch: Any) -> Tensor:
        head, weight = word_head(model)
        bias = None if head.bias is None else head.bias.detach()
        return linear_distillation(
            head.features(early).flatten(0, 1),
            weight,
            batch.targets.flatten(),
            head.bias,
            Taught(head.features(hidden).detach().flatten(0, 1), weight.detach(), bias),
            temperature=1.0,
            alpha=0.5,
            weights=word_weights(batch),
        )


def check_exits(config: AnyConfig, layers: tuple[int, ...]) -> None:
    """Raise DanluError where a model of one stack with a norm at its end has no exit behind these blocks."""
    blocks = config.layers if isinstance(config, ModelConfig) and config.final_norm else 0
    wrong = [number for number in layers if not 0 < number < blocks]
    if wrong:
        what = f"there is no exit behind block {wrong[0]}: the model has {blocks} blocks with a norm behind the last"
        raise DanluError(what, where="exits", fix=f"name numbers from 1 to {blocks - 1}" if blocks > 1 else None)
