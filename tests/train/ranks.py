"""Several processes of one test, talking over gloo."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = ["torch.distributed.pipelining", "danlu.train.worker", "pytest"]


@cache
def _context() -> ForkServerContext:
    """Processes forked from one that has imported what takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_ranks(count: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Call `function(*args)` in as many processes of one group; returns what each returned, in the order of ranks.

    The function must be importable, and what it takes and returns picklable. Fails with the traceback of the first rank
    that failed.
    """
    context = _context()
    with tempfile.TemporaryDirectory() as home:
        pipes, processes = [], []
        for rank in range(count):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(there, home, rank, count, function, args))
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        try:
            return [_answer(rank, pipe, timeout) for rank, pipe in enumerate(pipes)]
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _answer(rank: int, pipe: Any, timeout: float) -> Any:
    assert pipe.poll(timeout), f"rank {rank} has not answered within {timeout:.0f} s"
    try:
        good, found = pickle.loads(pipe.recv_bytes())  # the pipe's own way shares memory with a process that ends
    except EOFError:
        raise AssertionError(f"rank {rank} died") from None
    assert good, f"rank {rank}: {found}"
    return found


def _run(pipe: Any, home: str, rank: int, count: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        dist.init_process_group("gloo", init_method=f"file://{Path(home) / 'store'}", rank=rank, world_size=count)
        pipe.send_bytes(pickle.dumps((True, function(*args))))
        dist.destroy_process_group()
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    os._exit(0)  # threads of collectives that a failed rank has left would be waited for
