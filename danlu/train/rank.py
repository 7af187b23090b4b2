"""One process of a run: what it is given, and how its errors get out."""

from __future__ import annotations

import os
import signal
import sys
import threading
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from danlu.errors import is_disk_full
from danlu.train.failures import NO_ROOM, described, write_failure
from danlu.train.hang import Alive
from danlu.train.signals import Stopping


@dataclass(frozen=True)
class Rank:
    """This process among those of a run.

    Attributes:
        number: of this process among all, from 0.
        world: processes in all.
        local: of this process among those of its machine: which device is its own.
        alive: tells the watchdog where this process is.
        stopping: whether somebody asked for a stop.
    """

    number: int
    world: int
    local: int
    alive: Alive
    stopping: Stopping


@dataclass(frozen=True)
class Job:
    """What every process of a run does.

    Attributes:
        worker: "module:function"; called as function(rank, **arguments).
        arguments: JSON-able.
        run_dir: the run's directory, which all machines see.
    """

    worker: str
    arguments: dict[str, Any]
    run_dir: Path

    def function(self) -> Any:
        module, _, name = self.worker.partition(":")
        return getattr(import_module(module), name)

    def run(self, number: int, world: int, local: int, stopping: Stopping) -> Any:
        """Do this process's part; an error of it is also left in the run directory."""
        try:
            with stopping, Alive(self.run_dir, number) as alive:
                return self.function()(Rank(number, world, local, alive, stopping), **self.arguments)
        except Exception as error:
            write_failure(self.run_dir, described(error, number))
            raise


def run_launched(job: Job) -> Any:
    """The body of a process that `danlu.train.launch` has started.

    Signals from the terminal go to all processes at once; only the launcher heeds them, and asks for a stop by SIGTERM,
    which waits until somebody here listens. An error has been written down when this exits, so it prints nothing.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGHUP})
    threading.Thread(target=_die_with_the_launcher, name="launcher", daemon=True).start()
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    try:
        return job.run(rank, world, local, Stopping())
    except Exception as error:
        sys.stdout.flush()
        sys.stderr.flush()
        # Threads of collectives that a failed rank leaves behind would be waited for.
        os._exit(NO_ROOM if is_disk_full(error) else 1)


def _die_with_the_launcher() -> None:
    """Nobody would ever restart or stop this process, and the next run must find the directory free."""
    launcher = parent_process()
    if launcher is not None:
        launcher.join()
        os._exit(1)
