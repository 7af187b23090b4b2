"""A checkpoint of a run -> a model that everyone can load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from danlu.errors import DanluError
from danlu.model.checkpoint import check_place, save_checkpoint
from danlu.model.scales import fold_scales
from danlu.model.transformer import make_model
from danlu.train.loop import BUFFER
from danlu.train.state import CHECKPOINTS, Saved, open_checkpoint
from danlu.train.tasks.shape import exported, model_config, plain_config
from danlu.train.tasks.task import RECIPE, make_task, noted_recipe


@dataclass(frozen=True)
class Exported:
    """What was written: the step it comes from, and whether averaged weights were taken."""

    out: Path
    step: int
    averaged: bool

    def plain(self) -> dict[str, Any]:
        return {"out": str(self.out), "step": self.step, "averaged": self.averaged}


def export(run: Path, out: Path, step: int | None = None, averaged: bool | None = None) -> Exported:
    """Write a checkpoint as a Hugging Face directory, with the tokenizer beside the weights.

    Args:
        run: the run's directory.
        out: the directory to write; a model that stands there is replaced once the new one is whole.
        step: which checkpoint; by default the newest whole one.
        averaged: the running average of the weights; by default where there is one.

    Raises DanluError where there is no such checkpoint, or no average, the run's note of its recipe is damaged, or
    `out` holds something else than a model.
    """
    check_place(out)
    saved = open_checkpoint(run / CHECKPOINTS, step)
    if saved is None or not (run / RECIPE).is_file():
        raise DanluError("holds no checkpoint of a training run", where=run, fix="name the directory of `danlu train`")
    settings = noted_recipe(run)
    has_average = any(name.startswith("average.") for name in saved.names)
    if averaged and not has_average:
        raise DanluError("the run keeps no average of its weights", where=run, fix="set optimizer.ema in the recipe")
    take = has_average if averaged is None else averaged
    task = make_task(settings, run)
    model = make_model(exported(plain_config(settings, task)))
    _fill(model, saved, "average." if take else "master.")
    fold_scales(model, model_config(settings, task))
    save_checkpoint(model, task.tokenizer, out)
    return Exported(out, saved.step, take)


@torch.no_grad()
def _fill(model: torch.nn.Module, saved: Saved, kind: str) -> None:
    for name, weight in model.named_parameters():
        weight.copy_(saved.read(kind + name))
    for name, buffer in model.named_buffers():
        buffer.copy_(saved.read(BUFFER + name))
