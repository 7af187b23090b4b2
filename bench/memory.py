"""What training SmolLM2-135M takes, for every choice of what to keep, to compute again, and to put into files.

    python bench/memory.py [--recompute none full] [--offload none parameters] [--state fp32] [--steps 2] [--save]

Random weights, 4 x 512 tokens a step, bf16 with fp32 masters, AdamW; every choice in a process of its own, which begins
with one step that is not timed. "own" is the most memory that the process had for itself (anonymous, /proc's RssAnon,
sampled every 5 ms), above what it had when everything was imported: what the choice needs. "mapped" is the most that it
had of files at one time (RssFile): pages that the system takes back when it runs short. "CPU s" is the time that its
processors were busy in a step, which says more than the clock on a machine with other work. "written" and "read" are
what a timed step had the disk write and read, as /proc's io counts them: pages that the system still holds are not read
again, so with memory to spare the second is near 0. "moved" is the ceiling of both: all bytes that a step reads and
writes in files, which on a machine without memory to spare go over the disk at its rate.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import arguments, emit

from danlu.data.stream import Batch
from danlu.model.config import ModelConfig
from danlu.model.transformer import Decoder
from danlu.plan.plan import Plan
from danlu.train.mesh import Mesh
from danlu.train.objective import next_token
from danlu.train.offloading.files import in_file
from danlu.train.offloading.offload import Offload, OffloadSettings
from danlu.train.optimizer import clip, masters_of
from danlu.train.optimizing.settings import OptimizerSettings
from danlu.train.recompute import keep_probabilities
from danlu.train.replica import Replica

RECOMPUTE, OFFLOAD, STATE = ("none", "selective", "full"), ("none", "optimizer", "parameters"), ("fp32", "8bit")
ROWS, LENGTH, VOCABULARY = 4, 512, 49152
SHAPE = {"width": 576, "layers": 30, "heads": 9, "kv_heads": 3, "head_width": 64, "feedforward_width": 1536}


class Watch(threading.Thread):
    """The most memory held, looked at every 5 ms.

    Attributes:
        most: bytes of RssAnon and RssFile above those at the start.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = status()
        self.most = {"RssAnon": 0, "RssFile": 0}

    def run(self) -> None:
        while True:
            now = status()
            self.most = {name: max(most, now[name] - self.first[name]) for name, most in self.most.items()}
            time.sleep(0.005)


def status() -> dict[str, int]:
    """Bytes of memory that this process has for itself, and of files."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[0] in ("RssAnon:", "RssFile:")}


def disk() -> dict[str, int]:
    """Bytes that this process has had read from the disk and written to it."""
    lines = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {name: int(count) for name, count in lines if name in ("read_bytes", "write_bytes")}


def batch(step: int) -> Batch:
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))
    segments, positions = torch.ones(ROWS, LENGTH, dtype=torch.int32), torch.arange(LENGTH).expand(ROWS, -1)
    return Batch(tokens, tokens.roll(-1, 1), segments, positions)


def measure(recompute: Any, offload: Any, state: Any, steps: int, folder: Path) -> dict[str, Any]:
    """One choice, in this process."""
    torch.nn.Linear(64, 64)(torch.ones(1, 64)).sum().backward()  # starts autograd's threads
    watch = Watch()
    watch.start()
    away = Offload.start(OffloadSettings(state=offload), folder)
    with away.making_weights():
        torch.manual_seed(1)
        model = Decoder(ModelConfig(vocab_size=VOCABULARY, context=LENGTH, tied=True, **SHAPE))  # type: ignore[arg-type]
        with torch.no_grad():
            model.embedding.tokens.weight.mul_(0.02)
        if recompute == "none":
            keep_probabilities(model)
        replica = Replica(model, [next_token], Mesh(Plan()), rows=ROWS, length=LENGTH, recompute=recompute)
        masters, copies = masters_of(model, torch.bfloat16)
    optimizer = away.make_optimizer(masters, copies, OptimizerSettings(state=state))
    del masters
    away.follow(model)
    losses, seconds, busy, moved = [], [], [], []
    for step in range(steps + 1):
        started, worked, before = time.perf_counter(), time.process_time(), disk()
        losses.append(float(replica.gradients(batch(step), ROWS * LENGTH)) / (ROWS * LENGTH))
        gradients = optimizer.gradients()
        clip(gradients, replica.norm(gradients), 1.0)
        optimizer.step(1e-4)
        optimizer.zero()
        seconds.append(time.perf_counter() - started)
        busy.append(time.process_time() - worked)
        moved.append({name: count - before[name] for name, count in disk().items()})
    weights = sum(weight.numel() for weight in optimizer.masters.values())
    return {
        "own_bytes": watch.most["RssAnon"],
        "mapped_bytes": watch.most["RssFile"],
        "seconds": median(seconds[1:]),
        "processor_seconds": median(busy[1:]),
        "read_bytes": median(step["read_bytes"] for step in moved[1:]),
        "written_bytes": median(step["write_bytes"] for step in moved[1:]),
        "moved_bytes": traffic(replica, optimizer.state(), weights, recompute),
        "losses": losses,
    }


def traffic(replica: Replica, state: dict[str, Any], weights: int, recompute: str) -> int:
    """Bytes that a step reads and writes in files: state once each way, gradients written, read twice and scaled, and
    weights written and read, forward, backward, and once more where they compute again."""
    kept = sum(tensor.nbytes for tensor in state.values() if in_file(tensor))
    inside = sum(weight.nbytes for weight in replica.parameters().values() if in_file(weight))
    uses = 4 if recompute == "full" else 3
    return 2 * kept + (4 * 4 * weights if kept else 0) + uses * inside


def measure_apart(*choice: Any) -> dict[str, Any]:
    """The same in a process of its own."""
    words = [sys.executable, __file__, "--one", json.dumps(choice)]
    made = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(made.stdout.splitlines()[-1])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--recompute", nargs="+", choices=RECOMPUTE, default=RECOMPUTE)
    parser.add_argument("--offload", nargs="+", choices=OFFLOAD, default=OFFLOAD)
    parser.add_argument("--state", nargs="+", choices=STATE, default=STATE)
    parser.add_argument("--steps", type=int, default=2, help="timed steps; the median counts")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for the files, on a disk")
    parser.add_argument("--one", help="one choice in this process, as JSON")
    given = parser.parse_args()
    if given.one:
        recompute, offload, state, steps, folder = json.loads(given.one)
        print(json.dumps(measure(recompute, offload, state, steps, Path(folder))))
        return
    columns = ("own MB", "mapped MB", "s/step", "CPU s", "moved MB", "written MB", "read MB")
    print(f"{'recompute':10} {'offload':10} {'state':5} " + " ".join(f"{column:>10}" for column in columns))
    found: dict[str, Any] = {}
    for state, offload, recompute in product(given.state, given.offload, given.recompute):
        one = measure_apart(recompute, offload, state, given.steps, str(given.folder))
        found[f"{recompute}/{offload}/{state}"] = one
        sizes = {name.removesuffix("_bytes"): f"{size / 1e6:,.0f}" for name, size in one.items() if "_bytes" in name}
        times = [f"{one['seconds']:.1f}", f"{one['processor_seconds']:.1f}"]
        row = [sizes["own"], sizes["mapped"], *times, sizes["moved"], sizes["written"], sizes["read"]]
        print(f"{recompute:10} {offload:10} {state:5} " + " ".join(f"{value:>10}" for value in row), flush=True)
    for state in given.state:  # what is kept where must not change what is learned
        curves = {tuple(one["losses"]) for name, one in found.items() if name.endswith(f"/{state}")}
        print(f"{state}: {'the same losses, bit for bit' if len(curves) == 1 else f'{len(curves)} DIFFERENT CURVES'}")
    emit("memory", found, given.save)


if __name__ == "__main__":
    main()
