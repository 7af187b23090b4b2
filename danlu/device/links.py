"""How fast two processes of this machine hand each other tensors: gloo over loopback, or NCCL between two GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

SIZE = 2**25  # bytes that each sends the other at once
REPEATS = 6


def link_rate(device: str = "cpu") -> float:
    """Bytes/s one way while both send: the best of several, by two processes of their own."""
    with tempfile.TemporaryDirectory(prefix="danlu-links-") as folder:
        words = [sys.executable, "-m", "danlu.device.links", folder, device]
        two = [subprocess.Popen([*words, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
        said = [process.communicate()[0] for process in two]
    for process in two:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)
    return float(json.loads(said[0].splitlines()[-1]))


def swap(folder: Path, device: str, rank: int) -> float:
    """One of the two processes; returns bytes/s."""
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    place = torch.device("cuda", rank) if device == "cuda" else torch.device("cpu")
    sent, got = torch.ones(SIZE, dtype=torch.uint8, device=place), torch.empty(SIZE, dtype=torch.uint8, device=place)
    best = float("inf")
    for _ in range(REPEATS):
        dist.barrier()
        started = time.perf_counter()
        ways = [dist.P2POp(dist.isend, sent, 1 - rank), dist.P2POp(dist.irecv, got, 1 - rank)]
        for way in dist.batch_isend_irecv(ways):
            way.wait()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    dist.destroy_process_group()
    return SIZE / best


if __name__ == "__main__":
    print(json.dumps(swap(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
