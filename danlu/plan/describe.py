"""A search's result in words: the plan, where its time and memory go, what limits it, what else could be done."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from danlu.console import result, table
from danlu.errors import DanluError
from danlu.plan.cluster import Cluster
from danlu.plan.search import USABLE, Asked, Choice, Found, search
from danlu.plan.shapes import shape

GIB = 2.0**30


@dataclass(frozen=True)
class Change:
    """Something else that could be done, and what it buys.

    Attributes:
        what: in words.
        seconds, gib: of a step and of the fullest process, as shares of the chosen plan's, less 1.
    """

    what: str
    seconds: float
    gib: float


def read_tokens(text: str) -> int:
    """`4M`, `512k` or `65536`. Raises DanluError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmM]?)\s*", text)
    if found is None:
        raise DanluError(f"{text!r} is no number of tokens", where="--tokens-per-step", fix="write it as 4M or 65536")
    scale = {"": 1, "k": 1024, "m": 1024**2}[found.group(2).lower()]
    return round(float(found.group(1)) * scale)


def ask(model: str, gpus: str, length: int, tokens: str, precision: str) -> Asked:
    """A question from words. Raises DanluError where one cannot be read."""
    rows, rest = divmod(read_tokens(tokens), length)
    if rest or not rows:
        raise DanluError(f"{tokens} tokens are no whole number of rows of {length}", where="--tokens-per-step")
    return Asked(shape(model), Cluster.parse(gpus), length, rows, precision)


def limit(choice: Choice, asked: Asked) -> str:
    """What the chosen plan spends most on, in words."""
    share = choice.gib * GIB / asked.cluster.accelerator.memory / USABLE
    name, most = max(((name, part) for name, part in choice.times.items() if name != "total"), key=lambda each: each[1])
    time = f"{name} takes {most / choice.times['total']:.0%} of a step"
    return f"{time}; memory is {share:.0%} full"


def changes(found: Found) -> list[Change]:
    """What the plans beside the best would give and take, the cheapest savings of memory first."""
    best = found.best[0]
    others = [choice for choice in found.pareto if choice.gib < best.gib * 0.97]
    return [
        Change(f"{other.plan} with recompute={other.recompute}", other.seconds / best.seconds - 1,
               other.gib / best.gib - 1)
        for other in others[:3]
    ]  # fmt: skip


def find(model: str, gpus: str, length: int, tokens: str, precision: str) -> dict[str, Any]:
    """The answer as JSON-ready values."""
    asked = ask(model, gpus, length, tokens, precision)
    found = search(asked)
    best = found.best[0]
    rate = asked.rows * length / best.seconds
    return {
        "plan": asdict(best), "tokens_per_second": rate, "limit": limit(best, asked), "tried": found.tried,
        "fitting": found.fitting, "runners_up": [asdict(each) for each in found.best[1:]],
        "pareto": [asdict(each) for each in found.pareto], "changes": [asdict(each) for each in changes(found)],
        "kilowatts": asked.cluster.accelerator.watts * asked.cluster.count / 1000,
        "command": f"danlu train RECIPE --nproc {asked.cluster.count} --plan {best.plan}",
    }  # fmt: skip


def print_found(answer: dict[str, Any]) -> None:
    """The answer as tables."""
    best = answer["plan"]
    result(f"plan {best['plan']}, recompute {best['recompute']}, {best['micro_rows']} rows a micro-batch")
    result(
        f"a step takes {best['seconds']:.3g} s (90 % between {best['low']:.3g} and {best['high']:.3g}), "
        f"{answer['tokens_per_second']:,.0f} token/s; the fullest process holds {best['gib']:.1f} GiB"
    )
    result(f"limit: {answer['limit']}")
    for title, parts, unit in (("time", best["times"], "s"), ("memory", best["memory"], "GiB")):
        whole = parts["total"]
        rows = [(name, f"{part:.4g}", "#" * round(40 * part / whole)) for name, part in parts.items() if part > 0]
        table(title, ("part", unit, ""), rows)
    ups = [(each["plan"], each["recompute"], f"{each['seconds']:.3g}", f"{each['gib']:.1f}")
           for each in answer["runners_up"]]  # fmt: skip
    table("runners-up", ("plan", "recompute", "s", "GiB"), ups)
    for change in answer["changes"]:
        result(f"or {change['what']}: memory {change['gib']:+.0%}, time {change['seconds']:+.0%}")
    result(answer["command"])
