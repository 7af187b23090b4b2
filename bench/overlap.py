"""Computing two halves of a micro-batch by turns, so that what tensor processes sum up travels meanwhile: is it faster?

    python bench/overlap.py [--steps 12] [--width 512] [--save]

Two processes, a core each, the plan tensor=2 over gloo, with and without `overlap`, each with `sequence` and without:
a decoder of 4 layers, 8 rows of 256 tokens, forward and backward in fp32, random weights. The sides of a pair take
turns of one step; "ms" is the median of a step, "ratio" the median over pairs of the plain step's time by the other's
(more than 1: overlap is faster). "waiting" is the share of one more step's forward and backward passes in which
something was under way between the processes and nothing was computed, as torch's profiler sees it from the first
process.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from common import arguments, emit

from danlu.data.stream import Batch
from danlu.model.config import ModelConfig
from danlu.model.initialize import starts
from danlu.model.stored import without_memory
from danlu.plan.plan import Plan
from danlu.train.mesh import make_mesh
from danlu.train.objective import next_token
from danlu.train.replica import Replica
from danlu.train.weights import start_weights

ROWS, LENGTH, LAYERS, WORDS = 8, 256, 4, 8192
PLANS = {"sequence": "tensor=2", "whole rows": "tensor=2,sequence=false"}


def replica_of(plan: str, width: int) -> Replica:
    """A model whose matrices two processes share."""
    heads = width // 64
    config = ModelConfig(
        vocab_size=WORDS,
        width=width,
        layers=LAYERS,
        heads=heads,
        kv_heads=heads,
        head_width=64,
        feedforward_width=4 * width,
        context=LENGTH,
    )
    model = without_memory(config)
    makers = starts(model, "normal", 0)
    replica = Replica(
        model, [next_token], make_mesh(Plan.read(Plan.parse(plan))), rows=ROWS, length=LENGTH, batch=Batch
    )
    start_weights(replica, makers)
    return replica


def seconds(replica: Replica, batch: Batch) -> float:
    """Of a step, from when both processes are there."""
    dist.barrier()
    started = time.perf_counter()
    replica.gradients(batch, batch.count)
    taken = time.perf_counter() - started
    for weight in replica.parameters().values():
        weight.grad = None
    return taken


def waiting(replica: Replica, batch: Batch) -> float:
    """The share of a step's passes in which the first process waits; 0 on the other."""
    if replica.lookout is not None:
        replica.lookout.spent = 0.0  # now
    replica.clock.take()
    seconds(replica, batch)
    phases = replica.clock.take()
    waits = sum(phases.get(f"waiting in {name}", 0.0) for name in ("forward", "backward"))
    return waits / (phases["forward"] + phases["backward"])


def pair(plan: str, width: int, steps: int) -> dict[str, Any]:
    """Both sides of a plan, by turns."""
    sides = {"plain": replica_of(plan, width), "overlap": replica_of(f"{plan},overlap=true", width)}
    tokens = torch.randint(0, WORDS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    segments = torch.ones(ROWS, LENGTH, dtype=torch.int32)
    batch = Batch(tokens, tokens.roll(-1, 1), segments, torch.arange(LENGTH).expand(ROWS, -1))
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(steps + 2):
        for name, replica in sides.items():
            taken = seconds(replica, batch)
            if turn >= 2:
                times[name].append(taken)
    ratios = [plain / other for plain, other in zip(times["plain"], times["overlap"], strict=True)]
    return {
        "ms": {name: round(1e3 * statistics.median(some), 1) for name, some in times.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "waiting": {name: round(waiting(replica, batch), 3) for name, replica in sides.items()},
    }


def work(rank: int, home: str, width: int, steps: int, save: bool) -> None:
    """What each of the two processes does; the first tells the figures."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{home}/store", rank=rank, world_size=2)
    found = {name: pair(plan, width, steps) for name, plan in PLANS.items()}
    if rank == 0:
        for name, figures in found.items():
            print(f"{name}: {figures}")
        emit("overlap", {"width": width, "rows": ROWS, "length": LENGTH, "layers": LAYERS, **found}, save)
    dist.destroy_process_group()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=12, help="of each side that count")
    parser.add_argument("--width", type=int, default=512, help="of the model, a multiple of 128")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        multiprocessing.spawn(work, (str(Path(home)), chosen.width, chosen.steps, chosen.save), nprocs=2)


if __name__ == "__main__":
    main()
