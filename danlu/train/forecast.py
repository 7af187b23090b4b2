"""What `danlu train` asks of the planner: what a recipe trains, on which machine, and which plans can carry it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from danlu.data.rows_settings import RowsSettings
from danlu.errors import DanluError
from danlu.model.checkpoint import StoredModel
from danlu.model.config import AnyConfig
from danlu.model.families.known import family_of
from danlu.plan.cluster import Accelerator, Cluster, accelerator, accelerators
from danlu.plan.describe import Written
from danlu.plan.machine import machine_file
from danlu.plan.offload import Places, places
from danlu.plan.plan import Plan, Work, problems
from danlu.plan.search import Asked
from danlu.plan.shapes import Shape, of_config
from danlu.plan.states import state_bytes
from danlu.train.recipe import TrainRecipe
from danlu.train.tasks.pairs import check_contrast_plan
from danlu.train.tasks.rows import check_rows_plan
from danlu.train.tasks.teacher import check_teacher

PRECISIONS = {"fp32": "fp32", "float8": "fp8"}  # as recipes call them -> as the planner does; others are bf16 to it


def ask_recipe(recipe: TrainRecipe, path: Path, gpus: str) -> tuple[Asked, Written, int]:
    """What a recipe trains, its own plan, and the tokens of the run.

    Args:
        path: of the recipe's file.
        gpus: the cluster, as `64xH100`.

    Raises DanluError where the cluster is none, the base cannot be read, or the size of the vocabulary is not said.
    """
    config = config_of(recipe, path)
    length = recipe.data.limit if isinstance(recipe.data, RowsSettings) else recipe.batch.window
    cluster, work = Cluster.parse(gpus), Work(config, recipe.own_rows, length)
    asked = ask(recipe, work, cluster, recipe.precision, lambda plan: check_recipe_plan(recipe, plan))
    own = recipe.plan or Plan(data=cluster.count)
    written = Written(str(path), own, recipe.recompute, work, uncounted(recipe), resting(recipe, cluster))
    return asked, written, recipe.steps * work.rows * length


def config_of(recipe: TrainRecipe, path: Path) -> AnyConfig:
    """The model's shape as far as a recipe tells it before its data is read. Raises DanluError as `ask_recipe`."""
    if recipe.model.base is not None:
        return StoredModel.open(recipe.model.base).config
    learned = recipe.data.vocabulary
    keys = {**recipe.model.shape, "architectures": [recipe.model.architecture]}
    if learned is not None and learned.size is not None:
        keys.setdefault("vocab_size", learned.size)
    if "vocab_size" not in keys:
        fix = "say it: --set model.shape.vocab_size=32000"
        raise DanluError("how many words there are is known only once the data is read", where=path, fix=fix)
    return family_of(keys, Path("model.architecture")).config(keys, Path("model.shape"))


def ask(
    recipe: TrainRecipe,
    work: Work,
    cluster: Cluster,
    precision: str,
    check: Callable[[Plan], None],
    recompute: str | None = None,
) -> Asked:
    """The question that a recipe puts to the planner. Raises DanluError where it knows nothing of such models.

    Args:
        work: what the plan is for.
        precision: of the computation, as recipes call it.
        check: raises DanluError where a plan cannot carry the recipe's rows or objective.
        recompute: the only setting to be looked at; None for all.
    """
    assert work.config is not None

    def allows(plan: Plan, again: str) -> bool:
        if recompute not in (None, again) or any(problems(plan, work)) or any(refusals(recipe, plan, work, again)):
            return False
        try:
            check(plan)
        except DanluError:
            return False
        return True

    shape, kind, at = of_config(work.config), PRECISIONS.get(precision, "bf16"), resting(recipe, cluster)
    kept = _state_bytes(recipe, shape, kind == "fp32")
    return Asked(shape, cluster, work.length, work.rows, kind, allows, offload=at, state_bytes=kept)


def _state_bytes(recipe: TrainRecipe, shape: Shape, fp32: bool) -> float:
    """Bytes a weight of what a recipe's optimizer keeps."""
    rule = recipe.optimizer
    return state_bytes(shape, rule.name, momentum=bool(rule.momentum), eight_bit=rule.state == "8bit",
                       average=rule.ema is not None, fp32=fp32)  # fmt: skip


def resting(recipe: TrainRecipe, cluster: Cluster) -> Places:
    """Where a recipe lets its state and activations rest. A CPU's memory is its host's."""
    set_so = (recipe.offload.state, recipe.offload.activations)
    known = places("auto", has_host=not cluster.accelerator.processor, has_disk=True)
    return next((one for one in known if (one.state, one.activations) == set_so), Places(*set_so))


def check_recipe_plan(recipe: TrainRecipe, plan: Plan) -> None:
    """What `Task.check` checks, of a recipe whose data has not been read."""
    if recipe.objective.kind == "contrastive":
        check_contrast_plan(plan)
    elif isinstance(recipe.data, RowsSettings):
        check_rows_plan(plan, recipe.objective.kind)
    check_teacher(recipe.objective, plan)


def refusals(recipe: TrainRecipe, plan: Plan, work: Work, recompute: str) -> list[str]:
    """What of a recipe besides its rows and its objective a plan cannot carry out, by the setting's name."""
    reasons = {
        "compile": recipe.compile == "on" and (plan.world > plan.data * plan.shard or recompute == "selective"),
        "batch.growing": any(growing_problems(recipe, plan, work)),
    }
    return [name for name, holds in reasons.items() if holds]


def growing_problems(recipe: TrainRecipe, plan: Plan, work: Work) -> Iterator[str]:
    """What keeps a plan from carrying windows that grow, in words."""
    if recipe.batch.growing and plan.pipeline > 1:
        yield f"pipeline={plan.pipeline} takes windows of one length"
    for _, window in recipe.batch.growing:
        now = replace(work, rows=work.rows * work.length // window, length=window)
        yield from (f"in windows of {window} tokens, {problem}" for problem in problems(plan, now))


def uncounted(recipe: TrainRecipe) -> tuple[str, ...]:
    """What a recipe sets that takes or saves time or memory, and no prediction knows of."""
    set_besides = {
        "apart": recipe.apart is not None,
        "objective.teacher": recipe.objective.teacher is not None, "batch.growing": bool(recipe.batch.growing),
        "objective.exits": bool(recipe.objective.exits), "objective.elastic": recipe.objective.elastic is not None,
        "the time of optimizer.name=muon": recipe.optimizer.name == "muon",
        "optimizer.frozen": bool(recipe.optimizer.frozen),
        "plan.overlap": recipe.plan is not None and recipe.plan.overlap,
        "plan.schedule=zero-bubble": recipe.plan is not None and recipe.plan.schedule == "zero-bubble",
    }  # fmt: skip
    return tuple(name for name, is_set in set_besides.items() if is_set)


# --- The machine ----------------------------------------------------------------------------------------------------


def cluster_here(device: torch.device, world: int, here: int) -> Cluster:
    """The processes of a run as the planner sees them: from the data file by the GPU's name, or as measured.

    Args:
        device: of a process; all are taken to be alike.
        world, here: processes of the run, and of them on this machine.

    Raises DanluError where the GPU is neither known nor measured, or processors of several machines are to compute.
    """
    if device.type == "cuda":
        known = accelerator_called(torch.cuda.get_device_name(device))
        if known is not None:
            memory = float(torch.cuda.get_device_properties(device).total_memory)
            return Cluster(replace(known, memory=memory, node=here), world)
    if here != world:
        raise DanluError("links between machines of this kind are not known", where="plan")
    if machine_file().is_file():
        measured = Cluster.parse(f"{world}x{machine_file()}")
        if measured.accelerator.processor == (device.type == "cpu"):  # not the other device of this machine
            return measured
    if device.type == "cuda":
        fix = f"danlu plan --probe --out {machine_file()}"
        raise DanluError(f"{torch.cuda.get_device_name(device)} is not in the data file", where="plan", fix=fix)
    return Cluster(_processor(), world)


def accelerator_called(name: str) -> Accelerator | None:
    """What a driver's name means, as `NVIDIA A100-SXM4-80GB` does a100-80gb; None where the data file has none."""
    said = _words(name)
    fitting = [(len(_words(spelling)), made) for spelling, made in accelerators().items() if _words(spelling) <= said]
    return max(fitting, key=lambda each: each[0])[1] if fitting else None


def _words(name: str) -> set[str]:
    return set(re.findall("[a-z0-9]+", name.lower()))


def _processor() -> Accelerator:
    """The data file's processor with this machine's cores and memory."""
    known, cores = accelerator("cpu"), psutil.cpu_count(logical=False) or 1
    peak = {name: rate * cores / known.units for name, rate in known.peak.items()}
    return replace(known, peak=peak, memory=float(psutil.virtual_memory().total), units=cores, node=cores)
