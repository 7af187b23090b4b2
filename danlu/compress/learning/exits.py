"""Early exits: a model is tuned to answer behind some of its blocks, and every setting of guessing is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch

from danlu.artifact import Figures, figure, write_json
from danlu.compress.learning.early_exit import Guessing, write_early
from danlu.compress.learning.tuning import RowLosses, Tuning, heldout_rows, note, row_losses, tune
from danlu.console import progress, say, table
from danlu.data.stream import Batch
from danlu.evaluate.bootstrap import proportion
from danlu.model.checkpoint import Checkpoint
from danlu.model.generate import generate
from danlu.model.transformer import Decoder
from danlu.train.objectives.exits import check_exits

GUESSES = ((2, 0.0), (4, 0.0), (4, 0.4), (8, 0.5))  # before a check, and how sure each must be
TABLE = "exits.json"


@dataclass(frozen=True)
class Setting:
    """One way to write with exits, measured.

    Attributes:
        exit: blocks that guess.
        guesses: before a check, at most.
        sure: probability that each must be given.
        kept_share: of the guesses, those that were right.
        faster: token/s by those of the model without exits, the median over the prompts; span: the least and the most.
        same: share of the answers that are the model's own to the last token.
        loss: of the exit alone, nat/token on held-out rows: what answering there without a check costs.
    """

    exit: int
    guesses: int
    sure: float
    kept_share: float
    faster: float
    span: tuple[float, float]
    same: float
    loss: float

    @property
    def name(self) -> str:
        """What it is called among those of its exit."""
        return f"guesses_{self.guesses}_sure_{self.sure:g}"

    def told(self, prompts: int, tokens: int) -> Figures:
        """As figures of a card, measured on so many prompts, each continued by at most so many tokens."""
        by = f"greedy answers to {prompts} prompts, {tokens} tokens each"
        beside = f"token/s beside the model without exits, median of {by}; the range is that of the prompts"
        return {
            "kept_share": figure(self.kept_share, "share", by=f"guesses that were right in {by}"),
            "faster": figure(self.faster, "x", *self.span, by=beside),
            "same": proportion(round(self.same * prompts), prompts).figure("share", "answers equal to the last token"),
        }


@dataclass(frozen=True)
class Exits:
    """What came of it.

    Attributes:
        model: its directory.
        loss: at its end, nat/token on held-out rows; change: of it by tuning, a share with its interval.
        settings: all that were measured, the fastest first.
        figures: of the card.
    """

    model: Path
    loss: float
    settings: list[Setting]
    figures: Figures

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return {
            "model": str(self.model),
            "loss": self.loss,
            "settings": [vars(each) for each in self.settings],
            "figures": self.figures,
        }


def tune_exits(
    model: Checkpoint, layers: tuple[int, ...], tuning: Tuning, out: Path, prompts: int = 6, tokens: int = 64
) -> Exits:
    """Teach a model to answer behind some blocks, and measure what guessing there saves.

    OUT/model is the tuned model, OUT/exits.json every setting, the fastest first, and OUT/card.json the fastest and
    then all of them by exit, with what they were made from. The same command on the same directory goes on where it
    was stopped.

    Args:
        layers: numbers of blocks with an exit behind them.
        prompts, tokens: beginnings of held-out rows that are continued, and tokens of each answer, at most half of the
            context.

    Raises DanluError where there is no such exit, or the text is too short.
    """
    check_exits(model.model.config, layers)
    recipe = tuning.recipe(model, {"exits": list(layers)}, "exits")
    made = tune(recipe, out)
    rows = heldout_rows(recipe, out)
    before, tuned = row_losses(model.load(), rows), made.load()
    after = row_losses(tuned, rows)
    tokens = min(tokens, tuned.config.context // 2)
    begins = _beginnings(rows, prompts, tuned.config.context - tokens)
    settings: list[Setting] = []
    there: dict[int, RowLosses] = {}
    with progress("exits", len(layers) * len(GUESSES), "settings") as tick:
        for layer in layers:
            there[layer] = row_losses(tuned, rows, partial(_early, tuned, layer))
            for guesses, sure in GUESSES:
                settings.append(_measure(tuned, Guessing(layer, guesses, sure), begins, tokens, there[layer].mean))
                tick.advance(1)
    settings.sort(key=lambda each: -each.faster)
    best = settings[0]
    by = f"{len(rows) * tuning.rows} held-out rows of {', '.join(tuning.texts)}"
    found: Figures = {
        "loss_before": before.figure(by),
        "loss": after.figure(by),
        "loss_change": before.change(after),
        "exit": figure(best.exit, "block"),
        "guesses": figure(best.guesses, "token", by="before a check, at most"),
        "sure": figure(best.sure, "probability", by="that a guess must be given"),
        **best.told(len(begins), tokens),
        "exits": {
            f"behind_{layer}": {
                "loss": loss.figure(f"without a check; {by}"),
                "loss_change": after.change(loss),
                **{each.name: each.told(len(begins), tokens) for each in settings if each.exit == layer},
            }
            for layer, loss in there.items()
        },
    }
    write_json(out / TABLE, [vars(each) for each in settings])
    card = note(out, "exits", {"model": model.digest}, found)
    return Exits(made.path, after.mean, settings, card["figures"])


def print_exits(made: Exits) -> None:
    """The settings as a table."""
    columns = ("exit", "guesses", "sure", "kept", "faster", "same text", "loss there")
    lines = [
        (
            *(str(each.exit), str(each.guesses), f"{each.sure:g}", f"{each.kept_share:.0%}"),
            *(f"{each.faster:.2f}x", f"{each.same:.0%}", f"{each.loss:.4f}"),
        )
        for each in made.settings
    ]
    table(f"{made.model}: loss at the end {made.loss:.4f}", columns, lines)
    say("kept: of the guesses, those that were right; loss there: nat/token of an answer without a check")


def _beginnings(rows: list[Batch], count: int, room: int) -> list[list[int]]:
    """The first halves of held-out rows, at most so many tokens long."""
    halves = (row[: min(max(len(row) // 2, 1), room)].tolist() for batch in rows for row in batch.tokens)
    return list(islice(halves, count))


def _early(model: Decoder, layer: int, batch: Batch) -> torch.Tensor:
    """What the head reads at an exit."""
    states: list[torch.Tensor] = []
    model(batch.tokens, positions=batch.positions, segments=batch.segments, hidden=states)
    assert model.norm is not None
    return model.norm(states[layer])


def _measure(model: Decoder, guessing: Guessing, prompts: list[list[int]], tokens: int, loss: float) -> Setting:
    ratios, same = [], 0
    for prompt in prompts:
        plain, alone = _timed(partial(generate, model, prompt, max_new_tokens=tokens))
        early, fast = _timed(partial(write_early, model, prompt, guessing, max_new_tokens=tokens))
        ratios.append(alone / fast)
        same += early == plain
    return Setting(
        guessing.layer,
        guessing.most,
        guessing.sure,
        guessing.kept_share,
        median(ratios),
        (min(ratios), max(ratios)),
        same / len(prompts),
        loss,
    )


def _timed(write: Callable[[], Iterator[int]]) -> tuple[list[int], float]:
    """An answer, and the seconds from its first token to its last."""
    made = write()
    answer = [next(made)]
    begun = time.perf_counter()
    answer += made
    return answer, time.perf_counter() - begun
