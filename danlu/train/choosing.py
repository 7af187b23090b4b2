"""Which plan a run is carried out with: as asked, as in its last checkpoint, or the best that the planner finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from danlu.artifact import write_json
from danlu.console import say, warn
from danlu.errors import DanluError
from danlu.plan.plan import Plan, Work, check
from danlu.plan.search import Asked, Choice, NoPlan, given, room, search, smallest
from danlu.train.forecast import ask, cluster_here, growing_problems, resting, uncounted
from danlu.train.notes import read_note
from danlu.train.precision import Precision
from danlu.train.recipe import TrainRecipe
from danlu.train.recompute import Recompute
from danlu.train.state import CHECKPOINTS, newest_index

NOTE = "plan.json"  # in the run's directory


@dataclass(frozen=True)
class Chosen:
    """What a run is carried out with.

    Attributes:
        plan: how its work is split.
        recompute: what its backward pass computes again.
        why: in words; empty where the plan was asked for.
        hardware: what its figures are for; empty without any.
        expected: time and memory of a step as the planner predicts them; None where it knows nothing of such a run.
    """

    plan: Plan
    recompute: Recompute
    why: str = ""
    hardware: str = ""
    expected: Choice | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self) | {"plan": self.plan.plain()}

    @classmethod
    def read(cls, home: Path) -> Chosen:
        """What `write` left in a run's directory. Raises DanluError where it is damaged."""

        def made(saved: dict[str, Any]) -> Chosen:
            expected = saved["expected"] and Choice(**saved["expected"])
            return cls(**saved | {"plan": Plan.read(saved["plan"]), "expected": expected})

        return read_note(home / NOTE, made, "delete it: checkpoints hold the plan that a run goes on with")

    def write(self, home: Path) -> None:
        """Note it in a run's directory."""
        write_json(home / NOTE, self.plain())


@dataclass(frozen=True)
class Beginning:
    """What decides the plan of a run.

    Attributes:
        recipe: of the run.
        home: its directory.
        work: what a plan must be possible for.
        check: raises DanluError where a plan cannot carry the recipe's rows or objective.
        precision: decides what is computed in.
        device: of a process; all are taken to be alike.
        world, here: processes of the run, and of them on this machine.
        free: the recipe leaves recomputing to be chosen.
    """

    recipe: TrainRecipe
    home: Path
    work: Work
    check: Callable[[Plan], None]
    precision: Callable[[], Precision]
    device: torch.device
    world: int
    here: int
    free: bool

    def ask(self) -> Asked:
        """The question to the planner. Raises DanluError where it knows nothing of the model or the hardware."""
        cluster, decided = cluster_here(self.device, self.world, self.here), self.precision()
        kind = "float8" if decided.float8 else "fp32" if decided.dtype == torch.float32 else "bf16"
        return ask(self.recipe, self.work, cluster, kind, self.check, None if self.free else self.recipe.recompute)


def complete(asked: dict[str, Any], world: int) -> Plan:
    """The plan that was asked for, with as many copies as the processes allow if it does not say how many."""
    plan = Plan.read(asked)
    left, rest = divmod(world, plan.world)
    return plan if "data" in asked or rest else Plan.read({**asked, "data": left})


def choose(run: Beginning, asked: dict[str, Any] | None) -> Chosen:
    """What to carry a run out with; it is told, compared with the memory there is, and noted in the run's directory.

    Args:
        asked: settings of a plan; None where nobody has asked for one.

    Raises DanluError where the plan cannot be carried out.
    """
    if asked is not None:
        chosen = Chosen(complete(asked, run.world), run.recipe.recompute)
    else:
        chosen = _kept(run) or (_searched(run) if run.world > 1 else _alone(run))
    run.check(chosen.plan)
    check(chosen.plan, run.work, run.world)
    _check_growing(run, chosen.plan)
    if chosen.expected is None:
        chosen = _expected(run, chosen)
    if chosen.why:
        say(f"train: plan {chosen.plan.short()}: {chosen.why}; --plan data={run.world} overrides it")
    _warn_of_memory(run, chosen)
    chosen.write(run.home)
    return chosen


def _check_growing(run: Beginning, plan: Plan) -> None:
    found = list(growing_problems(run.recipe, plan, run.work))
    if found:
        what = f"plan {plan.short()} cannot carry windows that grow: {'; '.join(found)}"
        fix = "share rows out instead (data, shard, expert), or change the windows"
        raise DanluError(what, where="batch.growing", fix=fix)


def _kept(run: Beginning) -> Chosen | None:
    """The plan of the newest checkpoint, if it is for as many processes: a resumed run computes as it began."""
    saved = newest_index(run.home / CHECKPOINTS)
    if saved is None or "plan" not in saved.extra:
        return None
    plan = Plan.read(saved.extra["plan"])
    if plan.world != run.world:
        say(f"train: the checkpoint's plan {plan.short()} is for {plan.world} processes, and there are {run.world}")
        return None
    noted = Chosen.read(run.home) if (run.home / NOTE).is_file() else None
    recompute = noted.recompute if run.free and noted is not None and noted.plan == plan else run.recipe.recompute
    return Chosen(plan, recompute, f"as in the checkpoint of step {saved.step}" if run.world > 1 else "")


def _searched(run: Beginning) -> Chosen:
    """The fastest plan that fits; where none is known to, the smallest; where nothing is known, copies."""
    try:
        asked = run.ask()
    except DanluError as unknown:
        return _copies(run, unknown)
    try:
        found = search(asked, count=1)
    except NoPlan:
        return _smallest(run, asked)
    best = found.best[0]
    why = f"the fastest of {found.fitting} that fit, {_figures(best)} expected on {_named(asked)}"
    return _chosen(asked, best, why)


def _smallest(run: Beginning, asked: Asked) -> Chosen:
    try:
        least = smallest(asked)
    except NoPlan as none:  # the check of what was asked for says it better
        return _copies(run, none)
    return _chosen(asked, least, f"the smallest there is, {_figures(least)} expected on {_named(asked)}")


def _copies(run: Beginning, unknown: DanluError) -> Chosen:
    return Chosen(Plan(data=run.world), run.recipe.recompute, f"a copy for each process, because {unknown.what}")


def _alone(run: Beginning) -> Chosen:
    """One process computes its rows at once unless they are not expected to fit."""
    plain = _expected(run, Chosen(Plan(), run.recipe.recompute))
    if plain.expected is None or uncounted(run.recipe):
        return plain
    asked = run.ask()
    if plain.expected.gib <= room(asked):
        return plain
    try:
        best = search(asked, count=1).best[0]
    except NoPlan:
        return plain
    too_much = f"{plain.expected.gib:.1f} GiB would be needed for all rows at once, and {room(asked):.1f} are there"
    return _chosen(asked, best, f"{too_much}; {_figures(best)} expected")


def _chosen(asked: Asked, choice: Choice, why: str) -> Chosen:
    recompute: Any = choice.recompute
    again = "" if recompute == "none" else f", recompute {recompute}"
    return Chosen(Plan.read(Plan.parse(choice.plan)), recompute, why + again, _named(asked), choice)


def _expected(run: Beginning, chosen: Chosen) -> Chosen:
    """The same with figures, where the planner knows such runs and the plan can be carried out at all."""
    try:
        asked = run.ask()
        at = resting(run.recipe, asked.cluster)
        expected = given(asked, chosen.plan, chosen.recompute, resting=at)
        return replace(chosen, hardware=_named(asked), expected=expected)
    except DanluError:
        return chosen


def _warn_of_memory(run: Beginning, chosen: Chosen) -> None:
    """Say before anything starts that a plan is not expected to fit. It may be tried: predictions are not certain."""
    if chosen.expected is None or uncounted(run.recipe):
        return
    there = room(run.ask())
    if chosen.expected.gib > there:
        warn(
            f"train: plan {chosen.plan.short()} with recompute {chosen.recompute} is expected to need "
            f"{chosen.expected.gib:.1f} GiB on a process, and {there:.1f} GiB are there; more processes (--nproc), "
            "more micro-batches (--plan micro_batches=N) or --set recompute=full would need less"
        )


def _figures(choice: Choice) -> str:
    return f"{choice.seconds:.3g} s a step and {choice.gib:.2g} GiB a process"


def _named(asked: Asked) -> str:
    return f"{asked.cluster.count} x {asked.cluster.accelerator.name}"
