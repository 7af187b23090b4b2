"""The only training loop: batch, objective, optimizer step, checkpoint when due, on one process or on many."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from danlu.console import progress, say
from danlu.data.batch import Batches
from danlu.errors import DanluError
from danlu.train.ema import Average
from danlu.train.guard import Action, Guard
from danlu.train.hashing import check_numbers, hash_batch
from danlu.train.mesh import Mesh
from danlu.train.optimizer import clip
from danlu.train.replica import Replica
from danlu.train.scaling import LossScale
from danlu.train.state import Checkpoints
from danlu.train.watch import Record, Watch, memory_in_use

BUFFER = "buffer."  # before the names of a model's buffers in a checkpoint
STREAM = "stream."  # before those of a stream that keeps something from step to step


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


class Memory(Batches[Part], Protocol):
    """A stream that grows while it is read, as a replay buffer does; what it holds is part of a checkpoint."""

    def advance(self, step: int) -> None:
        """Take in what belongs before this step's batch; called once a step."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All that `batch` and `advance` depend on, as tensors of fixed shapes; a resumed run fills them in place."""
        ...


class Updates(Protocol):
    """What updates weights: an `Optimizer`, or what stands in for one, as `danlu.train.local_steps.LocalSteps` does."""

    @property
    def masters(self) -> dict[str, Tensor]: ...

    def gradients(self) -> dict[str, Tensor]: ...

    def step(self, learning_rate: float) -> None: ...

    def zero(self) -> None: ...

    def refresh(self) -> None: ...

    def state(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Turn:
    """One of the updates of a step. Most models have one a step; those that learn against each other take turns.

    Attributes:
        optimizer: of the weights that this turn updates.
        rate: step, counted from 0 -> learning rate.
        clip: the largest norm of the gradient, or None.
        average: of the optimizer's weights, kept up to date, or None.
        scale: the factor on the loss of what computes in fp16, or None.
    """

    optimizer: Updates
    rate: Callable[[int], float]
    clip: float | None = None
    average: Average | None = None
    scale: LossScale | None = None

    def state(self) -> dict[str, Tensor]:
        """Everything that its next update depends on, by names in a checkpoint; they share storage."""
        kept = [part.state() for part in (self.optimizer, self.average, self.scale) if part is not None]
        return {name: tensor for state in kept for name, tensor in state.items()}


@dataclass(frozen=True)
class Validation:
    """Measuring now and then on what is not learned.

    Attributes:
        every: steps between two measurements; one also ends the run.
        measure: the loss, the same number on every process; called in evaluation mode without gradients.
        observe: told each loss, as schedules on a plateau want.
        patience: measurements in a row that may be no better than the best before the run ends early; None for any.
        observed: what `observe` keeps, to be saved with a checkpoint, and how to take it up again.
        quality: figures besides the loss, by name, the same on every process; called as `measure` is.
    """

    every: int
    measure: Callable[[], float]
    observe: Callable[[float], None] = field(default=lambda loss: None)
    patience: int | None = None
    observed: tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], None]] | None = None
    quality: Callable[[], dict[str, float]] = field(default=dict)


class Progress:
    """How far a run is, besides its tensors: what a checkpoint's small values hold."""

    def __init__(self) -> None:
        self.loss: float | None = None
        self.validated: float | None = None
        self.best: float | None = None
        self.worse = 0

    def observe(self, loss: float) -> None:
        self.validated = loss
        if self.best is None or loss < self.best:
            self.best, self.worse = loss, 0
        else:
            self.worse += 1

    def state(self) -> dict[str, Any]:
        return {"loss": self.loss, "measured": self.validated, "best": self.best, "worse": self.worse}

    def load(self, saved: dict[str, Any]) -> None:
        self.best, self.worse = saved["best"], saved["worse"]
        self.loss, self.validated = saved.get("loss"), saved.get("measured")  # earlier checkpoints have neither


@dataclass(frozen=True)
class Done:
    """How a run ended.

    Attributes:
        steps: that were done.
        loss: of the last step in nat/token; None where there was none. metrics.jsonl has those of all steps.
        validated, best: the last validation's loss, and the lowest of all; None where there was none.
        why: "finished", "stopped" (asked to), or "early" (no better for too long).
        quality: what the last validation found besides the loss.
    """

    steps: int
    loss: float | None
    validated: float | None
    best: float | None
    why: str
    quality: dict[str, float] = field(default_factory=dict)


@dataclass
class Run:
    """Everything that a run is made of. `train` carries it out.

    Attributes:
        replica: the model part and objectives of this process, one objective a turn.
        turns: updates of a step, in their order.
        stream: what to learn from.
        steps: how many to do in all.
        seed: decides dropout and other chance in the model.
        checkpoints: where the state is kept, `checkpoint_steps` apart; where the best are, at each validation as well.
        out: gets metrics.jsonl and tensorboard/, from the first process.
        identity: JSON-able; what a checkpoint must have been made with to be resumed (model, data, batch, optimizer).
        validation, guard: None for none.
        stopping: polled each step; where any process says yes, all save and stop.
        alive: told the step and what is being done in it.
        finish: called when the last step is done, before it is measured and saved, as workers that train apart want it.
        accepted: called before the first step, once it is known that the run may go on from where it stands.
        flops: floating-point operations a token, for MFU; `ceiling`: operations a second of one process's device.
    """

    replica: Replica
    turns: Sequence[Turn]
    stream: Any
    steps: int
    seed: int
    checkpoints: Checkpoints
    checkpoint_steps: int
    out: Path
    identity: dict[str, Any] = field(default_factory=dict)
    validation: Validation | None = None
    guard: Guard = field(default_factory=Guard)
    stopping: Callable[[], bool] = lambda: False
    alive: Callable[[int, str], None] = lambda step, phase: None
    finish: Callable[[], None] = lambda: None
    accepted: Callable[[], None] = lambda: None
    flops: float = 0.0
    ceiling: float = 0.0
    label: str = "train"

    @property
    def mesh(self) -> Mesh:
        return self.replica.mesh

    def state(self) -> dict[str, Tensor]:
        """All tensors that the next step depends on, by their names in a checkpoint; they share storage."""
        found: dict[str, Tensor] = {}
        for number, turn in enumerate(self.turns):
            own = turn.state()
            found |= own if number == 0 else {f"turn{number}.{name}": tensor for name, tensor in own.items()}
        found |= {BUFFER + name: buffer for name, buffer in self.replica.buffers().items()}
        if hasattr(self.stream, "state"):
            found |= {STREAM + name: tensor for name, tensor in self.stream.state().items()}
        return found


def train(run: Run) -> Done:
    """Train until `run.steps` steps are done, going on from the newest whole checkpoint if there is one.

    A step is a pure function of the state before it, the step's number and the seed; nothing else is carried over, so
    a run killed anywhere ends with the same bits as one left alone.

    Raises DanluError where the checkpoints are of another run, the disk is full, or a step goes wrong and the guard's
    settings say stop.
    """
    noted = Progress()
    if run.guard.goes_back and not run.checkpoints.steps():
        _save(run, 0, noted, None)  # something to go back to
    while True:
        done = _resume(run, noted)
        run.accepted()
        try:
            return _go_on(run, done, noted)
        except DanluError:
            with suppress(DanluError):  # what is being written gets whole
                run.checkpoints.wait()
            raise
        except _Back as back:
            for turn in run.turns:
                turn.optimizer.zero()
            run.guard.leave_out(back.step, write=run.mesh.rank == 0)
            say(f"{run.label}: {back}; going back to the last checkpoint, and on without that batch")


class _Back(Exception):
    """A step went wrong, and the state before it is no longer trusted. `step` is counted from 0."""

    def __init__(self, step: int, why: str) -> None:
        super().__init__(f"step {step + 1}: {why}")
        self.step = step


def _resume(run: Run, noted: Progress) -> int:
    """Take up the newest whole checkpoint; returns the steps that are done."""
    run.checkpoints.wait()
    saved = run.checkpoints.open()
    if saved is None:
        if run.checkpoints.steps():
            raise DanluError("none of the checkpoints is whole", where=run.checkpoints.home, fix="choose another --out")
        return 0
    before = saved.extra["identity"]
    changed = [
        change
        for name, value in run.identity.items()
        if name in before
        for change in _changed(name, before[name], value)
    ]
    if changed:
        shown = "; ".join(f"{name} {was!r}, and this run has {now!r}" for name, was, now in changed[:4])
        more = f"; and {len(changed) - 4} more" if len(changed) > 4 else ""
        fix = "use the settings of that run, or another --out"
        raise DanluError(f"the checkpoint was made with {shown}{more}", where=run.checkpoints.home, fix=fix)
    saved.read_into(run.state())
    for turn in run.turns:
        turn.optimizer.refresh()
    run.replica.settle()
    noted.load(saved.extra["progress"])
    run.guard.load(saved.extra["guard"])
    if run.validation is not None and run.validation.observed is not None and "observed" in saved.extra:
        run.validation.observed[1](saved.extra["observed"])
    if run.mesh.rank == 0:
        say(f"{run.label}: goes on after step {saved.step}")
    return saved.step


def _changed(name: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """What differs between two JSON values, by its dotted name, and both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from _changed(f"{name}.{key}", before.get(key), now.get(key))
    elif before != now:
        yield name, before, now


def _save(run: Run, step: int, noted: Progress, score: float | None) -> None:
    extra = {
        "identity": run.identity,
        "progress": noted.state(),
        "guard": run.guard.state(),
        "plan": run.mesh.plan.plain(),
    }
    if run.validation is not None and run.validation.observed is not None:
        extra["observed"] = run.validation.observed[0]()
    run.checkpoints.save(step, run.state(), extra, score)


def _go_on(run: Run, done: int, noted: Progress) -> Done:
    first = run.mesh.rank == 0
    why, saved, last = "finished", done, None
    quality: dict[str, float] = {}
    for model in run.replica.models:
        model.train()
    bar = progress(run.label, run.steps - done, "steps") if first else nullcontext(None)
    run.replica.clock.take()  # of a try before this one
    with Watch(run.out, done, run.label) if first else nullcontext(None) as watch, bar as tick:
        for step in range(done, run.steps):
            record, stop = _step(run, step)
            done = step + 1
            if done == run.steps:
                run.finish()
            if run.validation is not None and (done % run.validation.every == 0 or done == run.steps):
                last, quality = _validate(run, done, noted)
                record = replace(record, validation=last, quality=quality)
                if run.validation.patience is not None and noted.worse > run.validation.patience:
                    why = "early"
                    run.finish()
            noted.loss = record.loss
            if watch is not None:
                watch.record(record)
            if tick is not None:
                tick.advance(1, f"loss {record.loss:.3f}, {record.tokens_per_second:,.0f} token/s")
            if stop:
                why = "stopped"
            scored = run.checkpoints.keep_best > 0 and record.validation is not None
            if done % run.checkpoint_steps == 0 or scored or done == run.steps or why != "finished":
                with run.replica.clock.phase("checkpoint"):
                    _save(run, done, noted, record.validation)
                saved = done
            if why != "finished":
                break
        run.checkpoints.wait()
    assert saved == done or done == 0
    validated = noted.validated if last is None else last
    best = min((loss for loss in (noted.best, last) if loss is not None), default=None)
    return Done(done, noted.loss, validated, best, why, quality)


def _step(run: Run, step: int) -> tuple[Record, bool]:
    """One step of all turns; returns what to note, and whether some process was asked to stop."""
    started, clock = time.perf_counter(), run.replica.clock
    torch.manual_seed(_seed(run, step))
    run.alive(step + 1, "data")
    with clock.phase("data"):
        if hasattr(run.stream, "advance"):
            run.stream.advance(step)
        batch = run.stream.batch(step)
        check_numbers(batch, step)
        here = batch.to(run.mesh.device) if run.mesh.device.type != "cpu" else batch
    with clock.phase("communication"):
        own = torch.tensor([batch.count, batch.size, float(run.stopping())], dtype=torch.float64)
        told: list[float] = run.mesh.sum(own).tolist()
        digest = hash_batch(run.mesh, batch)
    copies = run.mesh.world // run.mesh.plan.readers
    count, size = round(told[0]) // copies, round(told[1]) // copies
    made, skipped = [], None
    for number, turn in enumerate(run.turns):
        if step in run.guard.left_out:
            skipped = "left out: an earlier try went wrong"
            made.append({"loss": 0.0, "learning_rate": turn.rate(step), "gradient_norm": 0.0})
            continue
        loss, norm = _gradient(run, turn, number, here, count, step)
        made.append({"loss": loss, "learning_rate": turn.rate(step), "gradient_norm": norm})
        action, why = _judge(run, turn, number, loss, norm)
        if action == "stop":
            fix = "lower the learning rate or the clip, or see the settings of guard"
            raise DanluError(f"step {step + 1}: {why}", fix=fix)
        if action == "back":
            raise _Back(step, why)
        if action == "skip":
            skipped = why
            say(f"{run.label}: step {step + 1} is skipped: {why}")
            turn.optimizer.zero()
            continue
        with clock.phase("optimizer"):
            run.alive(step + 1, "optimizer")
            if turn.clip is not None:
                clip(turn.optimizer.gradients(), norm, turn.clip)
            turn.optimizer.step(turn.rate(step))
            turn.optimizer.zero()
            run.replica.settle()
            if turn.average is not None:
                turn.average.update()
    with clock.phase("communication"):
        memory = run.mesh.most(float(memory_in_use(run.mesh.device)))
    seconds = time.perf_counter() - started
    spent = run.flops * size / seconds / (run.ceiling * run.mesh.world) if run.flops and run.ceiling else None
    record = Record(
        step=step + 1,
        loss=made[0]["loss"],
        learning_rate=made[0]["learning_rate"],
        gradient_norm=made[0]["gradient_norm"],
        tokens=size,
        trained=count,
        tokens_per_second=size / seconds,
        seconds=seconds,
        memory_bytes=int(memory),
        batch=digest,
        mfu=spent,
        phases=clock.take(),
        skipped=skipped,
        turns=made[1:],
    )
    return record, told[2] > 0


def _gradient(run: Run, turn: Turn, number: int, batch: Any, count: int, step: int) -> tuple[float, float]:
    """The mean loss of a turn and the norm of its gradient, which is left on the weights."""
    run.alive(step + 1, "forward and backward")
    run.replica.factor = 1.0 if turn.scale is None else float(turn.scale.factor)
    own = run.replica.gradients(batch, count, number)
    for other in run.turns:
        if other is not turn:
            other.optimizer.zero()
    with run.replica.clock.phase("communication"):
        loss = float(run.mesh.sum(own)) / max(count, 1)
        gradients = turn.optimizer.gradients()
        norm = run.replica.norm(gradients)
    return loss, norm if turn.scale is None else turn.scale.unscale(gradients, norm)


def _judge(run: Run, turn: Turn, number: int, loss: float, norm: float) -> tuple[Action, str]:
    """What to do with a turn's gradient, and why, in words.

    A gradient that only the factor on the loss has made too large is no fault of the step: the guard is not asked.
    """
    if turn.scale is not None and math.isfinite(loss):
        factor = float(turn.scale.factor)
        turn.scale.update(not math.isfinite(norm))
        if not math.isfinite(norm):
            return "skip", f"its gradient overflows where the loss is multiplied by {factor:g}"
    if number == 0:
        return run.guard.judge(loss, norm)
    whole = math.isfinite(loss) and math.isfinite(norm)
    return ("go on", "") if whole else ("stop", f"loss {loss}, gradient norm {norm}")


def _seed(run: Run, step: int) -> int:
    """Chance in a step depends on the seed, the step and the rows alone; processes that share rows draw alike."""
    return (run.seed * 1_000_003 + step) * run.mesh.plan.readers + run.mesh.reader


def _validate(run: Run, step: int, noted: Progress) -> tuple[float, dict[str, float]]:
    """The loss on what is not learned, and the figures besides it."""
    assert run.validation is not None
    run.alive(step, "validation")
    average = run.turns[0].average
    for model in run.replica.models:
        model.eval()
    with torch.no_grad(), average.swapped() if average is not None else nullcontext():
        loss, quality = run.validation.measure(), run.validation.quality()
    for model in run.replica.models:
        model.train()
    if step % run.validation.every == 0:  # what only ends a run leaves no trace in one that goes on
        noted.observe(loss)
        run.validation.observe(loss)
    if run.mesh.rank == 0:
        shown = "".join(f", {name} {value:.4f}" for name, value in quality.items())
        say(f"{run.label}: step {step}, validation loss {loss:.4f}{shown}")
    return loss, quality
