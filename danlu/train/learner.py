"""A model together with what it is to minimise, as modules that FSDP and pipelines can call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from danlu.model.mixture import Routing
from danlu.train.objective import Objective, routing_penalty
from danlu.train.pipelined import Attach


class Learner(nn.Module):
    """A model with what it is to minimise, as one module: FSDP gathers what the objective uses, too.

    Args:
        objectives: one for each turn of a step.
    """

    def __init__(self, model: nn.Module, objectives: Sequence[Objective]) -> None:
        super().__init__()
        self.model = model
        self.objectives = tuple(objectives)

    def forward(self, batch: Any, turn: int = 0) -> tuple[Tensor, Tensor | float]:
        """The sum of the losses of a micro-batch, and the penalty."""
        loss = self.objectives[turn](self.model, batch)
        return loss.sum, loss.penalty


class StageLearner(nn.Module):
    """One stage of a pipeline with what the last one is to minimise.

    Attributes:
        scale, penalty_scale: what losses and penalties are multiplied by, set before each step.
        total: the losses of the last stage summed up since it was set to 0, fp64.
    """

    def __init__(self, model: nn.Module, objective: Any, last: bool, batch: type) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.last, self.batch = last, batch
        self.scale = self.penalty_scale = 1.0
        self.total = torch.zeros((), dtype=torch.float64)

    def forward(self, x: Tensor, **inputs: Tensor) -> Tensor:
        """Hidden states [B, T, width] (the first stage: ids [B, T]) -> hidden states, or the scaled loss, fp64 [1].

        Args: inputs: the fields of the micro-batch.
        """
        part = self.batch(**inputs)
        routes: list[Routing] = []
        hidden = self.objective.hidden(self.model, part, x, routes)
        penalty = routing_penalty(self.model, routes, part) * self.penalty_scale
        if not self.last:
            return Attach.apply(hidden, penalty) if routes else hidden
        loss = self.objective.score(self.model, hidden, part)
        self.total += loss.detach().double().cpu()
        return torch.stack([loss.double() * self.scale + penalty])  # FSDP wants no view
