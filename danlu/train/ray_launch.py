"""The same worker on a Ray cluster: Ray places and connects the processes, and the rest is as everywhere."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from danlu.artifact import only_writer, write_aside
from danlu.console import say
from danlu.errors import DanluError, need_extra
from danlu.train.failures import (
    RANKS,
    Failure,
    Patience,
    cause,
    described,
    failure_file,
    read_failures,
    write_failure,
)
from danlu.train.hang import HangSettings, has_begun, sign_file, watched
from danlu.train.launch import EARLY, LaunchSettings
from danlu.train.mesh import backend_for
from danlu.train.rank import Job
from danlu.train.signals import Stopping

POLL_SECONDS = 0.5  # how often ranks look whether the run was asked to stop
AT_ONCE = "at once"  # in the file that asks them: nothing needs saving yet


def launch_on_ray(
    worker: str, arguments: dict[str, Any], settings: LaunchSettings, *, run_dir: Path, progress: Callable[[], int]
) -> Any:
    """Run a worker through Ray Train, as `danlu.train.launch.launch` does without it.

    The cluster is the one that RAY_ADDRESS names or this machine belongs to, else one of this machine alone. Each
    process gets a GPU where the cluster has enough of them, else a CPU. torch's process group stands when the worker
    is called. `run_dir` is a directory that all machines see; SIGTERM to this process stops the run as anywhere.

    Args: as of `launch`; `settings.rendezvous` and `settings.join_seconds` have no part in it.
    Returns: what the worker returned in rank 0; None as `launch` does.
    Raises DanluError as `launch` does, where Ray is not installed, and where the cluster is too small.
    """
    try:
        import ray
    except ImportError:
        raise need_extra("ray", "cluster") from None
    if settings.rendezvous is not None:
        raise DanluError("Ray brings the machines together", where="rendezvous", fix="leave it out")
    job = Job(worker, arguments, run_dir.resolve())
    with only_writer(run_dir, wait=False), Stopping() as stopping:
        if not ray.is_initialized():
            ray.init(logging_level=logging.ERROR)
        return _run(job, settings, Patience(progress, settings.max_restarts), stopping)


def _run(job: Job, settings: LaunchSettings, patience: Patience, stopping: Stopping) -> Any:
    """Start the processes, again and again until they are done or patience ends."""
    from ray.train import TrainingFailedError

    world = settings.nodes * (settings.nproc or 1)
    trainer = _trainer(job, settings, world)
    while True:
        _stop_file(job).unlink(missing_ok=True)
        for rank in range(world):
            for place in (sign_file, failure_file):
                place(job.run_dir, rank).unlink(missing_ok=True)
        with ThreadPoolExecutor(1) as pool:  # in the main thread, Ray would take the signals
            fitted = pool.submit(trainer.fit)
            early = _heed(stopping, fitted, job, world)
            error = fitted.exception()
        if error is None:
            return fitted.result().return_value
        if not isinstance(error, TrainingFailedError):
            raise error
        if early is not None:
            say(EARLY.format(early.name))
            return None
        failure = cause(read_failures(job.run_dir, range(world)) or _told_by_ray(error))
        if stopping.asked or not patience.bears(failure):
            raise failure.error()


def _trainer(job: Job, settings: LaunchSettings, world: int) -> Any:
    """Ray Train's trainer of this job. It does not restart by itself: it would count every failure alike."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    found = ray.cluster_resources()
    gpus, cpus = int(found.get("GPU", 0)), int(found.get("CPU", 0))
    if max(gpus, cpus) < world:
        what = f"{world} processes are asked for, and the cluster has {cpus} CPUs and {gpus} GPUs"
        raise DanluError(what, where="Ray", fix="lower --nproc or --nodes, or add machines to the cluster")
    say(f"train: {world} processes on Ray, a {'GPU' if gpus >= world else 'CPU'} each")
    scaling = ScalingConfig(
        num_workers=world, use_gpu=gpus >= world, placement_strategy="SPREAD" if settings.nodes > 1 else "PACK"
    )
    logs = job.run_dir / RANKS / "ray"
    logs.mkdir(parents=True, exist_ok=True)
    run = RunConfig(
        name="train",
        storage_path=str(logs),
        failure_config=FailureConfig(max_failures=0),
        logging_config=LoggingConfig(log_level="CRITICAL"),
    )
    told = {"worker": job.worker, "arguments": job.arguments, "run_dir": str(job.run_dir)}
    hang = settings.hang.plain()
    return TorchTrainer(
        run_on_ray,
        train_loop_config={"job": told, "hang": hang, "grace": settings.grace},
        torch_config=TorchConfig(backend=backend_for("cuda" if gpus >= world else "cpu")),
        scaling_config=scaling,
        run_config=run,
    )


def _heed(stopping: Stopping, fitted: Future[Any], job: Job, world: int) -> signal.Signals | None:
    """Wait for the end, and pass a stop on to the ranks, which may be on other machines, through a file.

    Returns the signal where it came before any rank had begun a step, so that all of them end at once.
    """
    import ray

    told, early = False, None
    try:
        while not fitted.done():
            time.sleep(POLL_SECONDS)
            if stopping.number is None or told:
                continue
            if has_begun(job.run_dir, range(world)):
                say(f"{stopping.number.name}: every process finishes its step, saves and ends")
                write_aside(_stop_file(job), stopping.number.name)
            else:
                early = stopping.number
                write_aside(_stop_file(job), AT_ONCE)
            told = True
        return early
    except KeyboardInterrupt:
        ray.shutdown()  # ends the ranks, and with them what is waited for
        raise


def _told_by_ray(error: Any) -> list[Failure]:
    """The failures of ranks that could write nothing down themselves, as Ray saw them."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    lost = sorted(getattr(error, "worker_failures", {})) or [0]
    return [Failure(rank, "Ray", 0.0, f"was lost: {lines[-1].strip()}", exit_code=1) for rank in lost]


# --- In a process of Ray's ------------------------------------------------------------------------------------------


def run_on_ray(config: dict[str, Any]) -> Any:
    """The body of a process that Ray has started: a thread of it, where Python takes no signals."""
    from ray.train import get_context

    told = config["job"]
    job = Job(told["worker"], told["arguments"], Path(told["run_dir"]))
    place = get_context()
    rank, world = place.get_world_rank(), place.get_world_size()
    stopping, over = Stopping(), threading.Event()
    listener = threading.Thread(target=_listen, args=(job, rank, config["grace"], stopping, over), daemon=True)
    listener.start()
    try:
        with watched(job.run_dir, rank, world, HangSettings(**config["hang"])):
            return job.run(rank, world, place.get_local_rank(), stopping)
    finally:
        over.set()


def _listen(job: Job, rank: int, grace: float, stopping: Stopping, over: threading.Event) -> None:
    """Ask for a stop when the file is there; when the grace is over too, end this process."""
    while not over.wait(POLL_SECONDS):
        if _stop_file(job).exists():
            if _stop_file(job).read_text() == AT_ONCE:
                os._exit(1)
            stopping.ask(signal.SIGTERM)
            if not over.wait(grace):
                late = DanluError(f"rank {rank} had not saved and ended {grace:.0f} s after it was asked to stop")
                write_failure(job.run_dir, described(late, rank))
                os._exit(1)


def _stop_file(job: Job) -> Path:
    return job.run_dir / RANKS / "stop"
