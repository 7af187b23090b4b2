"""What a run writes down at every step: metrics.jsonl for machines, TensorBoard beside it, a line for people."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import record_function

from danlu.artifact import peak_memory
from danlu.console import say
from danlu.train.metrics import METRICS, cut_back

MARK = "phase of a step: "
CURVES = ("loss", "learning_rate", "gradient_norm", "tokens_per_second", "memory_bytes", "mfu", "validation")


@dataclass(frozen=True)
class Record:
    """One optimizer step.

    Attributes:
        step: counted from 1.
        loss: mean over the step's targets, nat/token; with several turns, the first one's.
        learning_rate, gradient_norm: of this step; the norm is the one before clipping.
        tokens: tokens computed on all processes, padding left out; trained: those that were learned.
        tokens_per_second: tokens / seconds.
        seconds: the step's wall time.
        memory_bytes: the most that a process has held so far: in RAM, or on its accelerator.
        batch: hash of the whole batch's token ids, in the order of its rows.
        mfu: share of the measured rate of matrix products that the model's own operations made up, or None.
        phases: seconds of the first process in data, forward, backward, communication and optimizer, and, since the
            step before, in validation and in standing still for a checkpoint. What is sent within the forward and the
            backward pass counts there; now and then "waiting in forward" and the like say how much of a phase of this
            step that was (see `danlu.train.waiting`).
        skipped: why the weights were not updated, or None.
        validation: loss on what is not learned, where it was measured after this step.
        quality: figures besides that loss, by name, measured with it.
        turns: loss, learning rate and gradient norm of each turn after the first.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    trained: int
    tokens_per_second: float
    seconds: float
    memory_bytes: int
    batch: str = ""
    mfu: float | None = None
    phases: dict[str, float] = field(default_factory=dict)
    skipped: str | None = None
    validation: float | None = None
    quality: dict[str, float] = field(default_factory=dict)
    turns: list[dict[str, float]] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """As written: what there is nothing to say of is left out."""
        return {name: value for name, value in asdict(self).items() if value not in (None, [], {}, "")}

    def curves(self) -> dict[str, float]:
        """What is drawn over the steps, by name; the seconds of a phase as `seconds_in/forward` and the like."""
        drawn = {name: getattr(self, name) for name in CURVES}
        drawn |= self.quality | {f"seconds_in/{name}": seconds for name, seconds in self.phases.items()}
        return {name: value for name, value in drawn.items() if value is not None}


class Watch:
    """Appends records to metrics.jsonl and to TensorBoard; lines past the step resumed from are dropped first.

    Args:
        out: gets the files.
        done: steps done before.
        label: the group of TensorBoard's curves.
    """

    def __init__(self, out: Path, done: int, label: str = "tune") -> None:
        self.label = label
        out.mkdir(parents=True, exist_ok=True)
        cut_back(out / METRICS, done)
        self.file = (out / METRICS).open("a", encoding="utf-8")
        self.board = _board(out / "tensorboard", done, label)

    def record(self, record: Record) -> None:
        """Write one step down; it is on its way to the disk when this returns."""
        self.file.write(json.dumps(record.plain()) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in record.curves().items():
                self.board.add_scalar(f"{self.label}/{name}", value, record.step)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


class Clock:
    """Seconds spent in the phases of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._marks = False

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens inside counts for a phase."""
        started = time.perf_counter()
        try:
            with record_function(MARK + name) if self._marks else nullcontext():
                yield
        finally:
            self.seconds[name] += time.perf_counter() - started

    @contextmanager
    def marking(self) -> Iterator[None]:
        """Inside, a profiler sees the phases, under names that begin with `MARK`."""
        self._marks = True
        try:
            yield
        finally:
            self._marks = False

    def take(self) -> dict[str, float]:
        """What was counted since the last time, rounded to microseconds."""
        found = {name: round(seconds, 6) for name, seconds in self.seconds.items()}
        self.seconds.clear()
        return found


def memory_in_use(device: torch.device) -> int:
    """The most bytes that this process has held: on its accelerator if it has one, else in RAM."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()


def _board(home: Path, done: int, label: str) -> Any:
    """A TensorBoard writer, or None where the package is not installed (said once)."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        say(f"{label}: no TensorBoard logs (pip install 'danlu[tensorboard]')")
        return None
    return SummaryWriter(str(home), purge_step=done + 1 if done else None)
