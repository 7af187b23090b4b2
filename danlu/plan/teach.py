"""Measured runs of Danlu's own engine, and what they teach of the machine that they ran on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from danlu.plan.calibrate import Calibration, calibrate
from danlu.plan.formulas import step_time
from danlu.plan.jobs import Column, Jobs
from danlu.plan.learned import fullest, seconds
from danlu.plan.machine import Trial
from danlu.plan.memory import MEMORY
from danlu.plan.processor import PROCESSOR_TIME
from danlu.plan.processor_memory import PROCESSOR_MEMORY
from danlu.plan.time import TIME


@dataclass(frozen=True)
class Ran:
    """One run.

    Attributes:
        what: in words.
        job: its one row.
        seconds, optimizer_seconds: of a step, and of that in the optimizer.
        gib: that the fullest process held at most.
    """

    what: str
    job: Jobs
    seconds: float
    optimizer_seconds: float
    gib: float


def teach(runs: Sequence[Ran]) -> tuple[Calibration, Calibration]:
    """Coefficients of time and of memory, fitted to runs on one kind of device."""
    rows = [each.job for each in runs]
    jobs = together(rows)
    processor = bool(jobs.processor.any())
    measured = np.array([*(each.seconds for each in runs), *(each.optimizer_seconds for each in runs)])
    clock = calibrate(_phases, PROCESSOR_TIME if processor else TIME, together([*rows, *rows]), measured)
    held = np.array([each.gib for each in runs])
    return clock, calibrate(fullest, PROCESSOR_MEMORY if processor else MEMORY, jobs, held)


def _phases(jobs: Jobs, coefficients: dict[str, float]) -> Column:
    """Seconds of steps in the first half of the rows, and of their optimizers alone in the second."""
    parts = step_time(jobs, coefficients)
    return np.where(np.arange(len(jobs)) < len(jobs) // 2, parts["total"], parts["optimizer"])


def together(rows: Sequence[Jobs]) -> Jobs:
    """Jobs of one row each as the rows of one."""
    return Jobs(**{each.name: np.concatenate([getattr(row, each.name) for row in rows]) for each in fields(Jobs)})


def trials(runs: Sequence[Ran], clock: Calibration, scale: Calibration) -> tuple[Trial, ...]:
    """The runs beside what is predicted of them."""
    jobs = together([each.job for each in runs])
    told = zip(runs, clock.predict(seconds, jobs).tolist(), scale.predict(fullest, jobs).tolist(), strict=True)
    return tuple(
        Trial(what=each.what, seconds=each.seconds, optimizer_seconds=each.optimizer_seconds, gib=each.gib,
              predicted_seconds=took, predicted_gib=held)
        for each, took, held in told
    )  # fmt: skip
