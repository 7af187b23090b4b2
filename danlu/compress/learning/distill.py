"""A model learns again what it lost, or a smaller one what it never knew: from a teacher, on a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from danlu.artifact import Figures
from danlu.compress.learning.asking import Question, ask, teacher_losses
from danlu.compress.learning.endpoint import Endpoint
from danlu.compress.learning.reading import Reader
from danlu.compress.learning.served import PROBED, Teacher
from danlu.compress.learning.tuning import (
    RECIPE,
    RowLosses,
    Tuning,
    beginning,
    heldout_rows,
    keep_to,
    note,
    row_losses,
    tune,
)
from danlu.console import say
from danlu.data.corpus import Crops
from danlu.data.settings import Side
from danlu.data.text_settings import TextSettings
from danlu.data.told import HELDOUT, ToldRows, is_told
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint
from danlu.train.mesh import Mesh
from danlu.train.recipe import ObjectiveSettings, TrainRecipe
from danlu.train.tasks.teacher import check_told
from danlu.train.tasks.text import CORPUS, make_text_task

ASKED = "asked.yaml"
TOP = 20  # of the likeliest words at each place: the most that OpenAI gives, and vLLM unless told otherwise


@dataclass(frozen=True)
class Teaching:
    """What is learned from a teacher; the names and defaults of a recipe's `objective`.

    Attributes:
        temperature: what both models' logits are divided by.
        share: of the loss, the teacher's; the text's words have the rest.
        divergence: forward or reverse.
        states: weight of hidden states.
        own: share of each row that the student writes itself.
    """

    temperature: float = 1.0
    share: float = 0.5
    divergence: Literal["forward", "reverse"] = "forward"
    states: float = 0.0
    own: float = 0.0


@dataclass(frozen=True)
class Distilled:
    """What came of it.

    Attributes:
        model: the directory of the student.
        before, after, teacher: losses on the rows that were held out; none of a teacher that could not be asked.
        figures: of the card.
    """

    model: Path
    before: RowLosses
    after: RowLosses
    teacher: RowLosses | None
    figures: Figures

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values."""
        losses = {"before": self.before.mean, "after": self.after.mean}
        known = {} if self.teacher is None else {"teacher": self.teacher.mean}
        return {"model": str(self.model), **losses, **known, "figures": self.figures}


def distill(student: Checkpoint, teacher: Checkpoint, tuning: Tuning, teaching: Teaching, out: Path) -> Distilled:
    """Tune a student on a text towards its teacher, and measure both on the part of the text that was held out.

    OUT/model is the student, OUT/card.json says what it was made from and what was measured. The same command on the
    same directory goes on where it was stopped.

    Raises DanluError where the two have not the same words, or the text is too short.
    """
    _check_words(student, teacher)
    objective = {"teacher": str(teacher.path.resolve()), **vars(teaching)}
    recipe = tuning.recipe(student, objective, "distill")
    made = tune(recipe, out)
    known = row_losses(teacher.load(), heldout_rows(recipe, out))
    return _measured(student, made, recipe, tuning, out, known, teacher.digest)


def distill_from(
    student: Checkpoint, endpoint: Endpoint, tuning: Tuning, teaching: Teaching, out: Path, most: int, writes: bool
) -> Distilled:
    """The same with a teacher behind a server: it is asked once, before, and what it said is learned from.

    OUT/teacher-... is what it said; for what else there is, and going on, see `distill`.

    Args:
        most: of the likeliest words at each place; more of them teach more.
        writes: learn what the teacher writes itself, not what it thinks of the text; so it is done, too, where a
            server cannot score text.

    Raises DanluError where the server cannot be reached, gives no log probabilities or has other words, where more is
    to be learned than it can tell, or the text is too short.
    """
    check_told(ObjectiveSettings.model_validate({"teacher": endpoint.url, **vars(teaching)}))
    recipe = tuning.recipe(student, {}, "distill")
    told = _told_before(out, endpoint)
    if told is None:
        about = endpoint.find_model()
        _check_context(recipe.batch.window, about.get("max_model_len"), endpoint)
    asked = {"student": student.digest, "teacher": endpoint.model, "top": most, "writes": writes}
    asked |= {"share": teaching.share, "tuning": recipe.plain()}
    with beginning(out):
        keep_to(out / ASKED, yaml.safe_dump(asked, sort_keys=False))
        if told is None:
            question = _question(recipe, tuning, out)
            reader = Reader(student.tokenizer, student.config.vocab_size, endpoint.url)
            teacher = Teacher.meet(endpoint, reader, most, _probe(question), writes)
    if told is None:
        way = "scores the text" if teacher.scores else "goes on with beginnings of the text"
        say(f"distill: {endpoint.model} {way}")
        told = ask(teacher, question, out).path.resolve()
        endpoint.close()
    recipe = tuning.recipe(student, {"teacher": str(told), "share": teaching.share}, "distill")
    made = tune(recipe, out)
    scored = (told / HELDOUT).is_file()
    known = RowLosses(*teacher_losses(ToldRows.open(told, file=HELDOUT))) if scored else None
    return _measured(student, made, recipe, tuning, out, known, ToldRows.open(told).digest)


def _told_before(out: Path, endpoint: Endpoint) -> Path | None:
    """What the teacher of a run that is under way has told, which needs its server no more.

    Where the teacher was not named, it is the one of that run.
    """
    if (out / ASKED).is_file():
        endpoint.model = endpoint.model or str(yaml.safe_load((out / ASKED).read_text(encoding="utf-8"))["teacher"])
    if not (out / RECIPE).is_file():
        return None
    place = yaml.safe_load((out / RECIPE).read_text(encoding="utf-8"))["objective"]["teacher"]
    return Path(place) if place is not None and is_told(place) else None


def _question(recipe: TrainRecipe, tuning: Tuning, out: Path) -> Question:
    """The rows of a recipe's text, as many as its steps can use."""
    assert isinstance(recipe.data, TextSettings)
    task = make_text_task(recipe, recipe.data, out)
    batches = task.heldout(Mesh())
    heldout = [] if batches is None else list(batches)

    def crops(side: Side) -> Crops:
        return task.crops(side, recipe.batch.window, None)[CORPUS]

    measured = crops("heldout") if heldout else None
    return Question(crops("train"), measured, tuning.steps * tuning.rows, len(heldout) * tuning.rows, tuning.seed)


def _probe(question: Question) -> list[int]:
    """A few tokens of the text."""
    first: list[int] = question.train.batch(np.zeros(1, np.int64)).tokens[0, :PROBED].tolist()
    return first


def _check_context(window: int, longest: object, endpoint: Endpoint) -> None:
    if isinstance(longest, int) and longest < window + 1:
        what = f"{endpoint.model} reads {longest:,} tokens, and rows have {window:,} and the one behind them"
        raise DanluError(what, where=endpoint.url, fix=f"--window {longest - 1}, or serve it with a longer context")


def _measured(
    student: Checkpoint,
    made: Checkpoint,
    recipe: TrainRecipe,
    tuning: Tuning,
    out: Path,
    known: RowLosses | None,
    teacher: str,
) -> Distilled:
    """Compare a student before and after on what was held out, and with its teacher; note it on the card.

    Args: known: the teacher's losses; teacher: its digest.
    """
    rows = heldout_rows(recipe, out)
    before, after = (row_losses(each.load(), rows) for each in (student, made))
    by = f"{len(rows) * tuning.rows} held-out rows of {', '.join(tuning.texts)}"
    figures = {"loss_before": before.figure(by), "loss": after.figure(by)}
    said = f"distill: held-out loss {before.mean:.4f} -> {after.mean:.4f} nat/token"
    if known is not None:
        figures |= {"loss_teacher": known.figure(by), "loss_change_to_teacher": known.change(after)}
        said += f"; the teacher's is {known.mean:.4f} ({after.mean / known.mean - 1:+.1%})"
    card = note(out, "distill", {"student": student.digest, "teacher": teacher}, figures)
    say(said)
    return Distilled(made.path, before, after, known, card["figures"])


def _check_words(student: Checkpoint, teacher: Checkpoint) -> None:
    """Before any work: both must say the same of the same ids."""
    sizes = student.config.vocab_size, teacher.config.vocab_size
    what = f"the student has words for {sizes[0]:,} ids, its teacher for {sizes[1]:,}"
    if sizes[0] == sizes[1]:
        one, other = (each.tokenizer.complete_backend.get_vocab() for each in (student, teacher))
        what = "the student's tokens are not its teacher's" if one != other else ""
    if what:
        raise DanluError(what, where="distill", fix="take a teacher with the student's vocabulary")
