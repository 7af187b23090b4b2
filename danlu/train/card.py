"""The card of a finished run of `danlu train`: what was predicted of it beside what was measured."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from danlu.artifact import CARD, Figures, code_version, figure, inventory, make_card, write_json
from danlu.console import say
from danlu.plan.memory import GIB
from danlu.train.choosing import Chosen
from danlu.train.metrics import METRICS, read_back
from danlu.train.recipe import TrainRecipe

WARM = 3  # steps that a start may slow down, and that do not count where there are more


@dataclass(frozen=True)
class Steps:
    """What the steps of one start took.

    Attributes:
        seconds: of each, in their order.
        memory: the most bytes that a process held.
    """

    seconds: array[float]
    memory: int

    @classmethod
    def read(cls, home: Path, begun: int) -> Steps:
        """From the metrics of a run. Args: begun: steps that were done before."""
        seconds, memory = array("d"), 0
        for line in read_back(home / METRICS, begun):
            seconds.append(line["seconds"])
            memory = max(memory, line["memory_bytes"])
        return cls(seconds[::-1], memory)


def write_card(home: Path, recipe: TrainRecipe, begun: int) -> dict[str, float]:
    """Write HOME/card.json beside a run's model, and say how far predictions were off.

    Args:
        begun: steps that were done before this start; what it measured comes after them.

    Returns: the figures' values by name.
    """
    chosen, steps = Chosen.read(home), Steps.read(home, begun)
    figures = _predicted(chosen) | _measured(steps)
    settings = recipe.plain() | {"plan": chosen.plan.plain(), "recompute": chosen.recompute}
    files = {f"model/{name}": about for name, about in inventory(home / "model").items()}
    card = make_card(
        "train", settings, {}, code_version("train/start"), figures, files,
        seconds=sum(steps.seconds), memory=steps.memory, resumed=begun > 0,
    )  # fmt: skip
    write_json(home / CARD, card)
    values = {name: float(about["value"]) for name, about in figures.items()}
    if steps.seconds and chosen.expected is not None:
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


def _measured(steps: Steps) -> Figures:
    counted = steps.seconds[WARM:] or steps.seconds
    if not counted:
        return {}
    return {
        "step_seconds": figure(median(counted), "s", by=f"median of {len(counted)} steps"),
        "memory": figure(steps.memory, "byte", by="the most that a process held"),
    }
