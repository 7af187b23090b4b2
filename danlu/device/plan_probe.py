"""`danlu plan --probe`: what this machine's device can do, and short runs of the engine that teach the planner."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from danlu import __version__
from danlu.console import progress, result, table
from danlu.device.bandwidth import read_bandwidth
from danlu.device.cores import usable_cores
from danlu.device.links import link_rate
from danlu.device.probe import processor
from danlu.model.families.known import family_of
from danlu.plan.cluster import Cluster, measured
from danlu.plan.learned import calibrations
from danlu.plan.machine import Figures, Machine, Taught
from danlu.plan.memory import GIB
from danlu.plan.plan import Plan
from danlu.plan.search import Asked, planned
from danlu.plan.shapes import of_config
from danlu.plan.teach import Ran, teach, trials
from danlu.train.precision import gemm_rate
from danlu.train.trial import WARM, short_run, step_seconds

GEMM_SECONDS = 1.0  # of measuring one matrix product
COPIED = 2**30  # bytes of a copy that an accelerator's memory is measured by
LIMIT = Path("/sys/fs/cgroup/memory.max")
TEXT = 2**18  # characters of the made text
STEPS = WARM + 4  # of a run


@dataclass(frozen=True)
class Sample:
    """A small model, a batch and a plan that a run is made with.

    Attributes:
        width, layers, heads, kv_heads, inner, words: of the model.
        rows, window: of a step.
        experts: of every layer, two of them chosen; 0 for none.
        plain: a feed-forward without gate, layer norms and learned places (GPT-2), instead of a Llama.
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    words: int
    rows: int
    window: int
    precision: str = "fp32"
    recompute: str = "none"
    plan: str = "data=1"
    experts: int = 0
    plain: bool = False

    @property
    def what(self) -> str:
        """In words."""
        kind = "GPT-2" if self.plain else f"{self.experts} experts" if self.experts else "Llama"
        size = f"{self.layers} x {self.width}, {self.words:,} words, {self.rows} x {self.window} tokens"
        again = f", recompute {self.recompute}" if self.recompute != "none" else ""
        return f"{kind} {size}, {self.precision}, {self.plan}{again}"

    @property
    def world(self) -> int:
        """Processes."""
        return Plan.read(Plan.parse(self.plan)).world

    @property
    def model(self) -> dict[str, Any]:
        """As a recipe says it."""
        if self.plain:
            shape = {"n_embd": self.width, "n_layer": self.layers, "n_head": self.heads, "n_inner": self.inner,
                     "vocab_size": self.words, "n_positions": self.window}  # fmt: skip
            return {"architecture": "GPT2LMHeadModel", "shape": shape}
        shape = {
            "hidden_size": self.width, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "intermediate_size": self.inner, "vocab_size": self.words,
            "max_position_embeddings": self.window, "tie_word_embeddings": True,
        }  # fmt: skip
        if not self.experts:
            return {"architecture": "LlamaForCausalLM", "shape": shape}
        shape |= {"num_local_experts": self.experts, "num_experts_per_tok": 2}
        return {"architecture": "MixtralForCausalLM", "shape": shape}

    def recipe(self, text: Path) -> dict[str, Any]:
        """For `danlu train`."""
        return {
            "name": "probe", "model": self.model, "batch": {"rows": self.rows, "window": self.window},
            "data": {"sources": str(text), "vocabulary": {"kind": "bytes"}, "heldout": 0},
            "precision": self.precision, "compile": "off", "recompute": self.recompute, "steps": STEPS,
            "launch": {"nproc": self.world, "max_restarts": 0},
        }  # fmt: skip

    def asked(self, figures: Figures) -> Asked:
        """For the planner."""
        keys = {**self.model["shape"], "architectures": [self.model["architecture"]]}
        config = family_of(keys, Path("model")).config(keys, Path("model"))
        cluster = Cluster(measured(figures, "measured"), self.world)
        cluster = replace(cluster, taught=calibrations(cluster))
        return Asked(of_config(config), cluster, self.window, self.rows, self.precision)


# What differs from one to the next tells the coefficients apart: operators from products (narrow and wide models),
# attention (long rows), the head (many words), precisions, recomputing, and what processes tell each other.
PROCESSOR_SAMPLES = (
    Sample(96, 3, 3, 3, 256, 1000, 8, 96),
    Sample(192, 6, 6, 3, 512, 2000, 4, 160, "bf16"),
    Sample(160, 5, 5, 5, 640, 3000, 8, 128, plain=True),
    Sample(512, 4, 8, 4, 1408, 12_000, 2, 384),
    Sample(512, 4, 8, 4, 1408, 12_000, 2, 384, "bf16"),
    Sample(768, 3, 12, 4, 2048, 4000, 3, 320, recompute="full"),
    Sample(320, 8, 5, 5, 896, 8192, 4, 320, "bf16", "full"),
    Sample(256, 3, 4, 2, 704, 1000, 2, 1024),
    Sample(256, 3, 4, 2, 704, 1000, 2, 1024, "bf16"),
    Sample(448, 2, 7, 7, 1216, 32_000, 2, 320),
    Sample(640, 3, 10, 5, 1728, 40_000, 3, 256, "bf16"),
    Sample(192, 3, 6, 6, 384, 2000, 4, 256, experts=6),
    Sample(160, 6, 5, 5, 320, 4000, 4, 192, "bf16", experts=8),
    Sample(160, 4, 4, 4, 448, 2000, 6, 64, plan="tensor=2"),
    Sample(512, 4, 8, 4, 1408, 12_000, 4, 256, plan="shard=2"),
    Sample(320, 8, 5, 5, 896, 8192, 4, 256, "bf16", plan="shard=2"),
    Sample(448, 5, 8, 4, 1216, 16_000, 4, 256, plan="tensor=2"),
    Sample(256, 6, 4, 4, 704, 4000, 4, 192, "bf16", plan="tensor=2"),
)
ACCELERATOR_SAMPLES = (
    Sample(1024, 6, 16, 8, 2816, 8192, 8, 512, "bf16"),
    Sample(512, 12, 8, 8, 1408, 8192, 16, 512, "bf16"),
    Sample(2048, 4, 16, 8, 5632, 16_384, 4, 1024, "bf16"),
    Sample(2048, 8, 16, 8, 5632, 16_384, 8, 1024, "bf16", "full"),
    Sample(3072, 3, 24, 8, 8192, 65_536, 4, 1024, "bf16"),
    Sample(1024, 8, 16, 8, 2816, 32_768, 8, 2048, "bf16"),
    Sample(768, 6, 12, 12, 3072, 8192, 8, 512, "bf16", plain=True),
    Sample(1024, 4, 16, 16, 2816, 8192, 4, 512, "fp32"),
    Sample(1536, 6, 12, 4, 4096, 32_768, 4, 1024, "fp32"),
    Sample(768, 4, 12, 4, 1536, 8192, 8, 512, "bf16", experts=8),
    Sample(2048, 6, 16, 8, 5632, 16_384, 8, 1024, "bf16", plan="shard=2"),
    Sample(2048, 4, 16, 8, 5632, 16_384, 8, 1024, "bf16", plan="tensor=2"),
)


def plan_probe(samples: Sequence[Sample] | None = None) -> Machine:
    """Measure this machine for the planner. Takes minutes, and every core or the first GPUs.

    Args: samples: what is run; by default what tells all coefficients apart, of as many processes as fit.

    Raises DanluError where a run fails.
    """
    started = time.monotonic()
    figures = look()
    chosen = samples or (PROCESSOR_SAMPLES if figures.processor else ACCELERATOR_SAMPLES)
    kept = [each for each in chosen if each.world <= figures.node]
    runs = []
    with progress("probe", len(kept), "runs") as tick:
        for sample in kept:
            runs.append(run(sample, figures))
            tick.advance(1, sample.what)
    clock, scale = teach(runs)
    return Machine(
        figures=figures, time=Taught.of(clock), memory=Taught.of(scale), trials=trials(runs, clock, scale),
        by=f"danlu {__version__}, plan --probe", when=datetime.now(UTC).isoformat(timespec="seconds"),
        torch=torch.__version__, seconds=round(time.monotonic() - started, 1),
    )  # fmt: skip


def run(sample: Sample, figures: Figures, steps: int = STEPS) -> Ran:
    """A run of the engine over a few steps. Raises DanluError where it fails."""
    with tempfile.TemporaryDirectory(prefix="danlu-probe-") as folder:
        text = Path(folder) / "text.txt"
        text.write_text("".join(map(chr, random.Random(0).choices(range(32, 127), k=TEXT))), encoding="utf-8")
        lines = short_run(sample.recipe(text), steps, Path(folder), sample.plan)
    job = planned(sample.asked(figures), Plan.read(Plan.parse(sample.plan)), sample.recompute)
    updates = median(line["phases"]["optimizer"] for line in lines[WARM:])
    held = max(line["memory_bytes"] for line in lines)
    return Ran(sample.what, job, step_seconds(lines), updates, held / GIB)


def look() -> Figures:
    """What the device can do, measured: the first GPU, or else all cores."""
    if torch.cuda.is_available():
        return _look_at_gpu()
    cores = usable_cores()
    return Figures(
        name=processor(), processor=True, peak=_peak("cpu"), memory=float(machine_memory()),
        memory_rate=read_bandwidth(torch.get_num_threads()), units=torch.get_num_threads(),
        near=link_rate() if cores > 1 else None, node=max(cores, torch.get_num_threads()),
    )  # fmt: skip


def _look_at_gpu() -> Figures:
    found, count = torch.cuda.get_device_properties(0), torch.cuda.device_count()
    return Figures(
        name=found.name, processor=False, peak=_peak("cuda"), memory=float(found.total_memory),
        memory_rate=_copy_rate(), units=found.multi_processor_count, near=link_rate("cuda") if count > 1 else None,
        node=count,
    )  # fmt: skip


def _peak(device: str) -> dict[str, float]:
    kinds = {"bf16": torch.bfloat16, "fp32": torch.float32}
    return {name: gemm_rate(kind, GEMM_SECONDS, device) * 1e9 for name, kind in kinds.items()}


def _copy_rate() -> float:
    """Bytes/s that a GPU reads and writes while it copies, the best of several."""
    source = torch.ones(COPIED, dtype=torch.uint8, device="cuda")
    target, best = torch.empty_like(source), float("inf")
    for _ in range(6):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    del source, target
    torch.cuda.empty_cache()
    return 2 * COPIED / best


def machine_memory() -> int:
    """Bytes of memory that processes here may use: the machine's, or what a container is given of it."""
    total = int(psutil.virtual_memory().total)
    try:
        given = LIMIT.read_text(encoding="utf-8").strip()
    except OSError:
        return total
    return min(total, int(given)) if given.isdecimal() else total


def print_machine(machine: Machine) -> None:
    """What was measured, and how well the runs that taught are told by it."""
    figures = machine.figures
    rows = [
        ("device", figures.name),
        *((f"matrix products, {name}", f"{rate / 1e9:,.0f} GFLOP/s") for name, rate in figures.peak.items()),
        ("memory", f"{figures.memory / 1e9:,.1f} GB"),
        ("reading memory", f"{figures.memory_rate / 1e9:,.1f} GB/s"),
        ("between processes", f"{figures.near / 1e9:,.2f} GB/s" if figures.near else "one alone"),
    ]
    table("This machine", ("what", "measured"), rows)
    shown = [
        (each.what, f"{each.seconds:.3f}", f"{each.predicted_seconds / each.seconds - 1:+.1%}", f"{each.gib:.2f}",
         f"{each.predicted_gib / each.gib - 1:+.1%}")
        for each in machine.trials
    ]  # fmt: skip
    table("runs, and what the fitted coefficients make of them", ("run", "s a step", "off", "GiB", "off"), shown)
    result(f"measured in {machine.seconds:.0f} s")
