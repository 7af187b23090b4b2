"""A dry run: what a step of a plan holds, worked out by the engine itself without its memory and its hardware."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from danlu.console import result, table
from danlu.data.stream import IGNORED, Batch
from danlu.errors import DanluError
from danlu.model import loss
from danlu.model.config import AnyConfig, ModelConfig
from danlu.model.initialize import starts
from danlu.model.stored import without_memory
from danlu.plan.memory import GIB
from danlu.plan.plan import Plan, Work, check
from danlu.plan.search import Asked
from danlu.train.dry import numberless, pretended
from danlu.train.groups import group_weights
from danlu.train.ledger import Ledger
from danlu.train.mesh import Mesh, make_mesh
from danlu.train.objective import Words
from danlu.train.offloading.offload import OffloadSettings
from danlu.train.optimizer import Optimizer, clip
from danlu.train.recipe import TEXT_KINDS, TrainRecipe
from danlu.train.recompute import keep_probabilities
from danlu.train.replica import Replica
from danlu.train.tasks.shape import with_dropout
from danlu.train.weights import make_room, masters_and_copies, start_weights

NO_TENSORS = ("fixed", "kernels", "loose")  # parts of predictions: libraries, their buffers, what lies between tensors


@dataclass(frozen=True)
class Dry:
    """What one process holds of tensors when it holds the most, in bytes.

    Attributes:
        rank: which process.
        peak: all of them.
        parts: by kind: weights, gradients, optimizer, activations, gathered (weights), working (on the way back).
    """

    rank: int
    peak: int
    parts: dict[str, int]


def dry_run(
    recipe: TrainRecipe,
    config: AnyConfig | None,
    plan: Plan,
    dtype: torch.dtype,
    *,
    rank: int = 0,
    accelerated: bool = False,
) -> Dry:
    """The memory of a step under a plan, as one of its processes, in a process that has no group.

    The engine itself computes the step, with tensors that have no numbers (`danlu.train.dry`): blocks are not
    compiled, and every expert gets equally many tokens.

    Args:
        config: of the model; recipe: of the rest, its plan apart.
        dtype: what is computed in.
        accelerated: sizes are those of an accelerator where they are others than a CPU's.

    Raises DanluError where the plan cannot be carried out, or the recipe is none that can be looked at in this way.
    """
    stack = _one_stack(recipe, config)
    check(plan, Work(stack, recipe.own_rows, recipe.batch.window), plan.world)
    sizes = _accelerator_sizes() if accelerated else nullcontext()
    with pretended(plan.world, rank) if plan.world > 1 else nullcontext(), sizes:
        ledger = step_ledger(recipe, stack, make_mesh(plan), dtype, dry=True, accelerated=accelerated)
    return Dry(rank, ledger.peak, ledger.at_peak())


def step_ledger(
    recipe: TrainRecipe, config: AnyConfig, mesh: Mesh, dtype: torch.dtype, *, dry: bool, accelerated: bool = False
) -> Ledger:
    """What a step of training holds, on one process of a mesh.

    Args:
        dry: without memory; otherwise in earnest.
        accelerated: attention keeps no probabilities, and parts travel as between accelerators.
    """
    model = without_memory(config)
    if recipe.recompute == "none" and not accelerated:
        keep_probabilities(model)
    groups = group_weights({name: weight for name, weight in model.named_parameters()}, recipe.optimizer)
    objective = Words(recipe.objective.smoothing, recipe.objective.z)
    length, rows = recipe.batch.window, recipe.own_rows // mesh.plan.readers
    replica = Replica(
        model, [objective], mesh, rows=rows, length=length, dtype=dtype, recompute=recipe.recompute, batch=Batch
    )
    replica.lookout = None  # nobody is waited for
    if accelerated:
        _send_as_accelerators(replica)
    batch = _batch(rows, length, recipe)
    with numberless() if dry else nullcontext(), Ledger("weights") as ledger:
        if dry:
            make_room(replica.learners, mesh.device, mesh.device)
        else:
            start_weights(replica, starts(model, recipe.model.start, recipe.seed))
        masters, copies = masters_and_copies(replica, dtype)
        with ledger.counting("optimizer"):
            optimizer = Optimizer(masters, copies, recipe.optimizer, {name: groups[name] for name in masters})
        ledger.name((*masters.values(), *replica.parameters().values()), "weights")
        ledger.forget_peak()
        with ledger.counting("activations"):
            _step(replica, optimizer, batch, recipe, ledger)
    return ledger


def _step(replica: Replica, optimizer: Optimizer, batch: Batch, recipe: TrainRecipe, ledger: Ledger) -> None:
    """One step of `danlu.train.loop`, without what takes no memory."""
    replica.gradients(batch, batch.count)
    gradients = optimizer.gradients()
    ledger.name(gradients.values(), "gradients")
    ledger.kind = "working"
    norm = replica.norm(gradients)
    if recipe.optimizer.clip is not None:
        clip(gradients, norm, recipe.optimizer.clip)
    optimizer.step(1e-3)
    optimizer.zero()


def _send_as_accelerators(replica: Replica) -> None:
    """Let FSDP exchange parts in its own way, which takes no room for what each of the others sends."""
    for module in (inner for learner in replica.learners for inner in learner.modules()):
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(DefaultAllGather())
            module.set_custom_reduce_scatter(DefaultReduceScatter())


def _batch(rows: int, length: int, recipe: TrainRecipe) -> Batch:
    """A process's rows: one document each, of which all words are learned, or as many as are hidden."""
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    targets = torch.zeros_like(tokens)
    if recipe.objective.kind == "masked_tokens":
        targets[:, round(length * recipe.objective.hidden) :] = IGNORED
    else:
        targets[:, -1] = IGNORED
    return Batch(tokens, targets, torch.ones_like(tokens, dtype=torch.int32), torch.arange(length).repeat(rows, 1))


def _one_stack(recipe: TrainRecipe, config: AnyConfig | None) -> ModelConfig:
    """The shape as it learns. Raises DanluError where a recipe has more to it than a dry run counts."""
    besides = {
        recipe.objective.kind: recipe.objective.kind not in TEXT_KINDS or not isinstance(config, ModelConfig),
        "a teacher": recipe.objective.teacher is not None,
        "early exits": bool(recipe.objective.exits),
        "parts that learn": recipe.objective.elastic is not None,
        "offload": recipe.offload != OffloadSettings(),
        "an average of the weights": recipe.optimizer.ema is not None,
        "workers apart": recipe.apart is not None,
    }
    found = [name for name, is_so in besides.items() if is_so]
    if found or not isinstance(config, ModelConfig):
        fix = "one stack that learns from text in its own memory can be looked at"
        raise DanluError(f"no dry run is made of {', '.join(found)}", where="--verify", fix=fix)
    return with_dropout(recipe, config)


@contextmanager
def _accelerator_sizes() -> Iterator[None]:
    """Inside, the head's loss takes as many logits at once as it does on an accelerator."""
    chunk, part = loss.CHUNK_LOGITS, loss.PART_LOGITS
    loss.CHUNK_LOGITS, loss.PART_LOGITS = chunk * loss.ACCELERATED, 2**62
    try:
        yield
    finally:
        loss.CHUNK_LOGITS, loss.PART_LOGITS = chunk, part


# --- Beside the prediction --------------------------------------------------------------------------------------------


def verified(recipe: TrainRecipe, config: AnyConfig | None, asked: Asked, answer: dict[str, Any]) -> dict[str, Any]:
    """What the processes at both ends of a chosen plan hold, as JSON-ready values; GiB.

    Args:
        config: of the recipe's model.
        answer: of `danlu.plan.describe.find`.

    Raises DanluError as `dry_run`.
    """
    choice = answer["plan"]
    plan = Plan.read(Plan.parse(choice["plan"]))
    chosen = recipe.model_copy(update={"recompute": choice["recompute"]})
    dtype = torch.float32 if asked.precision == "fp32" else torch.bfloat16
    ranks = (0, plan.world - 1) if plan.pipeline > 1 else (0,)
    accelerated = not asked.cluster.accelerator.processor
    fullest = max(
        (dry_run(chosen, config, plan, dtype, rank=rank, accelerated=accelerated) for rank in ranks),
        key=lambda dry: dry.peak,
    )
    predicted = {name: gib for name, gib in choice["memory"].items() if name not in (*NO_TENSORS, "total")}
    held = {name: size / GIB for name, size in fullest.parts.items()}
    parts = {
        name: {"held": held.get(name), "predicted": predicted.get(name)}
        for name in (*held, *(name for name, gib in predicted.items() if gib > 0 and name not in held))
    }
    return {"plan": choice["plan"], "rank": fullest.rank, "held": fullest.peak / GIB,
            "predicted": sum(predicted.values()), "parts": parts}  # fmt: skip


def print_verified(found: dict[str, Any]) -> None:
    """The same as a table."""
    rows = [(name, *(f"{gib:.4g}" if (gib := part[of]) else "" for of in ("held", "predicted")))
            for name, part in found["parts"].items()]  # fmt: skip
    table(f"tensors of process {found['rank']} under {found['plan']}, GiB", ("part", "dry run", "predicted"), rows)
    result(
        f"dry run: {found['held']:.4g} GiB of tensors at the peak, {found['predicted']:.4g} predicted; libraries and "
        "what lies between tensors come on top"
    )
