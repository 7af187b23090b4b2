"""Every way to spread a model over a cluster, those that fit, and the fastest of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from danlu.errors import DanluError
from danlu.plan.calibrate import Calibration
from danlu.plan.cluster import Cluster
from danlu.plan.jobs import Column, Jobs
from danlu.plan.learned import MEMORY_BELIEF, TIME_BELIEF, fullest, seconds
from danlu.plan.memory import GIB, device_memory
from danlu.plan.plan import Plan
from danlu.plan.time import step_time

USABLE = 0.94  # of a device's memory; the rest is lost between blocks
KIND = 0.003  # of a step's time that one kind of parallelism less is worth
RECOMPUTE = ("none", "selective", "full")


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
    """

    model: dict[str, float]
    cluster: Cluster
    length: int
    rows: int
    precision: str = "bf16"


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
    world = asked.cluster.count
    degrees = np.array(_degrees(asked), dtype=np.float64).reshape(-1, 5)
    micro = np.array(divisors(asked.rows), dtype=np.float64)
    zero = np.array([1.0, 3.0]) if world > 1 else np.array([0.0])
    recompute = np.array([0.0, 1.0, 2.0])
    grid = np.meshgrid(np.arange(len(degrees)), micro, zero, recompute, indexing="ij")
    at, micro_rows, zeros, again = (axis.ravel() for axis in grid)
    tensor, pipeline, context, expert, chunks = degrees[at].T
    data = world / (tensor * pipeline * context)
    share = asked.rows / data
    # Weights gathered for every micro-batch of a pipeline would cost more than they save.
    legal = (share % micro_rows == 0) & ((zeros < 3) | (pipeline == 1))
    legal &= (chunks == 1) | ((share / micro_rows) % pipeline == 0)
    if not legal.any():
        raise NoPlan(f"{asked.rows} rows a step cannot be shared by {world} accelerators", where="plan",
                         fix="take a multiple of them as rows of a step")  # fmt: skip
    columns = {"tensor": tensor, "pipeline": pipeline, "context": context, "expert": expert, "chunks": chunks,
               "data": data, "zero": zeros, "sharers": data / expert, "expert_sharers": data / expert,
               "sequence": tensor > 1, "micro_rows": micro_rows, "micro_batches": share / micro_rows,
               "recompute": again}  # fmt: skip
    return _jobs(asked, {name: column[legal] for name, column in columns.items()})


def _jobs(asked: Asked, columns: Mapping[str, float | Column]) -> Jobs:
    """Plans as rows: `columns` say how the work is cut, and `asked` what it is and on what."""
    device, weight = asked.cluster.accelerator, 4.0 if asked.precision == "fp32" else 2.0
    return Jobs.of(
        **asked.model, **columns, length=asked.length, balanced=0, flash=1, compiled=1, weight_bytes=weight,
        gemm_bytes={"fp8": 1.0, "fp4": 0.5}.get(asked.precision, weight), state_bytes=8.0 if weight == 4 else 12.0,
        gradient_bytes=4.0, peak=device.rate(asked.precision), memory_rate=device.memory_rate, units=device.units,
        near_rate=device.near, far_rate=device.far, node=min(device.node, asked.cluster.count), release=0,
    )  # fmt: skip


def given(
    asked: Asked, plan: Plan, recompute: str, clock: Calibration = TIME_BELIEF, scale: Calibration = MEMORY_BELIEF
) -> Choice:
    """What is expected of one plan, whether it fits or not. Raises ValueError where it is not for so many processes."""
    if plan.world != asked.cluster.count:
        raise ValueError(f"a plan of {plan.world} processes for {asked.cluster.count} accelerators")
    jobs = _jobs(asked, {
        "tensor": plan.tensor, "pipeline": plan.pipeline, "context": plan.context, "expert": plan.expert,
        "chunks": plan.stages, "data": plan.readers, "zero": plan.zero if plan.shard > 1 else 0, "sharers": plan.shard,
        "expert_sharers": plan.shard, "sequence": plan.sequence and plan.tensor > 1,
        "micro_rows": asked.rows / plan.readers / plan.micro_batches, "micro_batches": plan.micro_batches,
        "recompute": RECOMPUTE.index(recompute),
    })  # fmt: skip
    return replace(_choice(jobs, 0, clock, scale), plan=plan.short())


def room(asked: Asked) -> float:
    """GiB of an accelerator that a plan may fill."""
    return asked.cluster.accelerator.memory / GIB * USABLE


def _degrees(asked: Asked) -> list[tuple[int, int, int, int, int]]:
    """Tensor, pipeline, context, expert degrees and chunks that the model can be cut into."""
    model, world = asked.model, asked.cluster.count
    whole = {name: int(value) for name, value in model.items()}
    cut = [whole["heads"], whole["kv_heads"], whole["feedforward"], whole["expert_width"] or whole["feedforward"]]
    found = []
    for tensor in divisors(world):
        if tensor > asked.cluster.accelerator.node or any(size % tensor for size in cut):
            continue
        for pipeline in divisors(world // tensor):
            if pipeline > whole["layers"]:
                break
            for context in divisors(world // (tensor * pipeline)):
                if context > 1 and (asked.length % (2 * context) or asked.length // context < 1024):
                    continue
                data = world // (tensor * pipeline * context)
                if asked.rows % data:
                    continue
                experts = [each for each in divisors(whole["experts"] or 1) if data % each == 0]
                chunks = [1, *(each for each in (2, 4) if pipeline > 1 and whole["layers"] % (pipeline * each) == 0)]
                found += [(tensor, pipeline, context, expert, chunk) for expert in experts for chunk in chunks]
    return found


def search(asked: Asked, clock: Calibration = TIME_BELIEF, scale: Calibration = MEMORY_BELIEF, count: int = 5) -> Found:
    """The fastest plans that fit. Raises NoPlan where none does, saying by how much."""
    jobs = candidates(asked)
    most = room(asked)
    gib = scale.predict(fullest, jobs)
    fits = np.flatnonzero(gib <= most)
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


def _too_large(asked: Asked, jobs: Jobs, least: float, most: float) -> NoPlan:
    device = asked.cluster.accelerator
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
        took * math.exp(-clock.spread), took * math.exp(clock.spread), times, memory,
    )  # fmt: skip


def _plan(one: Jobs) -> str:
    """As `Plan.parse` reads it: copies that share state out are `shard`."""
    value = {name: int(getattr(one, name)[0]) for name in ("tensor", "pipeline", "context", "expert", "data", "chunks")}
    words = {"pipeline": value["pipeline"], "context": value["context"], "expert": value["expert"]}
    words |= {"shard": value["data"] // value["expert"], "tensor": value["tensor"]}
    words["micro_batches"] = int(one.micro_batches[0])
    told = [f"{name}={number}" for name, number in words.items() if number > 1]
    if words["shard"] > 1 and int(one.zero[0]) < 3:
        told.append(f"zero={int(one.zero[0])}")
    if value["chunks"] > 1:
        told += ["schedule=interleaved", f"stages={value['chunks']}"]
    return ",".join(told) or "data=1"
