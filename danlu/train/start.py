"""`danlu train` in the process that the user starts: launches the workers, then writes the model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from danlu.model.checkpoint import check_place
from danlu.plan.plan import Plan
from danlu.train.card import write_card
from danlu.train.launch import launch
from danlu.train.recipe import TrainRecipe
from danlu.train.state import CHECKPOINTS, list_checkpoints

MODEL = "model"  # the directory that a run's model is written to
Launcher = Literal["here", "ray"]


def start(
    settings: TrainRecipe, out: Path | None, *, plan: str | None, steps: int | None, on: Launcher = "here"
) -> dict[str, Any]:
    """Carry out a recipe in as many processes as it says, and write the model that came out of it to OUT/model.

    Args:
        settings: with whole paths.
        out: the run's directory; by default runs/NAME.
        plan: as in tensor=2,shard=2, in place of the recipe's; where neither says one it is chosen, see
            `danlu.train.choosing`.
        steps: to do in all, in place of the recipe's.
        on: who starts the processes.

    Returns what there is to say of the run. For errors see `danlu.train.launch.launch`.
    """
    home = (out or Path("runs") / settings.name).resolve()
    asked = Plan.parse(plan) if plan is not None else None
    if asked is None and settings.plan is not None:
        asked = settings.plan.model_dump(mode="json", exclude_unset=True)
    Plan.read(asked or {})
    arguments = {"recipe": settings.plain(), "out": str(home), "plan": asked, "steps": steps}
    arguments["free"] = "recompute" not in settings.model_fields_set
    check_place(home / MODEL)  # what stands in the way is better said now than when all is trained
    begun = _newest(home)
    done: dict[str, Any] | None = _launcher(on)(
        "danlu.train.worker:work",
        arguments,
        settings.launch,
        run_dir=home,
        progress=lambda: _newest(home),
    )
    if done is None:
        return {"out": str(home), "steps": begun, "ended": "stopped"}
    if done["ended"] != "stopped" and int(os.environ.get("RANK", "0")) == 0:
        from danlu.train.export import export
        from danlu.train.tasks.task import measure_test

        done["model"] = str(export(home, home / MODEL).out)
        done |= measure_test(home)
        done |= write_card(home, settings, begun)
    return done


def _launcher(on: Launcher) -> Callable[..., Any]:
    if on == "ray":
        from danlu.train.ray_launch import launch_on_ray

        return launch_on_ray
    return launch


def _newest(home: Path) -> int:
    """The step of the newest checkpoint that looks whole, 0 without one."""
    return max((facts.step for facts in list_checkpoints(home / CHECKPOINTS) if not facts.problem), default=0)
