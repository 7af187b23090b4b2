"""Training on this machine's processor, predicted from `danlu plan --probe` before it is measured.

    python bench/planner_machine.py [--machine FILE] [--rows FILE] [--only gpt llama] [--steps 12] [--save]

Four shapes x four settings: fp32, bf16, bf16 with whole blocks computed again, and two processes that share weights or
matrices out. Random weights, made text, AdamW, uncompiled, through the real `danlu train`; none of the shapes is one of
the probe's. A row's step time is the median of its steps after the first two, its memory the most that a process held
during them. The bars are mean absolute errors: 12 % of time, 8 % of memory.

--machine   a file of `danlu plan --probe`; where there is none of that name yet, the probe is run and writes it.
--rows      rows that were measured are kept here, and not measured again as long as the machine file is the same.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from common import arguments, emit

from danlu.artifact import write_json
from danlu.console import say, table
from danlu.device.plan_probe import Sample, plan_probe, run
from danlu.plan.cluster import Cluster
from danlu.plan.machine import Machine, read_machine
from danlu.plan.memory import GIB
from danlu.plan.plan import Plan
from danlu.plan.search import given

BARS = {"time": 0.12, "memory": 0.08}
SHAPES = {
    "gpt": Sample(128, 4, 4, 4, 512, 1024, 12, 64, plain=True),
    "llama": Sample(384, 12, 6, 6, 1024, 8192, 4, 256),
    "smollm2": Sample(576, 8, 9, 3, 1536, 49_152, 4, 256),  # SmolLM2-135M with 8 of its 30 layers
    "mixture": Sample(256, 4, 4, 4, 512, 4096, 4, 256, experts=8),
}
TWO = {
    "gpt": {"plan": "tensor=2"},
    "llama": {"plan": "tensor=2", "precision": "bf16"},
    "smollm2": {"plan": "shard=2", "precision": "bf16"},
    "mixture": {"plan": "shard=2"},
}
SETTINGS: dict[str, dict[str, str]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "recompute": {"precision": "bf16", "recompute": "full"},
}


def rows(names: list[str]) -> dict[str, Sample]:
    """What is trained, by name."""
    return {
        f"{shape}, {setting}": replace(SHAPES[shape], **changes)  # type: ignore[arg-type]
        for shape in names
        for setting, changes in (*SETTINGS.items(), ("two processes", TWO[shape]))
    }


def measure(sample: Sample, machine: Machine, file: Path, steps: int) -> dict[str, Any]:
    """One row: predicted, then measured."""
    cluster = Cluster.parse(f"{sample.world}x{file}")
    asked = replace(sample.asked(machine.figures), cluster=cluster)
    told = given(asked, Plan.read(Plan.parse(sample.plan)), sample.recompute)
    ran = run(sample, machine.figures, steps)
    return {
        "what": sample.what, "predicted_seconds": told.seconds, "seconds": ran.seconds, "predicted_gib": told.gib,
        "gib": ran.gib, "time": told.seconds / ran.seconds - 1, "memory": told.gib / ran.gib - 1,
        "inside": told.low <= ran.seconds <= told.high, "times": told.times, "parts": told.memory,
        "optimizer_seconds": ran.optimizer_seconds,
    }  # fmt: skip


def known(path: Path | None, machine: Machine) -> dict[str, Any]:
    """Rows measured before with the same machine file."""
    if path is None or not path.exists():
        return {}
    read = json.loads(path.read_text(encoding="utf-8"))
    return read["rows"] if read["machine"] == machine.when else {}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--machine", type=Path, default=Path(tempfile.gettempdir()) / "danlu-machine.json")
    parser.add_argument("--rows", type=Path, help="where measured rows are kept")
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=12)
    given_words = parser.parse_args()
    file: Path = given_words.machine
    if not file.exists():
        plan_probe().write(file)
    machine = read_machine(file)
    found = known(given_words.rows, machine)
    for name, sample in rows(given_words.only).items():
        if name not in found:
            found[name] = measure(sample, machine, file, given_words.steps)
            if given_words.rows is not None:
                write_json(given_words.rows, {"machine": machine.when, "rows": found})
        one = found[name]
        say(f"{name}: {one['seconds']:.3f} s ({one['time']:+.1%}), {one['gib']:.2f} GiB ({one['memory']:+.1%})")
    chosen = {name: found[name] for name in rows(given_words.only)}
    show(chosen)
    errors = {bar: mean(abs(row[bar]) for row in chosen.values()) for bar in BARS}
    for bar, error in errors.items():
        print(f"{bar}: mean error {error:.1%} (bar {BARS[bar]:.0%}): {'met' if error <= BARS[bar] else 'MISSED'}")
    figures = machine.figures
    emit(
        "planner_machine",
        {"errors": errors, "rows": chosen, "peak": figures.peak, "memory_rate": figures.memory_rate,
         "probe_seconds": machine.seconds, "memory_gib": figures.memory / GIB},
        given_words.save,
    )  # fmt: skip


def show(chosen: dict[str, Any]) -> None:
    """All rows."""
    shown = [
        (name, f"{row['predicted_seconds']:.3f}", f"{row['seconds']:.3f}", f"{row['time']:+.1%}",
         f"{row['predicted_gib']:.2f}", f"{row['gib']:.2f}", f"{row['memory']:+.1%}")
        for name, row in chosen.items()
    ]  # fmt: skip
    table("predicted and measured", ("row", "s told", "s", "off", "GiB told", "GiB", "off"), shown)


if __name__ == "__main__":
    main()
