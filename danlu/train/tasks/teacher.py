"""A teacher in a recipe: a trained model whose opinion of every word or label is learned from besides."""

from __future__ import annotations

from typing import Any

import torch

from danlu.errors import DanluError
from danlu.model.checkpoint import StoredModel
from danlu.plan.plan import Plan
from danlu.train.objective import Labels, Words
from danlu.train.objectives.distillation import Distillation
from danlu.train.recipe import ObjectiveSettings


def taught(hard: Words | Labels, asked: ObjectiveSettings, device: torch.device) -> Any:
    """The objective itself or, where a teacher is named, the distillation of it."""
    if asked.teacher is None:
        return hard
    teacher = StoredModel.open(asked.teacher).load(device=device).requires_grad_(False)
    temperature = 2.0 if asked.temperature is None else asked.temperature
    return Distillation(hard, teacher, temperature, asked.share)


def check_teacher(asked: ObjectiveSettings, plan: Plan) -> None:
    """Raise DanluError where a plan cuts what a model says, which is compared with what its whole teacher says."""
    cuts = [name for name in ("tensor", "pipeline", "context") if getattr(plan, name) > 1]
    if asked.teacher is not None and cuts:
        what = f"a teacher is whole in every process and cannot be followed under {', '.join(cuts)}"
        raise DanluError(what, where="plan", fix="share rows and weights out instead: data, shard, expert")
