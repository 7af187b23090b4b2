"""Starting the processes of a run: here, on several machines, or as one of those that another launcher has started."""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import forkserver, get_context, resource_tracker
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from danlu.artifact import only_writer
from danlu.console import say
from danlu.errors import DanluError
from danlu.settings import Settings
from danlu.train.failures import Patience, RankError
from danlu.train.hang import HangSettings, watched
from danlu.train.rank import Job, run_launched
from danlu.train.signals import STOP_SIGNALS, Stopping, even_if_deaf

GIVEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # by torchrun and its like to each process
MANY_RESTARTS = 1_000_000  # the elastic agent's own count, which never decides
EARLY = "{}: stopped before the first step; the same command goes on"
DEAF_SECONDS = 3.0  # that a process alone gets to end in order where it need not save


class LaunchSettings(Settings):
    """How many processes, where, and what becomes of them when something fails."""

    nproc: int | None = Field(
        None, gt=0, description="processes on each machine; default 1, or as another launcher has started them"
    )
    nodes: int = Field(1, gt=0, description="machines")
    rendezvous: str | None = Field(
        None, description="HOST:PORT where the machines meet; HOST is one of them, and the port is free there"
    )
    join_seconds: int = Field(600, gt=0, description="seconds that a machine waits for the others")
    max_restarts: int = Field(
        3, ge=0, description="failures in a row without a new checkpoint after which the run ends; others are restarted"
    )
    grace: float = Field(30.0, gt=0, description="seconds to finish the step and save after SIGTERM or Ctrl-C")
    hang: HangSettings = Field(HangSettings(), description="when a run counts as hung")

    @model_validator(mode="after")
    def _machines_meet_somewhere(self) -> LaunchSettings:
        host, _, port = (self.rendezvous or "").rpartition(":")
        if self.rendezvous is not None and not (host and port.isdigit()):
            raise ValueError(f"rendezvous {self.rendezvous!r} is no HOST:PORT, as in node0:29400")
        if self.rendezvous is not None and self.nodes == 1:
            raise ValueError("rendezvous has no effect on one machine; set nodes, or leave it out")
        return self

    @model_validator(mode="after")
    def _grace_is_for_several(self) -> LaunchSettings:
        one = self.nodes == 1 and self.nproc in (None, 1)
        if one and self.grace != type(self).model_fields["grace"].default:
            raise ValueError("grace has no effect on one process, which always ends its step and saves; leave it out")
        return self


def launch(
    worker: str, arguments: dict[str, Any], settings: LaunchSettings, *, run_dir: Path, progress: Callable[[], int]
) -> Any:
    """Run a worker in as many processes as asked, until it is done, however often one of them dies.

    One process on one machine is this process. Where torchrun or its like has set RANK and WORLD_SIZE, this is one of
    the processes that it started, and restarting is its business.

    Args:
        worker: "module:function", called in each process as function(rank, **arguments) with a `danlu.train.rank.Rank`.
            It goes on from the newest checkpoint by itself.
        arguments: JSON-able.
        run_dir: where the ranks leave signs of life and errors, below ranks/; locked against a second writer.
        progress: the newest step that a checkpoint holds, 0 at first; a failure after a newer one is not counted.

    Returns: what the worker returned in rank 0; on the other machines, in the lowest rank there. None where the run was
        asked to stop before it had begun a step.
    Raises DanluError: that of a rank, word for word; any other error of a rank, with the rank, its host and the end of
    its traceback; contradicting environment variables; a second writer; machines that do not meet; a hang
    (`danlu.train.hang.Hung`).
    """
    job = Job(worker, arguments, run_dir)
    place = place_given(os.environ, settings)
    if place is not None:
        check_master(os.environ, place, settings.join_seconds)
        with only_writer(run_dir, wait=False) if place.rank == 0 else nullcontext():
            return _run_here(job, place, settings)
    if settings.nodes > 1 and settings.rendezvous is None:
        fix = "name one of the machines with --rendezvous HOST:PORT, or start the command under torchrun"
        raise DanluError(f"{settings.nodes} machines have nowhere to meet", fix=fix)
    if settings.nodes > 1:
        return _run_group(job, settings, progress)
    with only_writer(run_dir, wait=False):
        if settings.nproc in (None, 1):
            return _run_here(job, Place(0, 1, 0), settings)
        return _run_group(job, settings, progress)


# --- One process ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Which of the processes this is: its number, how many there are, its number on this machine."""

    rank: int
    world: int
    local: int


def _run_here(job: Job, place: Place, settings: LaunchSettings) -> Any:
    stopping = Stopping()

    def end() -> None:
        say(EARLY.format("asked to stop"))
        os._exit(0)

    try:
        with watched(job.run_dir, place.rank, place.world, settings.hang), even_if_deaf(stopping, DEAF_SECONDS, end):
            return job.run(place.rank, place.world, place.local, stopping)
    except KeyboardInterrupt:
        if not stopping.at_once or stopping.number is None:
            raise
        say(EARLY.format(stopping.number.name))
        return None


def place_given(environment: Mapping[str, str], settings: LaunchSettings) -> Place | None:
    """The place that another launcher gave this process; None where there is no other launcher.

    MASTER_ADDR and MASTER_PORT alone say nothing: many clusters set them for everybody.

    Raises DanluError where variables are missing, are no numbers, or contradict each other, the settings or the number
    of this machine's devices.
    """
    found = [name for name in GIVEN if name in environment]
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(found):
        return None
    forget = f"unset {' '.join(found)}   (if they are left from another launcher)"
    missing = [name for name in GIVEN if name not in environment]
    if missing:
        what = f"{', '.join(found)} {'is' if len(found) == 1 else 'are'} set, but {', '.join(missing)} not"
        raise DanluError(what, where="environment", fix=forget)
    rank, world, local, _ = (_number(environment, name, forget) for name in GIVEN if name != "MASTER_ADDR")
    here = _number(environment, "LOCAL_WORLD_SIZE", forget) if "LOCAL_WORLD_SIZE" in environment else world
    for wrong in _contradictions(settings, rank, world, local, here):
        raise DanluError(wrong, where="environment", fix=forget)
    return Place(rank, world, local)


def _number(environment: Mapping[str, str], name: str, fix: str) -> int:
    if not environment[name].isdecimal():
        raise DanluError(f"{name}={environment[name]} is no number", where="environment", fix=fix)
    return int(environment[name])


def _contradictions(settings: LaunchSettings, rank: int, world: int, local: int, here: int) -> Iterator[str]:
    """What cannot be true at once, in words; `here` is the number of processes of this machine."""
    if rank >= world:
        yield f"RANK={rank} is not below WORLD_SIZE={world}"
    if local >= here:
        yield f"LOCAL_RANK={local} is not below LOCAL_WORLD_SIZE={here}"
    asked = (settings.nproc or 0) * settings.nodes
    if asked and asked != world:
        yield f"WORLD_SIZE={world}, but {settings.nodes} x {settings.nproc} = {asked} processes are asked for"
    devices = _devices()
    if devices and local >= devices:
        yield f"LOCAL_RANK={local}, but this machine has {devices} CUDA device{'s' if devices > 1 else ''}"


def _devices() -> int:
    """CUDA devices that this process sees."""
    import torch

    return torch.cuda.device_count()


def check_master(environment: Mapping[str, str], place: Place, seconds: float) -> None:
    """Make sure that there is somebody at MASTER_ADDR:MASTER_PORT, or that rank 0 may listen there.

    Raises DanluError where the name does not resolve, nobody answers within so many seconds, or, for the rank that is
    to answer, the address is not of this machine or is in use.
    """
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    where = f"MASTER_ADDR={host} MASTER_PORT={port}"
    served = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    forget = f"unset {' '.join(GIVEN)}   (if they are left from another launcher)"
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if place.rank == 0 and not served:
            with socket.socket(family, kind) as here:
                here.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                here.bind(address)
            return
        _wait_for(address, seconds)
    except OSError as error:
        raise DanluError(
            f"cannot be reached: {(error.strerror or str(error)).lower()}", where=where, fix=forget
        ) from None


def _wait_for(address: tuple[Any, ...], seconds: float) -> None:
    """Connect, trying again until the time is up: rank 0 may come later than others."""
    patience = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(address[:2], timeout=max(patience - time.monotonic(), 0.1)).close()
            return
        except OSError:
            if time.monotonic() >= patience:
                raise
            time.sleep(0.2)


# --- Several processes ----------------------------------------------------------------------------------------------


def _run_group(job: Job, settings: LaunchSettings, progress: Callable[[], int]) -> Any:
    """Start this machine's processes through torch's elastic agent."""
    nproc = settings.nproc or 1
    _share_cores(nproc)
    _start_fork_server(job)
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    from danlu.train.agent import Agent

    alone = settings.nodes == 1
    with Stopping() as stopping, _quiet(), tempfile.TemporaryDirectory(prefix="danlu-") as scratch:
        try:
            spec = WorkerSpec(
                role="train",
                local_world_size=nproc,
                entrypoint=run_launched,
                args=(job,),
                rdzv_handler=_meeting(job, settings),
                max_restarts=MANY_RESTARTS,
                local_addr="127.0.0.1" if alone else None,
            )
            agent = Agent(
                spec,
                DefaultLogsSpecs(log_dir=scratch),
                run_dir=job.run_dir,
                patience=Patience(progress, settings.max_restarts),
                stopping=stopping,
                grace=settings.grace,
                hang=settings.hang,
            )
            try:
                result = agent.run()
            finally:
                spec.rdzv_handler.shutdown()
        except RendezvousError as error:
            what = f"the {settings.nodes} machines did not meet, or one has ended the run: {error}"
            fix = "look at what the other machines say, whether they reach this address, and whether all clocks agree"
            raise RankError(what, settings.rendezvous, fix, exit_code=1) from None
    if agent.error is not None:
        raise agent.error
    if agent.early and stopping.number is not None:
        say(EARLY.format(stopping.number.name))
        return None
    return result.return_values[min(result.return_values)]


def _meeting(job: Job, settings: LaunchSettings) -> Any:
    """Where the machines find each other: a free port of the loopback device, or the place that is set.

    Every start gets a store of its own. The one that the agent would share between starts still holds the addresses of
    ranks that died, and those that come first try to reach them.
    """
    import torch.distributed.elastic.rendezvous.registry as registry
    from torch.distributed.elastic.rendezvous import RendezvousParameters

    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    alone = settings.nodes == 1
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=settings.rendezvous or "127.0.0.1:0",
        run_id=uuid.uuid4().hex if alone else str(job.run_dir),
        min_nodes=settings.nodes,
        max_nodes=settings.nodes,
        local_addr="127.0.0.1" if alone else None,
        join_timeout=settings.join_seconds,
    )
    return registry.get_rendezvous_handler(parameters)


def _share_cores(nproc: int) -> None:
    """Give each process its part of the cores, unless the user has: more threads than cores slow every one down."""
    if nproc > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = max((os.cpu_count() or 1) // nproc, 1)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        say(f"train: {nproc} processes, {threads} thread{'s' if threads > 1 else ''} each (OMP_NUM_THREADS)")


def _start_fork_server(job: Job) -> None:
    """Begin to import the worker's module and all it imports, once, in the process that the ranks are forked from.

    Nothing is computed there, so there are no threads and no devices that a fork would break. Stop signals are blocked
    in it and so in every rank until it listens: one that comes earlier is heard then.
    """
    get_context("forkserver").set_forkserver_preload([job.worker.partition(":")[0]])
    resource_tracker.ensure_running()  # it unblocks signals when it starts, so it starts before
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the elastic agent from telling what we tell ourselves, and from taking the signals that we heed."""
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    loggers = [logging.getLogger(name) for name in (*logging.root.manager.loggerDict,) if name.startswith("torch.")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
