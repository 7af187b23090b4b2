"""What measured runs taught of each software on each hardware, and predictions for the rows of a table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from danlu.plan.calibrate import Calibration, believed, calibrate, keys
from danlu.plan.cluster import Cluster
from danlu.plan.formulas import device_memory, step_time
from danlu.plan.jobs import Column, Jobs
from danlu.plan.memory import GIB, MEMORY, stage_memory
from danlu.plan.processor import PROCESSOR_TIME
from danlu.plan.processor_memory import PROCESSOR_MEMORY
from danlu.plan.tables import Table
from danlu.plan.time import TIME

FEWEST = 5  # measured runs of a software that its own coefficients are fitted to
NARROW = 3  # different jobs of a software on one accelerator, or on one node of it, for coefficients of their own
LAYER = ("width", "feedforward", "length", "recompute", "gemm_bytes", "tensor", "peak", "rank")
SAME_RELEASE = (("release", "experts", "state_layers"),)
SAME_TIME = (LAYER, (*LAYER, "micro_rows"))
SAME_MEMORY = (("width", "tensor", "pipeline"), ("width", "tensor", "pipeline", "micro_rows"))
# Without a measurement, 9 of 10 runs of the public tables are predicted within these factors, as logarithms.
TIME_BELIEF, MEMORY_BELIEF = believed(TIME, 0.5), believed(MEMORY, 0.5)
PROCESSOR_BELIEF = believed(PROCESSOR_TIME, 0.5), believed(PROCESSOR_MEMORY, 0.3)
WIDER_SPREAD = 0.3  # the same, at the least, of what runs of another accelerator, size or kin taught
Key = tuple[str, ...]


def calibrations(cluster: Cluster) -> tuple[Calibration, Calibration]:
    """What is known of time and of memory: what runs on the cluster taught, or what is believed of its kind."""
    return cluster.taught or (PROCESSOR_BELIEF if cluster.accelerator.processor else (TIME_BELIEF, MEMORY_BELIEF))


def seconds(jobs: Jobs, coefficients: dict[str, float]) -> Column:
    """Of a step."""
    return step_time(jobs, coefficients)["total"]


def fullest(jobs: Jobs, coefficients: dict[str, float]) -> Column:
    """GiB of the fullest process."""
    return device_memory(jobs, coefficients)["total"] / GIB


def first_stage(jobs: Jobs, coefficients: dict[str, float]) -> Column:
    """GiB of a process of the first stage, which some softwares tell instead of the fullest."""
    return stage_memory(jobs, coefficients, np.zeros(1))["total"] / GIB


@dataclass(frozen=True)
class Learned:
    """What measured runs taught of each software and hardware, for one thing that is predicted."""

    of: dict[Key, Calibration]
    belief: Calibration

    def nearest(self, key: Key) -> Calibration:
        """Of the same software and hardware, of ever wider circles about them, of the nearest kin; or the belief."""
        if key in self.of:
            return self.of[key]
        circles = [key[:wide] for wide in range(len(key) - 1, 0, -1)]
        kin = [other for other in self.of if _kin(other, key)]
        kin.sort(key=lambda other: -sum(one == same for one, same in zip(other, key, strict=False)))
        for other in (*circles, *kin):
            if other in self.of:
                taught = self.of[other]
                return replace(taught, spread=max(taught.spread, WIDER_SPREAD))
        return self.belief


def _kin(one: Key, other: Key) -> bool:
    """Whether two are the same software, or both of Megatron's family, on one kind of accelerator."""
    family = one[0] == other[0] or all(name.startswith(("megatron", "nemo")) for name in (one[0], other[0]))
    return family and one[1:2] == other[1:2]


def time_keys(table: Table) -> list[Key]:
    """What coefficients of time are kept by: software, accelerator, and whether the job spans nodes."""
    return [(name, device, "many nodes" if spans else "one node") for name, device, spans in table.stacks]


def memory_keys(table: Table) -> list[Key]:
    """What coefficients of memory are kept by: the software."""
    return [(name,) for name, _, _ in table.stacks]


def learn_time(table: Table, rows: NDArray[np.intp]) -> Learned:
    """Coefficients of time from some rows of a table."""

    def teach(some: list[int], wider: Calibration | None) -> Calibration:
        jobs = table.jobs.take(np.array(some))
        return calibrate(seconds, TIME, jobs, table.seconds[some], SAME_TIME, SAME_RELEASE, wider)

    return Learned(_learn(table, rows, time_keys(table), table.seconds, teach), TIME_BELIEF)


def learn_memory(table: Table, rows: NDArray[np.intp]) -> Learned:
    """Coefficients of memory from some rows of a table."""

    def teach(some: list[int], wider: Calibration | None) -> Calibration:
        formula = first_stage if table.first_stage[some[0]] else fullest
        return calibrate(formula, MEMORY, table.jobs.take(np.array(some)), table.gib[some], SAME_MEMORY, wider=wider)

    return Learned(_learn(table, rows, memory_keys(table), table.gib, teach), MEMORY_BELIEF)


def _learn(
    table: Table,
    rows: NDArray[np.intp],
    keys: list[Key],
    measured: Column,
    teach: Callable[[list[int], Calibration | None], Calibration],
) -> dict[Key, Calibration]:
    by_key: dict[Key, list[int]] = {}
    for row in rows[measured[rows] > 0].tolist():
        for wide in range(1, len(keys[row]) + 1):
            by_key.setdefault(keys[row][:wide], []).append(row)
    enough = {
        key: tuple(some)
        for key, some in by_key.items()
        if (len(some) >= FEWEST if len(key) == 1 else different(table.jobs, some) >= NARROW)
    }
    made: dict[Key, Calibration] = {}
    for key in sorted(enough, key=len):
        wider = key[:-1]
        if enough.get(wider) == enough[key]:  # a circle that holds no more runs than the one inside it teaches the same
            made[key] = made[wider]
        else:
            made[key] = teach(list(enough[key]), made.get(wider))
    return made


def different(jobs: Jobs, rows: list[int]) -> int:
    """Jobs among these that differ in more than the software's release: the same one again teaches nothing new."""
    columns = tuple(each.name for each in fields(Jobs) if each.name != "release")
    return len(set(keys(jobs.take(np.array(rows)), columns)))


@dataclass(frozen=True)
class Predicted:
    """Beside the rows of a table.

    Attributes:
        seconds, gib: of a step, and of the process that the table tells of.
        fullest: GiB of the fullest process.
        seconds_spread, gib_spread: half the width of the 90 % interval, in natural logarithms.
    """

    seconds: Column
    gib: Column
    fullest: Column
    seconds_spread: Column
    gib_spread: Column


def predict(table: Table, rows: NDArray[np.intp], times: Learned, memories: Learned) -> Predicted:
    """Predictions for some rows."""
    columns = np.full((5, len(rows)), math.nan)
    by_keys: dict[tuple[Key, Key], list[int]] = {}
    pairs = list(zip(time_keys(table), memory_keys(table), strict=True))
    for place, row in enumerate(rows.tolist()):
        by_keys.setdefault(pairs[row], []).append(place)
    for (of_time, of_memory), places in by_keys.items():
        some = rows[places]
        jobs = table.jobs.take(some)
        clock, scale = times.nearest(of_time), memories.nearest(of_memory)
        told = first_stage if table.first_stage[int(some[0])] else fullest
        columns[0, places] = clock.predict(seconds, jobs)
        columns[1, places] = scale.predict(told, jobs)
        columns[2, places] = np.maximum(scale.predict(fullest, jobs), columns[1, places])
        columns[3, places], columns[4, places] = clock.spread, scale.spread
    return Predicted(*columns)
