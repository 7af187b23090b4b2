"""A model learns again what it lost, or a smaller one what it never knew: from a teacher, on a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from danlu.artifact import Figures
from danlu.compress.learning.tuning import RowLosses, Tuning, heldout_rows, note, row_losses, tune
from danlu.console import say
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint


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
        before, after, teacher: losses on the rows that were held out.
        figures: of the card.
    """

    model: Path
    before: RowLosses
    after: RowLosses
    teacher: RowLosses
    figures: Figures

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values."""
        losses = {"before": self.before.mean, "after": self.after.mean, "teacher": self.teacher.mean}
        return {"model": str(self.model), **losses, "figures": self.figures}


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
    rows = heldout_rows(recipe, out)
    known, before, after = (row_losses(each.load(), rows) for each in (teacher, student, made))
    by = f"{len(rows) * tuning.rows} held-out rows of {', '.join(tuning.texts)}"
    figures = {
        "loss_before": before.figure(by),
        "loss": after.figure(by),
        "loss_teacher": known.figure(by),
        "loss_change_to_teacher": known.change(after),
    }
    card = note(out, "distill", {"student": student.digest, "teacher": teacher.digest}, figures)
    say(
        f"distill: held-out loss {before.mean:.4f} -> {after.mean:.4f} nat/token; the teacher's is {known.mean:.4f} "
        f"({after.mean / known.mean - 1:+.1%})"
    )
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
