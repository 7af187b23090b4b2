"""The named sums for either kind of device: accelerators, or processors that work one thing after another."""

from __future__ import annotations

from danlu.plan import memory, time
from danlu.plan.jobs import Column, Jobs
from danlu.plan.processor import processor_time
from danlu.plan.processor_memory import processor_memory


def step_time(jobs: Jobs, coefficients: dict[str, float]) -> dict[str, Column]:
    """Seconds of a step by part; all jobs are on one kind of device."""
    formula = processor_time if jobs.processor.any() else time.step_time
    return formula(jobs, coefficients)


def device_memory(jobs: Jobs, coefficients: dict[str, float]) -> dict[str, Column]:
    """Bytes by part on the fullest process; all jobs are on one kind of device."""
    formula = processor_memory if jobs.processor.any() else memory.device_memory
    return formula(jobs, coefficients)
