"""What a user types to carry a plan out; or why Danlu itself cannot."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import NamedTuple

from danlu.plan.adapters import GLOBS, Lora
from danlu.plan.search import Asked, Choice


class Command(NamedTuple):
    """One of the two is None: a line for a shell, or the reason why there is none."""

    line: str | None
    why_not: str | None = None


def command(
    asked: Asked,
    best: Choice,
    recipe: str = "RECIPE",
    recompute: str = "none",
    offload: Mapping[str, str] | None = None,
) -> Command:
    """Args: recipe: the file. recompute, offload: what it says already, the latter by setting where it is not none."""
    if asked.lora is not None:
        return _tune(asked, best, asked.lora, recipe)
    told = dict.fromkeys(offload or {}, "none") | best.offload
    changed = {name: value for name, value in told.items() if value != (offload or {}).get(name, "none")}
    if best.recompute != recompute:
        changed = {"recompute": best.recompute} | changed
    words = "".join(f" --set {name}={value}" for name, value in changed.items())
    return Command(f"danlu train {recipe} {asked.cluster.launch} --plan {best.plan}{words}")


def _tune(asked: Asked, best: Choice, lora: Lora, recipe: str) -> Command:
    """Adapters are tuned by `danlu run`, whose recipe says which base and rows."""
    if asked.cluster.count > 1 or not asked.cluster.accelerator.processor:
        return Command(None, "danlu run tunes adapters in one process, on the processor")
    if lora.base_bits < 16:
        return Command(None, f"danlu run tunes adapters beside a base of 16 or 32 bits, not of {lora.base_bits}")
    if best.offload:
        return Command(None, "danlu run tunes adapters with everything in memory")
    settings = {
        "tune.method": "lora", "tune.rank": lora.rank, "tune.batch_rows": asked.rows,
        "tune.micro_rows": best.micro_rows, "tune.precision": asked.precision, "data.window": asked.length,
    }  # fmt: skip
    words = [f"{name}={value}" for name, value in settings.items()]
    if lora.target != "all":
        quoted = ", ".join(f'"{glob}"' for glob in GLOBS[lora.target])
        words.append(f"tune.targets=[{quoted}]")
    return Command(f"danlu run {recipe} " + " ".join(f"--set {shlex.quote(word)}" for word in words))
