"""Tables of measured runs, one row a run, as the columns predictions are made from."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from danlu.errors import DanluError
from danlu.plan.cluster import accelerator
from danlu.plan.counts import operations
from danlu.plan.jobs import Column, Jobs
from danlu.plan.runs import Lacks, job_columns, known_stack, number
from danlu.plan.stacks import Row, Stack, told_elsewhere

NEEDED = ("id", "model", "layers", "hidden", "gpu", "n_gpus", "framework", "tp", "pp", "dp", "mbs", "gbs", "iter_s")
MEASURED = ("iter_s", "tokens_s_gpu", "tflops_gpu", "mfu_pct", "mem_gib")
OPTIONAL = (*MEASURED, "seq", "vocab", "precision", "shard", "recompute", "compile", "sched", "notes")


@dataclass(frozen=True)
class Table:
    """Rows of which a prediction can be made.

    Attributes:
        rows: all rows of the file as they stand.
        at: which of them `jobs` describes, in order.
        jobs: their columns.
        stacks: the software and hardware of each, as coefficients are kept by.
        groups: model, cluster and batch of each, as `id`s are held apart by in cross-validation.
        seconds: measured, or from the tokens or operations a second that were; nan where nothing is told.
        gib: measured, in the table's own unit (some tell GB), nan where not told.
        first_stage: where the memory told is the first stage's.
        failed: the run ended for lack of memory.
        notes: of rows that are left out, by place: what lacks.
    """

    rows: list[Row]
    at: list[int]
    jobs: Jobs
    stacks: list[tuple[str, str, bool]]
    groups: list[tuple[str, ...]]
    seconds: Column
    gib: Column
    first_stage: list[bool]
    failed: list[bool]
    notes: dict[int, str]

    def take(self, rows: NDArray[np.intp]) -> Table:
        """Some of the rows that can be predicted."""
        kept = rows.tolist()
        return Table(
            self.rows, [self.at[row] for row in kept], self.jobs.take(rows), [self.stacks[row] for row in kept],
            [self.groups[row] for row in kept], self.seconds[rows], self.gib[rows],
            [self.first_stage[row] for row in kept], [self.failed[row] for row in kept], self.notes,
        )  # fmt: skip


def read_tables(paths: Iterable[Path]) -> Table:
    """All rows of some files. Raises DanluError where a file is empty or of another kind."""
    rows = [row for path in paths for row in _rows(path)]
    at: list[int] = []
    told: list[Row] = []
    made: list[dict[str, float]] = []
    stacks: list[Stack] = []
    notes: dict[int, str] = {}
    for place, row in enumerate(rows):
        try:
            stack = known_stack(row)
            full = dict.fromkeys(OPTIONAL, "") | row | told_elsewhere(row) | {"gpu": row["gpu"] or stack.gpu}
            columns = job_columns(full, stack)
            for name in MEASURED:
                number(full, name, math.nan)
        except (Lacks, DanluError) as lack:
            notes[place] = str(lack).splitlines()[0]
            continue
        at.append(place)
        told.append(full)
        made.append(columns)
        stacks.append(stack)
    jobs = Jobs.of(**{each.name: np.array([columns[each.name] for columns in made]) for each in fields(Jobs)})
    spans = np.broadcast_to(jobs.world > jobs.node, len(at)).tolist()
    where = [(stack.name, accelerator(row["gpu"]).name, far)
             for stack, row, far in zip(stacks, told, spans, strict=True)]  # fmt: skip
    groups = [tuple(row[key] for key in ("model", "layers", "hidden", "seq", "gpu", "n_gpus", "gbs")) for row in told]
    gib = np.array([number(row, "mem_gib", math.nan) for row in told])
    failed = [_failed(row) for row in told]
    first = [stack.first_stage for stack in stacks]
    return Table(rows, at, jobs, where, groups, _seconds(told, jobs, stacks), gib, first, failed, notes)


def _rows(path: Path) -> list[Row]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            read = csv.DictReader(file)
            rows = list(read)
            lacking = [name for name in NEEDED if name not in (read.fieldnames or ())]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DanluError(f"cannot be read as a table: {error}", where=str(path)) from None
    if lacking:
        raise DanluError(f"has no column {lacking[0]}", where=str(path), fix=f"needed: {', '.join(NEEDED)}")
    if not rows:
        raise DanluError("holds no rows", where=str(path))
    return [{name: value or "" for name, value in row.items() if name} for row in rows]


def _seconds(told: list[Row], jobs: Jobs, stacks: list[Stack]) -> Column:
    """Of a step: as told, else from tokens a second, else from the operations of the model a second, or their share."""
    half = np.array([stack.half for stack in stacks])
    tokens = jobs.data * jobs.micro_batches * jobs.micro_rows * jobs.length
    made = np.where(half, operations(jobs, True), operations(jobs, False)) / jobs.world
    iteration, rate, flops, share = (
        np.array([number(row, name, math.nan) for row in told])
        for name in ("iter_s", "tokens_s_gpu", "tflops_gpu", "mfu_pct")
    )
    of_model = np.array([row.get("tflops_kind", "").startswith("model") for row in told])
    found = iteration
    for other in (
        tokens / (rate * jobs.world),
        np.where(of_model, made / (flops * 1e12), math.nan),
        made / (share / 100 * jobs.peak),
    ):
        found = np.where(np.isnan(found), other, found)
    return found


def _failed(row: Row) -> bool:
    """Whether a run ended for lack of memory: nothing of it was measured, and its note says so."""
    measured = any(row.get(name, "").strip() for name in ("iter_s", "tokens_s_gpu", "tflops_gpu", "mem_gib"))
    return "OOM" in row["notes"] and not measured
