"""What a run must know of a recipe's data and objective, whatever their kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from danlu.artifact import write_json
from danlu.console import say
from danlu.data.batch import Batches
from danlu.data.rows_settings import RowsSettings
from danlu.errors import DanluError
from danlu.model.checkpoint import StoredModel
from danlu.model.transformer import Model
from danlu.plan.plan import Plan
from danlu.train.mesh import Mesh
from danlu.train.notes import read_note
from danlu.train.recipe import TrainRecipe
from danlu.train.replica import Replica
from danlu.train.state import CHECKPOINTS, list_checkpoints
from danlu.train.tasks.labels import make_label_task
from danlu.train.tasks.pairs import make_contrast_task, make_pair_task
from danlu.train.tasks.shape import Shaping
from danlu.train.tasks.text import make_text_task

RECIPE = "recipe.json"
LOST_RECIPE = "put a copy of it back, or delete it: danlu train writes it again from the run's recipe"


class Task(Shaping, Protocol):
    """Rows to learn from, rows to measure on, and what a model does with them.

    Attributes:
        tokenizer: of the rows; it goes beside the model's weights.
        identity: JSON-able; what a run on the same rows has, too.
        keys: of config.json, as Hugging Face calls them, which follow from the rows.
        head: what stands on a new model, as `danlu.model.config.Head.task` says.
        batch: the class of the batches.
        length: tokens of the longest row.
    """

    @property
    def identity(self) -> Any: ...

    @property
    def batch(self) -> type: ...

    def check(self, plan: Plan) -> None:
        """Raise DanluError where a plan cannot carry these rows."""
        ...

    def objectives(self, mesh: Mesh) -> list[Any]:
        """What is minimised and, where figures are made of predictions, behind it what makes them."""
        ...

    def stream(self, mesh: Mesh) -> Batches:
        """This process's rows of every step."""
        ...

    def heldout(self, mesh: Mesh) -> Iterator[Any] | None:
        """This process's part of the rows that are measured, the same rows on any plan; None where none are held out.

        Raises DanluError where they do not fill a batch.
        """
        ...

    def quality(self, replica: Replica) -> dict[str, float]:
        """Figures on the held-out rows besides the loss, the same on every process; {} where there are none."""
        ...

    def test(self, model: Model) -> dict[str, float]:
        """Figures of a finished model on the rows of the test side, by name; {} where there is none."""
        ...


def make_task(settings: TrainRecipe, home: Path) -> Task:
    """The task of a recipe; what is prepared for it stands in the run's directory, and is prepared once.

    Raises DanluError where the data cannot be read, `home` is that of a run on other data, or its note of that is
    damaged.
    """
    note = home / RECIPE
    if note.exists() and read_note(note, lambda saved: saved["data"], LOST_RECIPE) != settings.data.plain():
        what = "was made from other data settings than the recipe's"
        begun = any(list_checkpoints(home / CHECKPOINTS))
        fix = "use the recipe of that run, or another --out" if begun else "delete it, as it has no checkpoint to lose"
        raise DanluError(what, where=home, fix=fix)
    home.mkdir(parents=True, exist_ok=True)
    task = _make(settings, home)
    if not note.exists():
        write_json(note, settings.plain())
    return task


def noted_recipe(home: Path) -> TrainRecipe:
    """The recipe that a run was last carried out with. Raises DanluError where the note of it is damaged."""
    return read_note(home / RECIPE, TrainRecipe.model_validate, LOST_RECIPE)


def _make(settings: TrainRecipe, home: Path) -> Task:
    if not isinstance(settings.data, RowsSettings):
        return make_text_task(settings, settings.data, home)
    if settings.objective.kind == "sequence_to_sequence":
        return make_pair_task(settings, settings.data, home)
    if settings.objective.kind == "contrastive":
        return make_contrast_task(settings, settings.data, home)
    return make_label_task(settings, settings.data, home)


def measure_test(home: Path) -> dict[str, float]:
    """What the model that a run has written makes of the rows that neither training nor validation saw.

    Returns the figures, their names after `test_`; they stand in HOME/test.json, too. {} where there is no test side.
    """
    settings = noted_recipe(home)
    if not isinstance(settings.data, RowsSettings) or not settings.data.test:
        return {}
    model = StoredModel.open(home / "model").load(device="cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        found = {f"test_{name}": value for name, value in make_task(settings, home).test(model).items()}
    write_json(home / "test.json", found)
    say("test: " + ", ".join(f"{name.removeprefix('test_')} {value:.4f}" for name, value in found.items()))
    return found
