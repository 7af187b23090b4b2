"""The card of a finished run of `danlu train`: what was predicted of it beside what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from danlu.artifact import CARD, Figures, code_version, figure, inventory, make_card, write_json
from danlu.console import say
from danlu.plan.memory import GIB
from danlu.train.choosing import Chosen
from danlu.train.recipe import TrainRecipe

WARM = 3  # steps that a start may slow down, and that do not count where there are more


def write_card(home: Path, recipe: TrainRecipe, begun: int) -> dict[str, float]:
    """Write HOME/card.json beside a run's model, and say how far predictions were off.

    Args:
        begun: steps that were done before this start; what it measured comes after them.

    Returns: the figures' values by name.
    """
    chosen, lines = Chosen.read(home), _lines(home, begun)
    figures = _predicted(chosen) | _measured(lines)
    settings = recipe.plain() | {"plan": chosen.plan.plain(), "recompute": chosen.recompute}
    files = {f"model/{name}": about for name, about in inventory(home / "model").items()}
    seconds, memory = sum(line["seconds"] for line in lines), max((line["memory_bytes"] for line in lines), default=0)
    card = make_card(
        "train", settings, {}, code_version("train/start"), figures, files,
        seconds=seconds, memory=memory, resumed=begun > 0,
    )  # fmt: skip
    write_json(home / CARD, card)
    values = {name: float(about["value"]) for name, about in figures.items()}
    if lines and chosen.expected is not None:
        say(
            f"train: a step took {values['step_seconds']:.3g} s, {chosen.expected.seconds:.3g} expected; a process "
            f"held {values['memory'] / GIB:.3g} GiB, {chosen.expected.gib:.3g} expected"
        )
    return values


def _predicted(chosen: Chosen) -> Figures:
    expected = chosen.expected
    if expected is None:
        return {}
    by = f"the planner, for {chosen.hardware}; 90 % between {expected.low:.3g} and {expected.high:.3g} s"
    return {
        "predicted_step_seconds": figure(expected.seconds, "s", by=by),
        "predicted_memory": figure(expected.gib * GIB, "byte", by=f"the planner, for {chosen.hardware}; of a process"),
    }


def _measured(lines: list[dict[str, Any]]) -> Figures:
    counted = [line["seconds"] for line in (lines[WARM:] or lines)]
    if not counted:
        return {}
    return {
        "step_seconds": figure(median(counted), "s", by=f"median of {len(counted)} steps"),
        "memory": figure(max(line["memory_bytes"] for line in lines), "byte", by="the most that a process held"),
    }


def _lines(home: Path, begun: int) -> list[dict[str, Any]]:
    """The metrics of the steps after the first so many."""
    lines = map(json.loads, (home / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["step"] > begun]
