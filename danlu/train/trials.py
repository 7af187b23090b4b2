"""The best plans tried here: each is run for some steps, and the fastest measured one comes first."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from danlu.console import result, say, table
from danlu.errors import DanluError
from danlu.plan.cluster import Cluster
from danlu.plan.memory import GIB
from danlu.plan.search import Choice
from danlu.train.recipe import TrainRecipe
from danlu.train.trial import short_run, step_seconds

STEPS = 20
MADE_ONCE = ("corpus", "tokenizer", "decisions.json")  # of a run's directory; the plan changes nothing about them


class Trials:
    """Runs plans of a recipe on this machine.

    Args:
        recipe: with whole paths.
        cluster: that the plans are for, and this machine is.
        count: how many plans are tried.

    Attributes:
        measured: of each plan tried, what was predicted and what was measured, JSON-ready.

    Raises DanluError where this machine is no such cluster.
    """

    def __init__(self, recipe: TrainRecipe, cluster: Cluster, count: int) -> None:
        here = cluster.count if cluster.accelerator.processor else torch.cuda.device_count()
        if cluster.count > here or (torch.cuda.is_available() and cluster.accelerator.processor):
            what = f"plans for {cluster.count} x {cluster.accelerator.name} cannot be tried on this machine"
            raise DanluError(what, where="--try", fix="name what is here, as danlu plan --probe measures it")
        self.recipe, self.world, self.count = recipe, cluster.count, count
        self.measured: list[dict[str, Any]] = []

    def order(self, best: list[Choice]) -> list[Choice]:
        """Try the first plans; the fastest measured ones come first, then those that were not tried."""
        with tempfile.TemporaryDirectory(prefix="danlu-") as scratch:
            for number, choice in enumerate(best[: self.count]):
                say(f"plan: trying {choice.plan}, recompute {choice.recompute}, for {STEPS} steps")
                self.measured.append(self._try(choice, Path(scratch), number))
        seconds = [each["measured_seconds"] for each in self.measured]
        tried = sorted(range(len(seconds)), key=seconds.__getitem__)
        return [*(best[number] for number in tried), *best[len(tried) :]]

    def _try(self, choice: Choice, scratch: Path, number: int) -> dict[str, Any]:
        folder = scratch / str(number)
        (folder / "run").mkdir(parents=True)
        for name in MADE_ONCE if number else ():
            if (made := scratch / "0" / "run" / name).exists():
                (folder / "run" / name).symlink_to(made)
        launch = self.recipe.launch.plain() | {"nproc": self.world, "nodes": 1, "rendezvous": None}
        settings = self.recipe.plain() | {"plan": None, "recompute": choice.recompute, "launch": launch}
        lines = short_run(settings, STEPS, folder, choice.plan)
        return {
            "plan": choice.plan, "recompute": choice.recompute,
            "predicted_seconds": choice.seconds, "measured_seconds": step_seconds(lines),
            "predicted_gib": choice.gib, "measured_gib": max(line["memory_bytes"] for line in lines) / GIB,
        }  # fmt: skip


def print_trials(measured: list[dict[str, Any]]) -> None:
    """Predicted beside measured, and which plan is kept."""
    rows = [
        (one["plan"], one["recompute"], *(f"{one[name]:.3g}" for name in (
            "predicted_seconds", "measured_seconds", "predicted_gib", "measured_gib")))
        for one in measured
    ]  # fmt: skip
    columns = ("plan", "recompute", "s predicted", "s measured", "GiB predicted", "GiB measured")
    table(f"tried for {STEPS} steps", columns, rows)
    fastest = min(measured, key=lambda one: float(one["measured_seconds"]))
    result(f"kept: {fastest['plan']}, the fastest measured")
