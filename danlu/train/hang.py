"""Hangs: every rank says where it is, somebody who is not stuck looks, and the report shows where all of them are."""

from __future__ import annotations

import faulthandler
import fcntl
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

import psutil
from pydantic import Field

from danlu.artifact import write_aside
from danlu.console import complain
from danlu.errors import DanluError
from danlu.settings import Settings
from danlu.train.failures import RANKS, described, write_failure

SHOW_STACK = signal.SIGUSR2  # a rank answers it with the stacks of its threads, whatever it is doing
LINE = 512  # bytes of a sign of life: written in one piece, so that a reader never sees half of it
DONE = "done"
DUMP_SECONDS = 10.0  # what ranks get to write their stacks; a process that is not stopped takes milliseconds
REPORT = "hang.txt"
SHOWN = 4  # ranks named in the message; the report has them all


class HangSettings(Settings):
    """When a run counts as hung."""

    timeout: float = Field(600.0, gt=0, description="seconds without a sign of life after which a run is ended as hung")
    first_timeout: float = Field(
        1800.0, gt=0, description="the same until every process has done its first step: loading, compiling"
    )


class Hung(DanluError):
    """Nothing moves any more."""

    exit_code = 3


@dataclass(frozen=True)
class Sign:
    """What a rank last said of itself.

    Attributes:
        host, pid: where it runs.
        thread: the one that works; its stack is the one that tells.
        step: the step it is in, counted from 1; 0 before the first.
        phase: what it does there, as in "forward".
        steps: steps that it has finished since it started.
        notes: signs since it started: ranks that do the same count the same, so who counts less is behind.
    """

    rank: int
    host: str
    pid: int
    thread: int
    step: int = 0
    phase: str = "starting"
    steps: int = 0
    notes: int = 0


class Alive:
    """A rank's sign of life, kept in a small file; entered as a context, it also answers `SHOW_STACK`.

    A note takes about twenty microseconds and waits for no disk.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.sign = Sign(rank, socket.gethostname(), os.getpid(), threading.get_ident())
        self._place, self._stack_place = sign_file(run_dir, rank), stack_file(run_dir, rank)

    def note(self, step: int, phase: str) -> None:
        """This rank is in this phase, a short word, of this step now."""
        last = self.sign
        steps = last.steps + (step > last.step > 0)
        self.sign = replace(last, step=step, phase=phase, steps=steps, notes=last.notes + 1)
        self._write()

    def __enter__(self) -> Alive:
        self._place.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._stack = self._stack_place.open("w", encoding="utf-8")
        faulthandler.register(SHOW_STACK, file=self._stack, all_threads=True)
        self._write()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.note(self.sign.step, DONE)
        faulthandler.unregister(SHOW_STACK)
        self._stack.close()
        os.close(self._file)

    def _write(self) -> None:
        os.pwrite(self._file, json.dumps(asdict(self.sign)).ljust(LINE - 1).encode() + b"\n", 0)


def sign_file(run_dir: Path, rank: int) -> Path:
    return run_dir / RANKS / f"rank-{rank:05}.alive"


def stack_file(run_dir: Path, rank: int) -> Path:
    return run_dir / RANKS / f"rank-{rank:05}.stack"


def read_sign(run_dir: Path, rank: int) -> Sign | None:
    """What a rank last said; None where it has said nothing yet."""
    try:
        return Sign(**json.loads(sign_file(run_dir, rank).read_bytes()))
    except (FileNotFoundError, ValueError):
        return None


def has_begun(run_dir: Path, ranks: Iterable[int]) -> bool:
    """Whether one of these ranks is in a step by now, or has been; before, it has nothing that is worth saving."""
    signs = (read_sign(run_dir, rank) for rank in ranks)
    return any(sign is not None and sign.step > 0 for sign in signs)


class Watchdog:
    """Tells when nothing has moved for too long.

    Time is counted as it is looked at, on the monotonic clock and never more than two intervals a look: neither a
    clock that is set nor a machine or shell that suspends everybody makes a hang.

    Args:
        ranks: whose signs are watched closely.
        world: all ranks; where those that are watched are silent, one of the others that moves, as rank 0 does when it
            writes the model, is what they wait for. They are looked at only then: there may be thousands.
    """

    def __init__(self, run_dir: Path, ranks: Iterable[int], world: int, settings: HangSettings) -> None:
        self.run_dir, self.ranks, self.world, self.settings = run_dir, tuple(ranks), world, settings
        self.interval = min(1.0, settings.timeout / 10, settings.first_timeout / 10)
        self._looked = time.monotonic()
        self._silent = 0.0
        self._seen: list[Sign | None] = [None] * len(self.ranks)
        self._all_seen: list[Sign | None] | None = None  # when half of the time was over

    def silent(self) -> float | None:
        """Look, at most once an interval; returns the seconds of silence if they are too many."""
        now = time.monotonic()
        if now - self._looked < self.interval:
            return None
        seen = self._signs(self.ranks)
        self._silent = self._silent + min(now - self._looked, 2 * self.interval) if seen == self._seen else 0.0
        self._looked, self._seen = now, seen
        if all(sign is not None and sign.phase == DONE for sign in seen):
            return None
        started = all(sign is not None and sign.steps > 0 for sign in seen)
        return self._too_long(self.settings.timeout if started else self.settings.first_timeout)

    def _too_long(self, limit: float) -> float | None:
        """The silence, if it has reached the limit and nobody else has moved in its second half."""
        if self._silent < limit / 2:
            self._all_seen = None
            return None
        self._all_seen = self._all_seen or self._signs(range(self.world))
        if self._silent < limit:
            return None
        if self._signs(range(self.world)) == self._all_seen:
            return self._silent
        self._silent, self._all_seen = limit / 2, None
        return None

    def _signs(self, ranks: Iterable[int]) -> list[Sign | None]:
        return [read_sign(self.run_dir, rank) for rank in ranks]


@contextmanager
def watched(run_dir: Path, rank: int, world: int, settings: HangSettings) -> Iterator[None]:
    """Let a thread of this process watch it where no launcher does; a hang ends the process with exit code 3."""
    over = threading.Event()
    dog = Watchdog(run_dir, [rank], world, settings)

    def watch() -> None:
        while not over.wait(dog.interval):
            silence = dog.silent()
            if silence is not None:
                hung = diagnose(run_dir, world, silence)
                write_failure(run_dir, described(hung, rank))
                complain(str(hung))
                os._exit(Hung.exit_code)

    watcher = threading.Thread(target=watch, name="watchdog", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def diagnose(run_dir: Path, world: int, silence: float) -> Hung:
    """Collect the stacks of all ranks, write them to `hang.txt`, and say who is behind.

    Several processes of one machine may ask at once: one collects, the others wait for it and tell the same.
    """
    with (run_dir / RANKS / "hang.json").open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        told = json.loads(file.read() or "{}")
        signs = [sign for rank in range(world) if (sign := read_sign(run_dir, rank)) is not None]
        where = [asdict(sign) for sign in signs]
        if told.get("signs") != where:
            told = {"signs": where, "what": _report(run_dir, world, signs, silence)}
            file.truncate(0)
            file.write(json.dumps(told))
    return Hung(told["what"], where=run_dir, fix=f"{run_dir / REPORT} has the stacks of all ranks")


def _report(run_dir: Path, world: int, signs: list[Sign], silence: float) -> str:
    """Write the report; returns its first line."""
    here = [sign for sign in signs if sign.host == socket.gethostname() and sign.phase != DONE]
    stopped = {sign.rank for sign in here if is_stopped(sign.pid)}
    _ask_for_stacks(run_dir, [sign for sign in here if sign.rank not in stopped])
    stacks = {sign.rank: _stack(run_dir, sign.rank) for sign in signs}
    started = {sign.rank for sign in signs}
    late = [f"rank {rank} has not started" for rank in range(world) if rank not in started]
    late += [_told(sign, stopped, stacks[sign.rank]) for sign in laggards(signs, stopped, stacks)]
    if not late:
        last = min(signs, key=lambda sign: sign.notes)
        late = [f"no rank is behind the others; all are in step {last.step}, {last.phase}"]
    more = [f"and {len(late) - SHOWN} more"] if len(late) > SHOWN else []
    what = f"nothing has moved for {silence:.0f} s: {'; '.join(late[:SHOWN] + more)}"
    pages = [f"{_told(sign, stopped, '')}\n{stacks[sign.rank]}" for sign in signs]
    write_aside(run_dir / REPORT, "\n".join([what, "", *pages]))
    return what


def laggards(signs: list[Sign], stopped: set[int], stacks: dict[int, str]) -> list[Sign]:
    """The ranks that the others wait for; none where that cannot be told.

    Those that are stopped; else those that have noted less than others; else, where all have come equally far, those
    whose innermost frame lies outside torch.distributed while that of others lies inside.
    """
    halted = [sign for sign in signs if sign.rank in stopped]
    if halted:
        return halted
    fewest = min((sign.notes for sign in signs), default=0)
    late = [sign for sign in signs if sign.notes == fewest]
    if len(late) < len(signs):
        return late
    frames = {sign.rank: innermost(stacks[sign.rank], sign.thread) for sign in signs}
    busy = [sign for sign in signs if frames[sign.rank] and "torch/distributed" not in frames[sign.rank]]
    return busy if len(busy) < len(signs) else []


def innermost(stack: str, thread: int) -> str:
    """The innermost frame of a thread in what faulthandler wrote last: `File "...", line 3 in forward`."""
    frames = stack.rpartition(f"hread 0x{thread:016x}")[2].splitlines()[1:]
    return next((line.strip() for line in frames if line.lstrip().startswith("File ")), "")


def is_stopped(pid: int) -> bool:
    """Whether a process of this machine was halted, as SIGSTOP or a debugger does."""
    with suppress(psutil.Error):
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    return False


def _told(sign: Sign, stopped: set[int], stack: str) -> str:
    """Where a rank is, in words."""
    frame = innermost(stack, sign.thread)
    parts = [f"rank {sign.rank} on {sign.host} (process {sign.pid}) is in step {sign.step}, {sign.phase}"]
    parts += ["stopped by a signal"] if sign.rank in stopped else []
    parts += [f"at {frame.removeprefix('File ')}"] if frame else []
    return ", ".join(parts)


def _stack(run_dir: Path, rank: int) -> str:
    place = stack_file(run_dir, rank)
    return place.read_text(encoding="utf-8", errors="replace") if place.exists() else ""


def _ask_for_stacks(run_dir: Path, signs: list[Sign]) -> None:
    """Make ranks of this machine write down where they are, and wait for it.

    This process does so itself, while no other thread of it can go on: a signal's handler would read the frames of
    threads that run, and those may be gone as it does.
    """
    before = {sign.rank: len(_stack(run_dir, sign.rank)) for sign in signs}
    for sign in signs:
        if sign.pid == os.getpid():
            with stack_file(run_dir, sign.rank).open("a", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        else:
            with suppress(ProcessLookupError):
                os.kill(sign.pid, SHOW_STACK)
    patience = time.monotonic() + DUMP_SECONDS
    while time.monotonic() < patience and any(len(_stack(run_dir, rank)) == size for rank, size in before.items()):
        time.sleep(0.05)
    time.sleep(0.05)  # the one that came last may still be writing
