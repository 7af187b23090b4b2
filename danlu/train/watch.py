"""What a run writes down at every step: metrics.jsonl for machines, TensorBoard beside it, a line for people."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from danlu.console import say


@dataclass(frozen=True)
class Record:
    """One optimizer step.

    Attributes:
        step: counted from 1.
        loss: mean over the step's trained tokens, nat/token.
        learning_rate, gradient_norm: of this step; the norm is the one before clipping.
        tokens: tokens computed, padding left out; trained: those that were learned.
        tokens_per_second: tokens / seconds.
        seconds: the step's wall time.
        memory_bytes: resident memory of the process after the step.
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


class Watch:
    """Appends records to metrics.jsonl and to TensorBoard; lines past the step resumed from are dropped first."""

    def __init__(self, out: Path, done: int) -> None:
        out.mkdir(parents=True, exist_ok=True)
        path = out / "metrics.jsonl"
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= done]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self.losses = [json.loads(line)["loss"] for line in kept]
        self.file = path.open("a", encoding="utf-8")
        self.board = _board(out / "tensorboard", done)

    def record(self, record: Record) -> None:
        """Write one step down; it is on its way to the disk when this returns."""
        self.losses.append(record.loss)
        self.file.write(json.dumps(asdict(record)) + "\n")
        self.file.flush()
        if self.board is not None:
            for name in ("loss", "learning_rate", "gradient_norm", "tokens_per_second"):
                self.board.add_scalar(f"tune/{name}", getattr(record, name), record.step)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    return int(psutil.Process(os.getpid()).memory_info().rss)


def _whole_lines(path: Path) -> list[str]:
    """The lines that were written to their end; a kill may have cut the last one short."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return text.split("\n")[:-1]


def _board(home: Path, done: int) -> Any:
    """A TensorBoard writer, or None where the package is not installed (said once)."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        say("tune: no TensorBoard logs (pip install 'danlu[tensorboard]')")
        return None
    return SummaryWriter(str(home), purge_step=done + 1 if done else None)
