"""What went wrong in which rank: each rank writes its own error down, and the one that caused the others is found."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from danlu.artifact import write_json
from danlu.console import warn
from danlu.errors import DanluError, is_disk_full

RANKS = "ranks"  # the folder of the run directory with what the ranks say about themselves
TRACEBACK_LINES = 12  # of a traceback's end, which is what is shown of it
NO_ROOM = 74  # exit code of a rank that found no room even for its error (EX_IOERR)
FAULT = 70  # exit code of an error that nobody foresaw (EX_SOFTWARE of sysexits.h)

# What gloo, NCCL and the store say when another process went away; libraries in C++ tell it in words alone.
CONSEQUENCES = re.compile(
    r"gloo/|Connection (closed|reset|refused)|Broken pipe|Socket (closed|Timeout)|NCCL|ProcessGroup|TCPStore"
    r"|failed to recv|wait timeout",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Failure:
    """The end of one rank.

    Attributes:
        rank, host: which process, and where it ran.
        moment: of the error, in seconds of the host's monotonic clock, which compares on one host alone.
        what, where, fix: of a DanluError; of any other error, `what` is its type and message.
        exit_code: of the command if this failure ends it.
        foreseen: whether it is a DanluError: starting again would meet it again.
        consequence: whether it merely tells that another rank went away.
        trace: the end of the traceback, lines; empty where the rank was killed.
    """

    rank: int
    host: str
    moment: float
    what: str
    where: str | None = None
    fix: str | None = None
    exit_code: int = FAULT
    foreseen: bool = False
    consequence: bool = False
    trace: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """One line: who, and what."""
        return f"rank {self.rank} on {self.host}: {self.what}"

    def error(self) -> DanluError:
        """As the exception that ends the command; a user's mistake reads as it would have in one process."""
        if self.foreseen:
            return RankError(self.what, self.where, self.fix, self.exit_code)
        trace = "\n".join(f"  {line}" for line in self.trace)
        return RankError(f"{self.title}\n{trace}" if trace else self.title, None, self.fix, self.exit_code)


class RankError(DanluError):
    """The error of a rank, told by the process that started it."""

    def __init__(self, what: str, where: str | None, fix: str | None, exit_code: int) -> None:
        super().__init__(what, where=where, fix=fix)
        self.exit_code = exit_code


def described(error: BaseException, rank: int) -> Failure:
    """A rank's exception as a failure."""
    host, moment = socket.gethostname(), time.monotonic()
    if is_disk_full(error):
        return disk_full(rank, getattr(error, "filename", None))
    if isinstance(error, DanluError):
        where = None if error.where is None else str(error.where)
        return Failure(rank, host, moment, error.what, where, error.fix, error.exit_code, foreseen=True)
    lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
    text = str(error)
    what = f"{type(error).__name__}: {text}".rstrip(": ").splitlines()[0]
    lost = isinstance(error, ConnectionError) or CONSEQUENCES.search(text) is not None
    return Failure(rank, host, moment, what, consequence=lost, trace=tuple(lines[-TRACEBACK_LINES:]))


def disk_full(rank: int, where: object) -> Failure:
    """Starting again would fill it again."""
    fix = "free some space, then give the same command again: what was saved is kept"
    place = None if where is None else str(where)
    return Failure(rank, socket.gethostname(), time.monotonic(), "the disk is full", place, fix, 2, foreseen=True)


def ended_without_a_word(rank: int, exit_code: int) -> Failure:
    """A rank that is gone and wrote nothing: something outside of it ended it, or the interpreter crashed."""
    if exit_code == NO_ROOM:
        return disk_full(rank, None)
    if exit_code >= 0:
        return Failure(rank, socket.gethostname(), time.monotonic(), f"ended with exit code {exit_code}")
    name = signal.Signals(-exit_code).name
    memory = name == "SIGKILL"
    return Failure(
        rank,
        socket.gethostname(),
        time.monotonic(),
        f"was killed by {name}",
        fix="if nobody killed it, the kernel did for want of memory: dmesg tells" if memory else None,
        exit_code=1,
        consequence=name == "SIGABRT",  # how NCCL's watchdog ends a process whose peer went away
    )


def failure_file(run_dir: Path, rank: int) -> Path:
    return run_dir / RANKS / f"rank-{rank:05}.error.json"


def write_failure(run_dir: Path, failure: Failure) -> None:
    """Leave a rank's failure where the launcher finds it."""
    write_json(failure_file(run_dir, failure.rank), asdict(failure))


def read_failures(run_dir: Path, ranks: range) -> list[Failure]:
    """What these ranks have written down."""
    files = [file for rank in ranks if (file := failure_file(run_dir, rank)).exists()]
    told = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return [Failure(**failure | {"trace": tuple(failure["trace"])}) for failure in told]


def cause(failures: list[Failure]) -> Failure:
    """The failure that the others follow from: no mere consequence, on this host if there is one here, the earliest.

    A rank that was killed comes before one that raised: nothing another rank raises kills it, but its death may make
    others raise what no list of words knows as a consequence.
    """
    here = socket.gethostname()
    return min(
        failures, key=lambda one: (one.consequence, bool(one.trace) or one.foreseen, one.host != here, one.moment)
    )


@dataclass
class Patience:
    """How often a run may fail without getting anywhere.

    Attributes:
        progress: the newest step that a checkpoint holds.
        restarts: failures in a row that are borne while it stays the same.
    """

    progress: Callable[[], int]
    restarts: int

    def __post_init__(self) -> None:
        self._reached = self.progress()
        self._failures = 0

    def bears(self, failure: Failure) -> bool:
        """Whether to start again after a failure, which is said; one that was foreseen would come again."""
        reached = self.progress()
        if reached > self._reached:
            self._reached, self._failures = reached, 0
        self._failures += 1
        if failure.foreseen or self._failures > self.restarts:
            return False
        borne = f"restart {self._failures} of at most {self.restarts} without a new checkpoint"
        warn(f"{failure.title}; going on from the newest checkpoint ({borne})")
        return True
