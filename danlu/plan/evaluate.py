"""How wrong the planner is: predictions beside measured runs, learned from other runs or from none."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from danlu.artifact import write_aside
from danlu.console import table as print_table
from danlu.errors import DanluError
from danlu.plan.calibrate import folds, keys
from danlu.plan.jobs import Column, Jobs
from danlu.plan.learned import (
    MEMORY_BELIEF,
    TIME_BELIEF,
    Learned,
    Predicted,
    learn_memory,
    learn_time,
    predict,
)
from danlu.plan.tables import Table, read_tables


@dataclass(frozen=True)
class Score:
    """Errors of predictions against measured runs, in percent.

    Attributes:
        what: is predicted, and of which source.
        rows, groups: how many.
        mean, median, p90, worst: absolute errors.
        inside: share of rows inside the 90 % interval.
        regret, regret3: how much slower the plan predicted to be the fastest (the best measured of the three fastest)
            is than the best measured, on average over groups of two or more plans; nan for memory.
        noise: the source's own: how much more the largest of what one configuration's repeats measured is than the
            smallest, on average over those; where nothing is repeated, what its publisher tells, or nan.
    """

    what: str
    rows: int
    groups: int
    mean: float
    median: float
    p90: float
    worst: float
    inside: float
    regret: float = math.nan
    regret3: float = math.nan
    noise: float = math.nan

    def plain(self) -> dict[str, float | str | None]:
        """As JSON-ready values."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


# Of repeats, in percent, where a source tells it beside its table: pages of one NeMo configuration revised twice, and
# BigScience's repeats on V100s.
TOLD_NOISE = {"nemo": 2.6, "megatron-classic": 4.8}


def repeats(jobs: Jobs, measured: Column) -> list[float]:
    """For each configuration that was measured more than once: by how many percent the most exceeds the least.

    Runs of one configuration differ in nothing that predictions are made from, but may be of different releases.
    """
    columns = tuple(each.name for each in fields(Jobs) if each.name != "release")
    found: dict[tuple[float, ...], list[float]] = {}
    for key, value in zip(keys(jobs, columns), measured.tolist(), strict=True):
        found.setdefault(key, []).append(value)
    return [(max(some) / min(some) - 1) * 100 for some in found.values() if len(some) > 1]


def score(
    what: str,
    told: Column,
    measured: Column,
    spread: Column,
    groups: list[tuple[str, ...]],
    choose: bool,
    noise: float = math.nan,
) -> Score:
    """Errors of rows that were measured. `choose`: also what choosing by the prediction would have cost."""
    error = np.abs(told / measured - 1) * 100
    inside = float(np.mean(np.abs(np.log(told / measured)) <= spread) * 100)
    some = regrets(told, measured, groups) if choose else []
    first, third = (np.array(some).mean(axis=0) * 100).tolist() if some else (math.nan, math.nan)
    return Score(
        what, len(error), len(set(groups)), float(error.mean()), float(np.median(error)),
        float(np.quantile(error, 0.9)), float(error.max()), inside, first, third, noise,
    )  # fmt: skip


def regrets(told: Column, measured: Column, groups: list[tuple[str, ...]]) -> list[tuple[float, float]]:
    """For each group of two or more: what the plan predicted to be the fastest costs, and the best of three."""
    places: dict[tuple[str, ...], list[int]] = {}
    for place, group in enumerate(groups):
        places.setdefault(group, []).append(place)
    found = []
    for at in places.values():
        if len(at) > 1:
            order = measured[at][np.argsort(told[at])]
            best = order.min()
            found.append((float(order[0] / best - 1), float(order[:3].min() / best - 1)))
    return found


NOTHING = Learned({}, TIME_BELIEF), Learned({}, MEMORY_BELIEF)


def cross_validate(table: Table, seed: int = 0, time: bool = True, memory: bool = True) -> Predicted:
    """Each row as predicted by what the rows of other groups taught, in five folds."""
    every = np.arange(len(table.at))
    fold = folds(table.groups, seed=seed)
    columns = np.full((5, len(every)), math.nan)
    for held in range(5):
        test, others = every[fold == held], every[fold != held]
        if len(test):
            times = learn_time(table, others) if time else NOTHING[0]
            memories = learn_memory(table, others) if memory else NOTHING[1]
            columns[:, test] = list(asdict(predict(table, test, times, memories)).values())
    return Predicted(*columns)


def taught(paths: list[Path] | None) -> tuple[Learned, Learned]:
    """What all rows of some tables teach of time and memory; what is believed where there are none."""
    if not paths:
        return NOTHING
    table = read_tables(paths)
    every = np.arange(len(table.at))
    return learn_time(table, every), learn_memory(table, every)


def predict_file(path: Path, out: Path, calibrated: list[Path] | None = None) -> tuple[int, int]:
    """Write a table with `pred_iter_s` and `pred_mem_gib`, or in `pred_note` why there is none.

    Returns: rows predicted, and rows in all. Raises DanluError where a file is empty or of another kind.
    """
    table = read_tables([path])
    told = predict(table, np.arange(len(table.at)), *taught(calibrated))
    for place, row in enumerate(table.rows):
        row |= {"pred_iter_s": "", "pred_mem_gib": "", "pred_note": table.notes.get(place, "")}
    for place, took, held in zip(table.at, told.seconds, told.gib, strict=True):
        table.rows[place] |= {"pred_iter_s": f"{took:.6g}", "pred_mem_gib": f"{held:.5g}"}
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table.rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.rows)
    write_aside(out, text.getvalue())
    return len(table.at), len(table.rows)


def evaluate_file(path: Path, calibrated: list[Path] | None = None) -> list[Score]:
    """Errors by source and by what is predicted. Raises DanluError where nothing was measured that can be predicted."""
    table = read_tables([path])
    told = predict(table, np.arange(len(table.at)), *taught(calibrated))
    found = scores(table, told)
    if not found:
        why = next(iter(table.notes.values()), "nothing was measured")
        raise DanluError(f"no row can be compared: {why}", where=str(path))
    return found


def score_rows(
    what: str, table: Table, at: NDArray[np.intp], guess: Column, truth: Column, spread: Column, choose: bool
) -> Score:
    """Errors of some rows of a table, beside its own noise."""
    groups, name = [table.groups[row] for row in at], table.stacks[int(at[0])][0]
    apart = repeats(table.jobs.take(at), truth[at])
    noise = float(np.mean(apart)) if apart else TOLD_NOISE.get(name, math.nan)
    return score(what, guess[at], truth[at], spread[at], groups, choose, noise)


def scores(table: Table, told: Predicted) -> list[Score]:
    """Of time and memory, for each software of a table."""
    found = []
    names = np.array([name for name, _, _ in table.stacks])
    for name in dict.fromkeys(names.tolist()):
        for what, guess, truth, spread in (
            ("time", told.seconds, table.seconds, told.seconds_spread),
            ("memory", told.gib, table.gib, told.gib_spread),
        ):
            at = np.flatnonzero((names == name) & (truth > 0) & (guess > 0))
            if len(at):
                found.append(score_rows(f"{name}: {what}", table, at, guess, truth, spread, choose=what == "time"))
    return found


def print_scores(found: list[Score]) -> None:
    """Errors as a table, in percent."""
    columns = ("what", "rows", "groups", "mean", "median", "p90", "worst", "in 90 % interval", "regret", "of top 3",
               "own noise")  # fmt: skip
    shown = [
        (each.what, each.rows, each.groups, *(f"{value:.2f}" if value == value else "" for value in (
            each.mean, each.median, each.p90, each.worst, each.inside, each.regret, each.regret3, each.noise)))
        for each in found
    ]  # fmt: skip
    print_table("error, %", columns, shown)
