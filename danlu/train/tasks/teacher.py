"""A teacher in a recipe: a trained model whose opinion of every word or label is learned from besides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from danlu.data.told import ToldRows, is_told
from danlu.errors import DanluError
from danlu.model.checkpoint import StoredModel
from danlu.model.config import ModelConfig
from danlu.model.transformer import Decoder, Encoder, Model
from danlu.plan.plan import Plan
from danlu.tokenizer import Tokenizer
from danlu.train.objective import Labels, Words
from danlu.train.objectives.distillation import Distillation
from danlu.train.objectives.elastic import Elastic
from danlu.train.objectives.exits import EarlyExits
from danlu.train.objectives.states import projections
from danlu.train.objectives.told import ToldDistillation
from danlu.train.recipe import ObjectiveSettings, TrainRecipe


def add_projections(model: Model, asked: ObjectiveSettings) -> None:
    """Give a pupil what its hidden states go through before they are compared with a teacher's of another width.

    Args: model: on the meta device; its new weights start and learn as its own do, and are left out of what is written.
    """
    if asked.teacher is None or not asked.states:
        return
    known = StoredModel.open(asked.teacher).config
    if not isinstance(known, ModelConfig) or not isinstance(model, Decoder | Encoder):
        raise DanluError("hidden states are compared between models of one stack", where="objective.states")
    if known.width != model.config.width:
        model.projections = projections(model.config, known.width)


def taught(hard: Words | Labels, asked: ObjectiveSettings, device: torch.device) -> Any:
    """The objective itself, or what is asked for around it: a teacher, early exits, or parts that are models."""
    if asked.exits:
        assert isinstance(hard, Words), "the settings allow exits where words are learned"
        return EarlyExits(hard, asked.exits)
    if asked.elastic is not None:
        assert isinstance(hard, Words), "the settings allow parts where words are learned"
        return Elastic(hard, asked.elastic)
    if asked.teacher is None:
        return hard
    if is_told(asked.teacher):
        check_told(asked)
        assert isinstance(hard, Words), "what was told is words"
        return ToldDistillation(hard, asked.share)
    teacher = StoredModel.open(asked.teacher).load(device=device).requires_grad_(False)
    temperature = 2.0 if asked.temperature is None else asked.temperature
    reverse = asked.divergence == "reverse"
    return Distillation(hard, teacher, temperature, asked.share, reverse, asked.states, asked.own)


def told_rows(settings: TrainRecipe, tokenizer: Tokenizer) -> ToldRows | None:
    """The rows that a teacher was asked about, where the recipe's teacher is the directory of its answers.

    Raises DanluError where the answers are of other words or rows, or do not hold what is asked of them.
    """
    asked, batch = settings.objective, settings.batch
    if asked.teacher is None or not is_told(asked.teacher):
        return None
    check_told(asked)
    rows = ToldRows.open(Path(asked.teacher), settings.seed)
    rows.check_words(tokenizer)
    if batch.growing or not batch.cross_documents or batch.window != rows.window:
        what = f"the teacher was asked about windows of {rows.window:,} tokens, whole and across documents"
        raise DanluError(what, where="batch", fix=f"set window to {rows.window}, and leave the rest of batch.window's")
    return rows


def check_told(asked: ObjectiveSettings) -> None:
    """Raise DanluError where an objective needs more than the likeliest words, which is what a teacher has told."""
    needing = {
        f"kind {asked.kind}: it was asked for next tokens": asked.kind != "next_token",
        f"temperature {asked.temperature}: what is left to all other words has no temperature": asked.temperature
        not in (None, 1.0),
        "divergence reverse: what is left to all other words is too inexact to divide by": asked.divergence
        == "reverse",
        "states: there are no hidden states": asked.states > 0,
        "own: it cannot be asked about what is written now": asked.own > 0,
    }
    for why, holds in needing.items():
        if holds:
            what = f"a teacher's likeliest words are not enough for {why}"
            raise DanluError(what, where="objective", fix="leave it out, or take a teacher whose weights are here")


def check_teacher(asked: ObjectiveSettings, plan: Plan) -> None:
    """Raise DanluError where a plan cuts what a model says, which is compared with what its whole teacher says."""
    cuts = [name for name in ("tensor", "pipeline", "context") if getattr(plan, name) > 1]
    if asked.teacher is not None and cuts:
        what = f"a teacher is whole in every process and cannot be followed under {', '.join(cuts)}"
        raise DanluError(what, where="plan", fix="share rows and weights out instead: data, shard, expert")
    if asked.exits and cuts:
        what = f"exits need all blocks and all of a row in every process, which {', '.join(cuts)} cut"
        raise DanluError(what, where="plan", fix="share rows and weights out instead: data, shard, expert")
    alone = [name for name in ("own", "elastic") if getattr(asked, name)]
    if alone and plan.world > 1:
        what = f"a model with objective.{alone[0]} is trained in one process"
        raise DanluError(what, where="plan", fix=f"leave out objective.{alone[0]}, or start one process")
