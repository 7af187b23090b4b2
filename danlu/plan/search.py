"""Every way to spread a model over a cluster, those that fit, and the fastest of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from danlu.errors import DanluError
from danlu.plan.adapters import Lora, can_adapt
from danlu.plan.calibrate import Calibration
from danlu.plan.cluster import Cluster
from danlu.plan.formulas import device_memory, step_time
from danlu.plan.jobs import Column, Jobs
from danlu.plan.learned import calibrations, fullest, seconds
from danlu.plan.memory import GIB
from danlu.plan.offload import Offload, Places, words_of
from danlu.plan.plan import Plan
from danlu.plan.resting import farthest, gib_away, has_room, no_room, put_away, rates

USABLE = 0.94  # of a device's memory; the rest is lost between blocks
KIND = 0.003  # of a step's time that one kind of parallelism less is worth
RECOMPUTE = ("none", "selective", "full")
# What tensor processes share out: heads and features of each kind of layer.
CUT = ("heads", "kv_heads", "feedforward", "expert_width", "state_heads", "state_groups", "second_heads",
       "second_kv_heads", "second_feedforward")  # fmt: skip


class NoPlan(DanluError):
    """A model cannot be trained on a cluster: its rows cannot be shared, or it is too large."""


@dataclass(frozen=True)
class Asked:
    """What is to be trained.

    Attributes:
        model: columns of Jobs that describe it.
        cluster: it runs on.
        length: tokens of a row.
        rows: of a step, over all copies.
        precision: of matrix products: bf16, fp8 or fp32.
        allows: whether a plan can be carried out with a recompute setting (none, selective or full), where more than
            the degrees decides that; None where nothing does.
        lora: adapters that learn in place of the weights.
        offload: where state and activations may rest, or where they do; auto tries the host and disks where nothing
            fits without.
        micro_rows: rows of a micro-batch of one copy, where they are not to be chosen.
        state_bytes: bytes a weight of masters and moments, where the optimizer is not Adam.
    """

    model: dict[str, float]
    cluster: Cluster
    length: int
    rows: int
    precision: str = "bf16"
    allows: Callable[[Plan, str], bool] | None = None
    lora: Lora | None = None
    offload: Offload | Places = "none"
    micro_rows: int | None = None
    state_bytes: float | None = None


@dataclass(frozen=True)
class Choice:
    """One plan, and what is expected of it.

    Attributes:
        plan: as `danlu train --plan` reads it.
        recompute: none, selective (attention's scores) or full (whole blocks).
        micro_rows: rows of a micro-batch of one copy.
        seconds, gib: of a step, and of the fullest process.
        low, high: the 90 % interval of seconds.
        times: seconds by part. memory: GiB by part.
        offload: what a recipe of `danlu train` is told to put away, by setting.
        away: GiB that rest in the host's memory and on its disks.
    """

    plan: str
    recompute: str
    micro_rows: int
    seconds: float
    gib: float
    low: float
    high: float
    times: dict[str, float]
    memory: dict[str, float]
    offload: dict[str, str] = field(default_factory=dict)
    away: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        best: the fastest plans that fit, the best first.
        pareto: plans of which none is both faster and smaller, from the fastest to the smallest.
        tried, fitting: how many plans were worked out, and how many fit.
    """

    best: list[Choice]
    pareto: list[Choice]
    tried: int
    fitting: int


def divisors(number: int) -> list[int]:
    """In ascending order."""
    small = [each for each in range(1, math.isqrt(number) + 1) if number % each == 0]
    return sorted({*small, *(number // each for each in small)})


def candidates(asked: Asked) -> Jobs:
    """All legal plans as rows. Raises NoPlan where there is none."""
    if asked.lora is not None and not can_adapt(asked.model):
        what = "adapters are planned for beside one stack of plain attention and feed-forwards"
        raise DanluError(what, where="--lora", fix="leave it out: all weights then learn")
    world = asked.cluster.count
    degrees = np.array(_degrees(asked), dtype=np.float64).reshape(-1, 5)
    micro = np.array([asked.micro_rows] if asked.micro_rows else divisors(asked.rows), dtype=np.float64)
    zero = np.array([0.0, 1.0, 3.0])
    # `danlu run`, which tunes adapters on a processor, computes nothing again.
    recompute = np.array([0.0] if asked.lora and asked.cluster.accelerator.processor else [0.0, 1.0, 2.0])
    grid = np.meshgrid(np.arange(len(degrees)), micro, zero, recompute, indexing="ij")
    at, micro_rows, zeros, again = (axis.ravel() for axis in grid)
    tensor, pipeline, context, expert, chunks = degrees[at].T
    data = world / (tensor * pipeline * context)
    share = asked.rows / data
    copies = data / expert
    legal = (share % micro_rows == 0) & ((zeros == 0) | (copies > 1))
    # Weights gathered for every micro-batch of a pipeline would cost more than they save.
    legal &= (zeros < 3) | (pipeline == 1)
    legal &= ((chunks == 1) | ((share / micro_rows) % pipeline == 0)) & (share / micro_rows >= pipeline)
    if not legal.any():
        raise NoPlan(f"{asked.rows} rows a step cannot be shared by {world} accelerators", where="plan",
                         fix="take a multiple of them as rows of a step")  # fmt: skip
    columns = {"tensor": tensor, "pipeline": pipeline, "context": context, "expert": expert, "chunks": chunks,
               "data": data, "zero": zeros, "sharers": np.where(zeros > 0, copies, 1),
               "expert_sharers": np.where(zeros > 0, copies, 1),
               "sequence": tensor > 1, "micro_rows": micro_rows, "micro_batches": share / micro_rows,
               "recompute": again}  # fmt: skip
    jobs = _jobs(
        asked, put_away(asked.offload, asked.cluster, {name: column[legal] for name, column in columns.items()})
    )
    return jobs if asked.allows is None else _allowed(jobs, asked.allows)


def _allowed(jobs: Jobs, allows: Callable[[Plan, str], bool]) -> Jobs:
    """The plans that can be carried out. Raises NoPlan where none can."""
    each = [jobs.take(np.array([row])) for row in range(len(jobs))]
    kept = [row for row, one in enumerate(each)
            if allows(Plan.read(Plan.parse(_plan(one))), RECOMPUTE[int(one.recompute[0])])]  # fmt: skip
    if not kept:
        raise NoPlan(f"none of {len(jobs)} plans can be carried out", where="plan")
    return jobs.take(np.array(kept))


def _jobs(asked: Asked, columns: Mapping[str, float | Column]) -> Jobs:
    """Plans as rows: `columns` say how the work is cut, and `asked` what it is and on what."""
    device, weight = asked.cluster.share, 4.0 if asked.precision == "fp32" else 2.0
    return Jobs.of(
        **asked.model, **columns, length=asked.length, balanced=0, flash=1, weight_bytes=weight,
        compiled=asked.cluster.taught is None,  # a measured machine's own runs were not
        processor=device.processor, gemm_bytes={"fp8": 1.0, "fp4": 0.5}.get(asked.precision, weight),
        state_bytes=asked.state_bytes or (8.0 if weight == 4 else 12.0),
        gradient_bytes=4.0, peak=device.rate(asked.precision), memory_rate=device.memory_rate, units=device.units,
        near_rate=device.near, far_rate=device.far, node=min(device.node, asked.cluster.count), release=0,
        **rates(device), **(asked.lora.columns if asked.lora else {}),
    )  # fmt: skip


def planned(asked: Asked, plan: Plan, recompute: str, resting: Places | None = None) -> Jobs:
    """One plan as a row. Raises ValueError where it is not for so many processes.

    Args: resting: where things rest; by default all on the device.
    """
    if plan.world != asked.cluster.count:
        raise ValueError(f"a plan of {plan.world} processes for {asked.cluster.count} accelerators")
    return _jobs(asked, {
        "tensor": plan.tensor, "pipeline": plan.pipeline, "context": plan.context, "expert": plan.expert,
        "chunks": plan.stages, "data": plan.readers, "zero": plan.zero if plan.shard > 1 else 0, "sharers": plan.shard,
        "expert_sharers": plan.shard, "sequence": plan.sequence and plan.tensor > 1,
        "micro_rows": asked.rows / plan.readers / plan.micro_batches, "micro_batches": plan.micro_batches,
        "recompute": RECOMPUTE.index(recompute), **(resting or Places()).columns,
    })  # fmt: skip


def given(
    asked: Asked,
    plan: Plan,
    recompute: str,
    clock: Calibration | None = None,
    scale: Calibration | None = None,
    resting: Places | None = None,
) -> Choice:
    """What is expected of one plan, whether it fits or not. Raises ValueError where it is not for so many processes."""
    known = calibrations(asked.cluster)
    return replace(
        _choice(planned(asked, plan, recompute, resting), 0, clock or known[0], scale or known[1]), plan=plan.short()
    )


def room(asked: Asked) -> float:
    """GiB of an accelerator that a plan may fill."""
    return asked.cluster.share.memory / GIB * USABLE


def _degrees(asked: Asked) -> list[tuple[int, int, int, int, int]]:
    """Tensor, pipeline, context, expert degrees and chunks that the model can be cut into."""
    model, world = asked.model, asked.cluster.count
    whole = {name: int(value) for name, value in model.items()}
    cut = [whole[name] for name in CUT]
    # Models of two stacks, and of images, are cut neither into stages nor along their rows.
    text, stages = whole["vocab"] > 0 and not whole["second_layers"], whole["layers"]
    found = []
    for tensor in divisors(world):
        if tensor > asked.cluster.accelerator.node or any(size % tensor for size in cut):
            continue
        for pipeline in divisors(world // tensor):
            if pipeline > (stages if text else 1):
                break
            for context in divisors(world // (tensor * pipeline)):
                shared = asked.length % (2 * context) == 0 and asked.length // context >= 1024
                if context > 1 and not (text and shared):
                    continue
                data = world // (tensor * pipeline * context)
                if asked.rows % data:
                    continue
                experts = [each for each in divisors(whole["experts"] or 1) if data % each == 0]
                chunks = [1, *(each for each in (2, 4) if pipeline > 1 and whole["layers"] % (pipeline * each) == 0)]
                found += [(tensor, pipeline, context, expert, chunk) for expert in experts for chunk in chunks]
    return found


def search(asked: Asked, clock: Calibration | None = None, scale: Calibration | None = None, count: int = 5) -> Found:
    """The fastest plans that fit. Raises NoPlan where none does, saying by how much.

    Args: clock, scale: what is known of time and of memory; by default what the cluster's own runs taught, if any did.
    """
    if asked.offload == "auto":
        try:
            return search(replace(asked, offload="none"), clock, scale, count)
        except NoPlan:
            return search(replace(asked, offload=farthest(asked.cluster)), clock, scale, count)
    known = calibrations(asked.cluster)
    clock, scale = clock or known[0], scale or known[1]
    jobs = candidates(asked)
    most = room(asked)
    gib = scale.predict(fullest, jobs)
    fits = np.flatnonzero((gib <= most) & has_room(asked.offload, asked.cluster, jobs, scale))
    if not len(fits):
        raise _too_large(asked, jobs, float(gib.min()), most)
    kept = jobs.take(fits)
    took = clock.predict(seconds, kept)
    kinds = sum((getattr(kept, name) > 1).astype(float) for name in ("tensor", "pipeline", "context", "expert"))
    order = np.argsort(took * (1 + KIND * kinds), kind="stable")
    best = [_choice(kept, int(row), clock, scale) for row in order[:count]]
    smallest = np.minimum.accumulate(np.r_[np.inf, gib[fits][order]])[:-1]
    front = order[gib[fits][order] < smallest * 0.98][:12]
    pareto = [_choice(kept, int(row), clock, scale) for row in front]
    return Found(best, pareto, len(jobs), len(fits))


def smallest(asked: Asked) -> Choice:
    """The plan that takes the least memory, whether it fits or not. Raises NoPlan where none can be carried out."""
    jobs, (clock, scale) = candidates(asked), calibrations(asked.cluster)
    return _choice(jobs, int(np.argmin(scale.predict(fullest, jobs))), clock, scale)


def _too_large(asked: Asked, jobs: Jobs, least: float, most: float) -> NoPlan:
    device, host = asked.cluster.accelerator, asked.cluster.share.host
    if least <= most and host is not None:
        return NoPlan(f"{no_room(host)} of {device.name}", where="plan", fix="take more of them, or larger hosts")
    lacks = f"the smallest of {len(jobs)} plans takes {least:,.1f} GiB on each of {asked.cluster.count} {device.name}"
    enough = math.ceil(asked.cluster.count * least / most)
    fix = f"about {enough} of them might do, or shorter rows, or fewer rows a step"
    return NoPlan(f"{lacks}, {least - most:,.1f} GiB more than there is", where="plan", fix=fix)


def _choice(jobs: Jobs, row: int, clock: Calibration, scale: Calibration) -> Choice:
    one = jobs.take(np.array([row]))
    took, held = float(clock.predict(seconds, one)[0]), float(scale.predict(fullest, one)[0])
    times = {name: float(part[0]) for name, part in step_time(one, clock.coefficients).items()}
    memory = {name: float(part[0]) / GIB for name, part in device_memory(one, scale.coefficients).items()}
    return Choice(
        _plan(one), RECOMPUTE[int(one.recompute[0])], int(one.micro_rows[0]), took, held,
        took * math.exp(-clock.spread), took * math.exp(clock.spread), times, memory, words_of(one),
        gib_away(one, scale),
    )  # fmt: skip


def _plan(one: Jobs) -> str:
    """As `Plan.parse` reads it: copies that share state out are `shard`, others `data`."""
    value = {name: int(getattr(one, name)[0]) for name in ("tensor", "pipeline", "context", "expert", "data", "chunks")}
    words = {"pipeline": value["pipeline"], "context": value["context"], "expert": value["expert"]}
    copies, zero = value["data"] // value["expert"], int(one.zero[0])
    words |= {"shard" if zero else "data": copies, "tensor": value["tensor"]}
    words["micro_batches"] = int(one.micro_batches[0])
    told = [f"{name}={number}" for name, number in words.items() if number > 1]
    if copies > 1 and 0 < zero < 3:
        told.append(f"zero={zero}")
    if value["chunks"] > 1:
        told += ["schedule=interleaved", f"stages={value['chunks']}"]
    return ",".join(told) or "data=1"
