"""Training throughput on CUDA GPUs, and the share of their matrix-product rate that it is, for models of four sizes.

    python bench/gpu.py [--shapes 0.1B 1B 3B 8B] [--nproc N] [--plan shard=N] [--window 2048] [--steps 10] [--save]

Each shape is trained by `danlu train` as anybody would: random weights, random tokens, bf16 with fp32 masters, AdamW,
compiled blocks; the run is ended when enough of its steps are measured, before it writes anything. With several
processes the weights are laid out over them (shard). Rows a GPU, recomputing and the format of the optimizer's moments
are tried from what is fastest to what takes least memory, until one fits.

A line of JSON for each shape: tokens a step and GPU; token/s a GPU (median of the measured steps); the operations of a
token, 6 N (N: weights that take part in products) and with attention's; MFU by both, against the GPU's data sheet where
it is known and against the matrix products that this GPU was measured to make; peak memory of a GPU. Then one line with
all of it. Without a GPU only `--shapes tiny` runs, which shows nothing but that it runs.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import arguments, commit, emit, processor

from danlu.artifact import write_json
from danlu.console import complain, say
from danlu.errors import DanluError
from danlu.model.costs import TRAINING, costs
from danlu.model.families.known import family_of
from danlu.model.transformer import make_model
from danlu.train.precision import gemm_rate
from danlu.train.trial import end, whole_lines

ARCHITECTURE = "LlamaForCausalLM"
WARM = 5  # steps before the measured ones: they compile, and fill the allocator's pools
TEXT = 2**20  # characters of the made text
POLL = 0.05  # seconds between two looks at a run
# TFLOP/s of dense bf16 products. H100 and H200 SXM: NVIDIA's data sheets give 1,979 with sparsity, which doubles it.
# A100: 312 in NVIDIA's data sheet of it. By what the driver calls them: an H100 for PCIe has another clock.
DATA_SHEETS = {"H200": 989.0, "H100 80GB HBM3": 989.0, "A100": 312.0}


def shape(width: int, layers: int, heads: int, kv_heads: int, inner: int, words: int, tied: bool) -> dict[str, Any]:
    """Keys of a Llama's config.json."""
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": words,
        "tie_word_embeddings": tied,
    }


SHAPES = {
    "tiny": shape(64, 2, 4, 2, 128, 512, True),
    "0.1B": shape(576, 30, 9, 3, 1536, 49152, True),  # SmolLM2-135M
    "1B": shape(2048, 16, 32, 8, 8192, 128256, True),  # Llama-3.2-1B
    "3B": shape(3072, 28, 24, 8, 8192, 128256, True),  # Llama-3.2-3B
    "8B": shape(4096, 32, 32, 8, 14336, 128256, False),  # Llama-3.1-8B
}


@dataclass(frozen=True)
class Attempt:
    """How a shape might fit.

    Attributes:
        rows: a GPU.
        recompute, state: see the recipe's `recompute` and `optimizer.state`.
    """

    rows: int
    recompute: str
    state: str

    def least_bytes(self, weights: int, nproc: int) -> float:
        """What weights, masters, moments and gradients take of one GPU."""
        moments = 8 if self.state == "fp32" else 2
        rounded = 2 if nproc == 1 else 0  # laid out, weights are rounded block by block
        return weights * (rounded + 4 + moments + 4) / nproc


ATTEMPTS = (
    *(Attempt(rows, "none", "fp32") for rows in (32, 16, 8, 4)),
    *(Attempt(rows, "full", "fp32") for rows in (16, 8, 4)),
    *(Attempt(rows, "none", "8bit") for rows in (8, 4)),
    *(Attempt(rows, "full", "8bit") for rows in (16, 8, 4, 1)),
)


@dataclass(frozen=True)
class Device:
    """What is computed on.

    Attributes:
        name: as the driver, or the system, calls it.
        memory: bytes.
        products: TFLOP/s that its matrix products were measured at; data_sheet: what they are sold as, or None.
    """

    name: str
    memory: int
    products: float
    data_sheet: float | None


def look_at_device() -> Device:
    """This process's, measured."""
    if not torch.cuda.is_available():
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device(processor(), memory, gemm_rate(torch.float32) / 1e3, None)
    found = torch.cuda.get_device_properties(0)
    known = next((rate for name, rate in DATA_SHEETS.items() if name in found.name), None)
    return Device(found.name, found.total_memory, gemm_rate(torch.bfloat16, 2.0, "cuda") / 1e3, known)


def device_apart() -> Device:
    """The same by a process of its own, so that none of its memory is taken when runs begin."""
    made = subprocess.run([sys.executable, __file__, "--device"], stdout=subprocess.PIPE, text=True, check=True)
    return Device(**json.loads(made.stdout.splitlines()[-1]))


def recipe(name: str, window: int, attempt: Attempt, nproc: int, home: Path) -> dict[str, Any]:
    """What `danlu train` is given: far more steps, and no checkpoint before them, than are measured."""
    on_gpu = torch.cuda.is_available()
    return {
        "name": name,
        "model": {"architecture": ARCHITECTURE, "shape": {**SHAPES[name], "max_position_embeddings": window}},
        "data": {"sources": str(home / "text.txt"), "vocabulary": "bytes", "heldout": 0},
        "batch": {"rows": attempt.rows * nproc, "window": window},
        "steps": 1_000_000,
        "optimizer": {"state": attempt.state},
        "precision": "bf16" if on_gpu else "fp32",
        "compile": "on" if on_gpu else "off",
        "recompute": attempt.recompute,
        "checkpoints": {"every": 1_000_000},
        "launch": {"nproc": nproc, "max_restarts": 0},
    }


def train(told: dict[str, Any], plan: str, steps: int, home: Path) -> list[dict[str, Any]] | None:
    """The lines of metrics.jsonl of so many steps after the first few; None where memory runs out.

    Raises DanluError where the run ends by itself for any other reason.
    """
    out, words = home / "run", [sys.executable, "-m", "danlu", "train", str(home / "recipe.yaml")]
    write_json(home / "recipe.yaml", told)
    with (home / "said").open("w+", encoding="utf-8") as said:
        process = subprocess.Popen(
            [*words, "--out", str(out), "--plan", plan], stdout=said, stderr=said, start_new_session=True
        )
        try:
            lines: list[dict[str, Any]] = []
            while len(lines) < WARM + steps and process.poll() is None:
                time.sleep(POLL)
                lines = whole_lines(out / "metrics.jsonl")
        finally:
            end(process)
        said.seek(0)
        text = said.read()
    if len(lines) >= WARM + steps:
        return lines[WARM : WARM + steps]
    if "out of memory" in text.lower():
        return None
    raise DanluError("the run ended before it was measured", where=told["name"], fix=text[-3000:])


def operations(told: dict[str, Any]) -> tuple[int, float, float]:
    """Weights; operations of training a token, 6 N and with attention's."""
    keys = {**told["model"]["shape"], "architectures": [ARCHITECTURE]}
    with torch.device("meta"):
        model = make_model(family_of(keys, Path(ARCHITECTURE)).config(keys, Path(ARCHITECTURE)))
    cost = costs(model)[-1]
    return sum(weight.numel() for weight in model.parameters()), TRAINING * cost.weights, cost.training


def first_that_fits(name: str, given: Any, device: Device, home: Path) -> dict[str, Any] | None:
    """The figures of the first attempt that fits; None where none does."""
    plan = given.plan or f"shard={given.nproc}"
    for attempt in ATTEMPTS if torch.cuda.is_available() else ATTEMPTS[-1:]:
        told = recipe(name, given.window, attempt, given.nproc, home)
        weights, by_weights, whole = operations(told)
        if attempt.least_bytes(weights, given.nproc) > device.memory:
            continue
        with tempfile.TemporaryDirectory(dir=home) as own:
            lines = train(told, plan, given.steps, Path(own))
        if lines is None:
            say(f"{name}: {attempt} does not fit")
            continue
        rate = median(line["tokens_per_second"] for line in lines) / given.nproc
        return {
            "shape": name,
            "parameters": weights,
            "gpus": given.nproc,
            "plan": plan,
            "tokens_per_step": lines[0]["tokens"] // given.nproc,
            "window": given.window,
            **asdict(attempt),
            "tokens_per_second": rate,
            "flops_per_token": {"6N": by_weights, "with attention": whole},
            "mfu": {"6N": mfu(rate * by_weights, device), "with attention": mfu(rate * whole, device)},
            "peak_memory_bytes": max(line["memory_bytes"] for line in lines),
            "device": device.name,
            "torch": torch.__version__,
            "commit": commit(),
        }
    say(f"{name}: nothing that was tried fits into {device.memory / 1e9:.0f} GB on each of {given.nproc}")
    return None


def mfu(flops: float, device: Device) -> dict[str, float | None]:
    """A rate of operations as a share of what the device makes."""
    sheet = device.data_sheet
    return {"measured": flops / 1e12 / device.products, "data sheet": sheet and flops / 1e12 / sheet}


def check(shapes: Sequence[str], nproc: int) -> None:
    """Refuse what this machine cannot do."""
    large = [name for name in shapes if name != "tiny"]
    if large and not torch.cuda.is_available():
        what = f"{', '.join(large)}: training models of these sizes is measured on a CUDA GPU, and there is none here"
        raise DanluError(what, fix="--shapes tiny runs anywhere")
    devices = torch.cuda.device_count()
    if devices and nproc > devices:
        raise DanluError(f"{nproc} processes need a GPU each, and there are {devices}", fix=f"--nproc {devices}")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name != "tiny"])
    parser.add_argument("--nproc", type=int, default=1, help="processes, one a GPU")
    parser.add_argument("--plan", help="how the work is split; default shard=NPROC")
    parser.add_argument("--window", type=int, default=2048, help="tokens a row")
    parser.add_argument("--steps", type=int, default=10, help="measured steps; the median counts")
    parser.add_argument("--device", action="store_true", help="measure the device alone")
    given = parser.parse_args()
    if given.device:
        print(json.dumps(asdict(look_at_device())))
        return
    try:
        check(given.shapes, given.nproc)
        device, found = device_apart(), dict[str, Any]()
        with tempfile.TemporaryDirectory(prefix="danlu-gpu-") as folder:
            home, chance = Path(folder), random.Random(0)
            (home / "text.txt").write_text("".join(map(chr, chance.choices(range(32, 127), k=TEXT))), encoding="utf-8")
            for name in given.shapes:
                one = first_that_fits(name, given, device, home)
                if one is not None:
                    found[name] = one
                    print(json.dumps(one), flush=True)
        emit("gpu", {"device": asdict(device), "shapes": found}, given.save)
    except DanluError as error:
        complain(str(error))
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
