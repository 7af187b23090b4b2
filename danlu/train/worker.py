"""One process of `danlu train`: from a recipe to what it trains, and the run itself."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from danlu.artifact import write_json
from danlu.console import say
from danlu.data.rows_settings import RowsSettings
from danlu.errors import DanluError
from danlu.model.checkpoint import StoredModel
from danlu.model.config import AnyConfig
from danlu.model.costs import training_operations
from danlu.model.initialize import mup_multipliers, starts
from danlu.model.mixture import Mixture
from danlu.model.stored import Make, without_memory
from danlu.model.transformer import Model
from danlu.plan.plan import Plan, Work
from danlu.train.choosing import Beginning, Chosen, choose
from danlu.train.compiling import choose_compile
from danlu.train.ema import Average
from danlu.train.exchange.rows import share_rows
from danlu.train.groups import group_weights
from danlu.train.guard import Guard
from danlu.train.local_steps import LocalSteps
from danlu.train.loop import Done, Run, Turn, Validation, train
from danlu.train.memory import kept_memory
from danlu.train.mesh import Mesh, backend_for, everyone, make_mesh
from danlu.train.notes import read_note
from danlu.train.offloading.offload import Offload
from danlu.train.precision import Precision, gemm_rate
from danlu.train.rank import Rank
from danlu.train.recipe import TrainRecipe
from danlu.train.recompute import keep_probabilities
from danlu.train.replica import Replica
from danlu.train.scaling import LossScale, require_float8, to_float8
from danlu.train.schedule import Schedule
from danlu.train.state import CHECKPOINTS, Checkpoints, list_checkpoints
from danlu.train.tasks.shape import model_config, take_over
from danlu.train.tasks.task import RECIPE, Task, make_task
from danlu.train.tasks.teacher import add_projections
from danlu.train.weights import masters_and_copies, start_weights

DECISIONS = "decisions.json"
LOST_DECISIONS = (
    "put a copy of it back, or delete it: precision and compiling are decided anew, and may round otherwise"
)


def work(
    rank: Rank,
    *,
    recipe: dict[str, Any],
    out: str,
    plan: dict[str, Any] | None = None,
    steps: int | None = None,
    free: bool = False,
) -> dict[str, Any]:
    """Train what a recipe says, as one of `rank.world` processes, going on where the run's directory stands.

    Args:
        recipe: of `TrainRecipe`, JSON-able, its paths whole.
        out: the run's directory.
        plan: what of a plan was asked for; the processes that it leaves over are copies (data). None for the one of the
            last checkpoint or, without, the best that the planner finds.
        steps: to do in all, in place of the recipe's. The schedule stays that of the recipe's steps.
        free: recomputing may be chosen with the plan.

    Returns what there is to say of the run; the same on every process.
    """
    settings, home = TrainRecipe.model_validate(recipe), Path(out)
    # Layouts that need two gathers are known, and slow only where a checkpoint is read.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    device = _device(rank)
    # FSDP, which brings weights that rest on the host, wants a group, if of one.
    several = rank.world > 1 or (device.type == "cuda" and settings.offload.state != "none")
    begun = several and not dist.is_initialized()  # Ray makes the group itself
    if begun:
        store = dist.HashStore() if rank.world == 1 else None
        dist.init_process_group(backend_for(device.type), rank=rank.number, world_size=rank.world, store=store)
    try:
        return _train(settings, home, rank, device, plan, steps or settings.steps, free)
    finally:
        if begun:
            dist.destroy_process_group()


def _device(rank: Rank) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(rank.local)
    return torch.device("cuda", rank.local)


def _train(
    settings: TrainRecipe,
    home: Path,
    rank: Rank,
    device: torch.device,
    asked: dict[str, Any] | None,
    steps: int,
    free: bool,
) -> dict[str, Any]:
    first = rank.number == 0
    rank.stopping.at_once = rank.world == 1  # until the first step nothing needs saving
    if settings.precision == "float8":
        require_float8()
    together = partial(_together, everyone(rank.world, device))
    task = together(lambda: make_task(settings, home), first)
    config = model_config(settings, task)
    decide = partial(_precision, settings, home, device)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", rank.world))
    work = Work(config, settings.own_rows, task.length)
    begun = Beginning(settings, home, work, task.check, decide, device, rank.world, here, free)
    chosen = together(partial(choose, begun, asked) if first else partial(Chosen.read, home), first)
    note = partial(write_json, home / RECIPE, settings.plain())
    settings = settings.model_copy(update={"recompute": chosen.recompute})
    mesh, precision = make_mesh(chosen.plan, device), together(decide, first)
    run = make_run(settings, home, mesh, task, config, precision, rank, steps)
    if first:
        run.accepted = note
        _tell(run, config, precision.dtype)
    # What is put away is to leave memory at once.
    memory = kept_memory() if settings.offload.state == "none" else nullcontext()
    updates = run.turns[0].optimizer
    rank.stopping.at_once = False
    with memory, updates if isinstance(updates, LocalSteps) else nullcontext():  # who ends is waited for no longer
        done = train(run)
    return _summary(home, done, run)


def _together(mesh: Mesh, make: Callable[[], Any], first: bool) -> Any:
    """What `make` returns: the first process makes it and writes it down, then the others read it."""
    made, error = None, None
    for turn in (True, False):
        if first is turn and error is None:
            try:
                made = make()
            except DanluError as raised:
                error = raised
        mesh.agree(error)
    return made


def _precision(settings: TrainRecipe, home: Path, device: torch.device) -> Precision:
    """Decided once a run, by measuring: a resumed run must compute as it began.

    Raises DanluError where the recipe names another than its checkpoints were made in.
    """
    note = home / DECISIONS
    if note.exists():
        decided = read_note(note, Precision.read, LOST_DECISIONS)
        if settings.precision in ("auto", decided.name):
            return decided
        _only_anew(home, "precision", decided.name, settings.precision)
    chosen = Precision.choose(settings.precision, device.type)
    write_json(note, chosen.plain())
    return chosen


def _only_anew(home: Path, name: str, decided: str, asked: str) -> None:
    """Raise DanluError where there are checkpoints already, made with another decision than is asked for."""
    if any(list_checkpoints(home / CHECKPOINTS)):
        what = f"{name} is {asked}, and the run's checkpoints were made with {decided}"
        raise DanluError(what, where=home / DECISIONS, fix=f"set {name} to auto or {decided}, or choose another --out")


def _compiled(
    settings: TrainRecipe, home: Path, plan: Plan, model: Model, flops: float, dtype: torch.dtype, device: str
) -> bool:
    """Whether blocks are compiled; like the precision decided once, but another plan may not allow it.

    Raises DanluError where the recipe asks for it and it cannot be, or for something else than was decided.
    """
    reason = _why_eager(settings, plan, model)
    if reason is not None and settings.compile == "on":
        raise DanluError(f"the model cannot be compiled: {reason}", where="compile", fix="set compile to auto or off")
    note = home / DECISIONS
    decided = read_note(note, dict, LOST_DECISIONS)
    before = None if "compile" not in decided else "on" if decided["compile"] else "off"
    if before is not None and settings.compile not in ("auto", before):
        _only_anew(home, "compile", before, settings.compile)
        before = None
    if before is None:
        on, why = choose_compile(settings.compile if reason is None else "off", flops, dtype, device)
        decided |= {"compile": on, "compiling": why if reason is None else f"off: {reason}"}
        write_json(note, decided)
        say(f"train: compile {decided['compiling']}")
    return bool(decided["compile"]) and reason is None


def _why_eager(settings: TrainRecipe, plan: Plan, model: Model) -> str | None:
    """Why blocks are not compiled, in words; None where they may be."""
    reasons = {
        f"blocks are shared by processes, the plan is {plan.short()}": plan.world > plan.data * plan.shard,
        "an expert gets another number of tokens every step": any(isinstance(one, Mixture) for one in model.modules()),
        "rows differ in length": isinstance(settings.data, RowsSettings),
        "selective recomputing keeps single products, which a compiled block does not have": settings.recompute
        == "selective",
        "weights lie in files": settings.offload.state == "parameters",
        "each layer drops another share of the rows": settings.drop_path > 0,
        "the model writes part of its rows itself, token by token": settings.objective.own > 0,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def make_run(
    settings: TrainRecipe,
    home: Path,
    mesh: Mesh,
    task: Task,
    config: AnyConfig,
    precision: Precision,
    rank: Rank,
    steps: int,
) -> Run:
    """Everything that the run is made of, on this process."""
    optimizing, dtype, apart = settings.optimizer, precision.dtype, settings.apart
    stream = task.stream(mesh if apart is None else share_rows(mesh, apart))
    measures = task.heldout(mesh) is not None
    if not measures:
        _check_unmeasured(settings)
    offload = Offload.start(settings.offload, home / "offload", mesh.device)
    with offload.making_weights():
        model, makers = load_model(settings, config)
        if precision.float8:
            to_float8(model)
        if settings.recompute == "none":
            keep_probabilities(model)
        multipliers = mup_multipliers(model, optimizing.mup_base_width) if optimizing.mup_base_width else None
        trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        groups = group_weights(trainable, optimizing, multipliers)
        flops = training_operations(model, task.length) or 0.0
        whole = flops * settings.own_rows * task.length * steps / mesh.world
        decide = partial(_compiled, settings, home, mesh.plan, model, whole, dtype, mesh.device.type)
        held = 4 * sum(weight.numel() for weight in model.parameters()) // mesh.plan.shard  # in fp32
        policy = offload.policy(held)
        replica = Replica(
            model,
            task.objectives(mesh),
            mesh,
            rows=settings.own_rows // mesh.plan.readers,
            length=task.length,
            dtype=dtype,
            recompute=settings.recompute,
            compiled=_together(mesh, decide, rank.number == 0),
            batch=task.batch,
            offload=policy,
        )
        start_weights(replica, makers, policy)
        masters, copies = masters_and_copies(replica, dtype)
    own_groups = {name: groups[name] for name in masters}
    optimizer = offload.make_optimizer(masters, copies, optimizing, own_groups)
    schedule = Schedule(settings.schedule, optimizing.learning_rate, settings.steps)
    with offload.making_state():
        average = Average(optimizer, optimizing.ema, optimizing.ema_warmup) if optimizing.ema else None
    for part in replica.models:
        offload.follow(part)
    scale = LossScale(settings.scaling) if dtype == torch.float16 else None
    local = None
    if apart is not None:
        local = LocalSteps(optimizer, apart, str(apart.worker), lambda: rank.stopping.asked)
    return Run(
        replica,
        [Turn(local or optimizer, schedule.rate, optimizing.clip, average, scale)],
        stream,
        steps=steps,
        seed=settings.seed if apart is None else settings.seed * apart.workers + apart.worker,
        checkpoints=Checkpoints(
            home / CHECKPOINTS,
            settings.checkpoints.last,
            settings.checkpoints.best,
            # A copy in memory to write from would undo what was moved away.
            background=settings.checkpoints.background and settings.offload.state == "none",
        ),
        checkpoint_steps=settings.checkpoints.every,
        out=home,
        identity={
            "model": json.loads(json.dumps(asdict(config))),
            "seed": settings.seed,
            "data": task.identity,
            "batch": settings.batch.plain(),
            "objective": settings.objective.plain(),
            "optimizer": optimizing.plain(),
            "schedule": settings.schedule.plain(),
            "steps": settings.steps,
            "apart": None if apart is None else {"worker": apart.worker, "workers": apart.workers},
        },
        validation=Validation(
            settings.validation.every,
            lambda: replica.measure(task.heldout(mesh) or ()),
            schedule.observe,
            settings.validation.patience,
            (schedule.state, schedule.load),
            lambda: task.quality(replica),
        )
        if measures
        else None,
        guard=Guard(settings.guard, home),
        stopping=lambda: rank.stopping.asked,
        alive=rank.alive.note,
        finish=local.finish if local is not None else lambda: None,
        flops=flops,
        ceiling=gemm_rate(dtype, device=mesh.device.type) * 1e9,
    )


def _check_unmeasured(settings: TrainRecipe) -> None:
    """Raise DanluError where a setting speaks of validations, and nothing is held out to measure on."""
    without_effect = {
        "schedule.kind plateau": settings.schedule.kind == "plateau",
        "validation.patience": settings.validation.patience is not None,
        "checkpoints.best": settings.checkpoints.best > 0,
    }
    for name, is_set in without_effect.items():
        if is_set:
            fix = "hold some out (data.heldout), or leave it out"
            raise DanluError(f"{name} has no effect, since nothing is held out to measure on", where="data", fix=fix)


def load_model(settings: TrainRecipe, config: AnyConfig) -> tuple[Model, dict[str, Make]]:
    """The model without memory, and what makes each weight that it starts from, fp32, by its name."""
    model = without_memory(config)
    add_projections(model, settings.objective)
    makers = starts(model, settings.model.start, settings.seed)
    if settings.model.base is not None:
        makers |= take_over(model, StoredModel.open(settings.model.base))
    return model, makers


def _tell(run: Run, config: AnyConfig, dtype: torch.dtype) -> None:
    held = sum(weight.numel() for weight in run.replica.parameters().values())
    say(f"train: {held:,} weights, of which this process holds a part; {dtype}".replace("torch.", ""))
    say(f"train: plan {run.mesh.plan.short()} on {run.mesh.world} processes")


def _summary(home: Path, done: Done, run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {"out": str(home), "steps": done.steps, "ended": done.why, "plan": run.mesh.plan.short()}
    told = {"loss": done.loss, "validation_loss": done.validated, "best_validation_loss": done.best}
    found |= {name: loss for name, loss in told.items() if loss is not None}
    return found | done.quality
