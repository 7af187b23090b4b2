"""Tuning a compressed model on a text: a recipe of `danlu train`, carried out by the one loop, and what came of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from danlu.artifact import CARD, Figures, write_aside, write_json
from danlu.data.settings import Source
from danlu.data.stream import IGNORED, Batch
from danlu.errors import DanluError
from danlu.evaluate.bootstrap import interval, paired_change
from danlu.model.checkpoint import Checkpoint
from danlu.model.loss import token_losses
from danlu.model.transformer import Decoder
from danlu.train.mesh import Mesh
from danlu.train.objective import word_head
from danlu.train.recipe import TrainRecipe
from danlu.train.start import start
from danlu.train.tasks.task import make_task

RECIPE = "recipe.yaml"
MEASUREMENTS = 10  # of the held-out text in a run, and checkpoints at least
SHORTEST = 20  # steps from one to the next
ROWS = 256  # held-out rows, at most


@dataclass(frozen=True)
class Tuning:
    """How a model is tuned.

    Attributes:
        texts: files to learn from, or python-docs.
        steps: optimizer steps.
        rows, window: of a step, and the tokens of each.
        learning_rate: at its highest; it rises over the first twentieth and falls to 0.
        heldout: share of the text that is kept back to measure with.
        heldout_from: documents, of which there must be many, or the end of each file: that which the model has not
            learned from before.
        seed: decides every random choice.
    """

    texts: tuple[str, ...]
    steps: int
    rows: int = 8
    window: int = 256
    learning_rate: float = 3e-4
    heldout: float = 0.05
    heldout_from: Literal["documents", "end"] = "end"
    seed: int = 0

    def recipe(self, model: Checkpoint, objective: Mapping[str, Any], name: str) -> TrainRecipe:
        """The recipe that tunes a model with an objective, its paths whole."""
        window = min(self.window, model.config.context)
        sources = [Source(path=text).beside(Path.cwd()).path for text in self.texts]
        base, every = str(model.path.resolve()), max(self.steps // MEASUREMENTS, SHORTEST)
        return TrainRecipe.model_validate(
            {
                "name": name,
                "seed": self.seed,
                "model": {"base": base},
                "data": {
                    "sources": sources,
                    "vocabulary": {"kind": "from", "base": base},
                    "heldout": self.heldout,
                    "heldout_from": self.heldout_from,
                },
                "batch": {"rows": self.rows, "window": window},
                "objective": dict(objective),
                "steps": self.steps,
                "optimizer": {"learning_rate": self.learning_rate, "clip": 1.0},
                "schedule": {"kind": "cosine", "warmup": 0.05, "final_share": 0.0},
                "checkpoints": {"every": min(every, 100)},
                "validation": {"every": every, "rows": ROWS},
            }
        )


def tune(recipe: TrainRecipe, out: Path) -> Checkpoint:
    """Carry a recipe out in OUT, going on where it was stopped; OUT/recipe.yaml is for `danlu train`, too.

    Raises DanluError where OUT holds a run of another recipe, the text is too short, or the run was stopped by Ctrl-C
    before its end: the same command goes on.
    """
    with beginning(out):
        keep_to(out / RECIPE, yaml.safe_dump(recipe.plain(), sort_keys=False, allow_unicode=True), _as_recipe)
        prepare(recipe, out)
    done = start(recipe, out, plan=None, steps=None)
    if "model" not in done:
        raise DanluError("was stopped", where=out, fix="the same command goes on")
    return Checkpoint.open(done["model"])


@contextmanager
def beginning(out: Path) -> Iterator[None]:
    """A directory in which something is begun; where that fails, what it had put there is gone.

    So other settings, which may be right, are not refused for the sake of those that were wrong.
    """
    there = set(out.iterdir()) if out.is_dir() else None
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for place in set(out.iterdir() if out.is_dir() else ()) - (there or set()):
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        if there is None and out.is_dir():
            out.rmdir()
        raise


def prepare(recipe: TrainRecipe, out: Path) -> None:
    """Read a recipe's text into OUT, where its run finds it.

    Raises DanluError where it cannot be read, or does not fill a row to learn from and rows to measure on.
    """
    heldout_rows(recipe, out)
    make_task(recipe, out).stream(Mesh())


def _as_recipe(text: str) -> object:
    """What a recipe's text says; settings that are younger than it are as they come."""
    try:
        return TrainRecipe.model_validate(yaml.safe_load(text))
    except (ValueError, yaml.YAMLError):
        return None


def keep_to(file: Path, text: str, read: Callable[[str], object] = str) -> None:
    """Note what is made in a directory. Raises DanluError where something else was begun there.

    Args: read: what of a note counts.
    """
    if file.exists() and read(file.read_text(encoding="utf-8")) != read(text):
        what = f"holds what was made with other settings: {file.name} says which"
        raise DanluError(what, where=file.parent, fix="name the same ones, or another --out")
    write_aside(file, text)


@dataclass(frozen=True)
class RowLosses:
    """What a model makes of each held-out row: the sum of the losses of its targets, in nat, and their number."""

    sums: NDArray[np.float64]
    counts: NDArray[np.int64]

    @property
    def mean(self) -> float:
        """In nat/token."""
        return float(self.sums.sum() / max(self.counts.sum(), 1))

    def figure(self, by: str) -> dict[str, Any]:
        """With its interval over rows."""
        return interval(self.sums, self.counts).figure("nat/token", by)

    def change(self, after: RowLosses) -> dict[str, Any]:
        """Of the loss, as a share, with its interval over rows that are drawn for both models alike."""
        relative = paired_change(self.sums, after.sums, self.counts).relative
        assert relative is not None, "a loss is not 0"
        return relative.figure("share", "rows resampled in pairs")


def heldout_rows(recipe: TrainRecipe, out: Path) -> list[Batch]:
    """The rows that the run in OUT does not learn from. Raises DanluError where there are none."""
    batches = make_task(recipe, out).heldout(Mesh())
    if batches is None:
        raise DanluError("no text is held out", where=out, fix="hold some out, or add text")
    return list(batches)


@torch.inference_mode()
def row_losses(
    model: Decoder, batches: Iterable[Batch], read: Callable[[Batch], torch.Tensor] | None = None
) -> RowLosses:
    """The loss of each row.

    Args: read: hidden states [B, T, width] behind a norm, in place of those at the model's end.
    """
    sums: list[float] = []
    counts: list[int] = []
    for batch in batches:
        hidden = _at_end(model, batch) if read is None else read(batch)
        head, weight = word_head(model)
        losses, _ = token_losses(head.features(hidden).flatten(0, 1), weight, batch.targets.flatten())
        sums += losses.view(batch.targets.shape).double().sum(1).tolist()
        counts += (batch.targets != IGNORED).sum(1).tolist()
    return RowLosses(np.array(sums), np.array(counts))


def _at_end(model: Decoder, batch: Batch) -> torch.Tensor:
    return model(batch.tokens, positions=batch.positions, segments=batch.segments)


def note(out: Path, kind: str, inputs: Mapping[str, str], figures: Figures) -> dict[str, Any]:
    """Add to the card of a run what it was made from, by digest, and what was measured; the whole card."""
    card = json.loads((out / CARD).read_text(encoding="utf-8"))
    card |= {"kind": kind, "inputs": dict(inputs), "figures": card["figures"] | figures}
    write_json(out / CARD, card)
    return card
