"""The only training loop: batch, objective, optimizer step, checkpoint when due."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from danlu.console import progress
from danlu.errors import DanluError
from danlu.train import state
from danlu.train.objective import Objective
from danlu.train.optimizer import MasterAdamW
from danlu.train.watch import Record, Watch, resident_bytes

BUFFER = "buffer."  # before the names of a model's buffers in a checkpoint


class Part(Protocol):
    """A batch, or a part of one.

    Attributes:
        count: targets that it holds; the loss of a step is a mean over them.
        size: tokens (or examples) that it holds, for the rate that is shown.
    """

    @property
    def count(self) -> int: ...

    @property
    def size(self) -> int: ...

    def split(self, parts: int) -> Sequence[Part]:
        """Cut it into parts whose counts sum to its own."""
        ...


class Batches(Protocol):
    """What to learn from."""

    def batch(self, step: int) -> Part:
        """The batch of a step, counted from 0: the same at every call, and of nothing but the step."""
        ...


def train(
    model: nn.Module,
    objective: Objective,
    stream: Batches,
    optimizer: MasterAdamW,
    schedule: Callable[[int], float],
    *,
    steps: int,
    micro_batches: int,
    checkpoint_steps: int,
    keep_checkpoints: int,
    seed: int,
    out: Path,
    checkpoints: Path,
) -> list[float]:
    """Train until `steps` steps are done, going on from the newest whole checkpoint if there is one.

    A step is a pure function of the state before it, the step's number and the seed; nothing else is carried over, so
    a run killed anywhere ends with the same bits as one left alone.

    Args:
        model: any module; what of it learns, `optimizer` holds. Buffers, such as running means, are resumed too.
        objective: (model, part of a batch) -> Loss.
        stream: what to learn from.
        schedule: step, counted from 0 -> learning rate.
        micro_batches: parts each batch is cut into; the loss is divided by the whole batch's count, so the gradient
            does not depend on the cut.
        out: gets metrics.jsonl and tensorboard/.
        checkpoints: where checkpoints are kept.

    Returns: the loss of every step in nat/token, resumed ones included.
    Raises DanluError where the loss or the gradient stops being finite.
    """
    saved = state.resume(checkpoints)
    done = 0
    if saved is not None:
        done, tensors = saved
        optimizer.load(tensors)
        for name, buffer in model.named_buffers():
            buffer.copy_(tensors[BUFFER + name])
    model.train()
    with Watch(out, done) as watch, progress("tuning", steps - done, "steps") as tick:
        for step in range(done, steps):
            started = time.perf_counter()
            torch.manual_seed(seed * 1_000_003 + step)  # dropout depends on the step alone
            batch = stream.batch(step)
            total = 0.0
            for part in batch.split(micro_batches):
                loss = objective(model, part)
                ((loss.sum + loss.penalty) / max(batch.count, 1)).backward()
                total += float(loss.sum.detach())
            rate = schedule(step)
            norm = optimizer.step(rate)
            mean = total / max(batch.count, 1)
            if not math.isfinite(mean) or not math.isfinite(norm):
                raise DanluError(
                    f"step {step + 1}: loss {mean}, gradient norm {norm}", fix="lower tune.learning_rate or tune.clip"
                )
            seconds = time.perf_counter() - started
            watch.record(
                Record(
                    step=step + 1,
                    loss=mean,
                    learning_rate=rate,
                    gradient_norm=norm,
                    tokens=batch.size,
                    trained=batch.count,
                    tokens_per_second=batch.size / seconds,
                    seconds=seconds,
                    memory_bytes=resident_bytes(),
                )
            )
            tick.advance(1, f"loss {mean:.3f}, {batch.size / seconds:,.0f} token/s")
            if (step + 1) % checkpoint_steps == 0 or step + 1 == steps:
                buffers = {BUFFER + name: buffer for name, buffer in model.named_buffers()}
                state.save(checkpoints, step + 1, optimizer.state() | buffers, keep_checkpoints)
    return watch.losses
