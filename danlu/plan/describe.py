"""A search's result in words: the plan, where its time and memory go, what limits it, what else could be done."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from danlu.console import result, table
from danlu.errors import DanluError
from danlu.plan.adapters import Lora
from danlu.plan.cluster import Cluster
from danlu.plan.command import command
from danlu.plan.explain import changes, limit, whole_run
from danlu.plan.fit import Fit, largest_batch, largest_model, longest_context, smallest_cluster
from danlu.plan.offload import Offload, Places
from danlu.plan.plan import Plan, Work, check
from danlu.plan.search import Asked, Choice, given, room, search
from danlu.plan.shapes import shape, shape_for

STEP = {"": 1, "k": 1024, "m": 1024**2}  # of a step, as batches are counted
RUN = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}  # of a run, as corpora are counted


@dataclass(frozen=True)
class Written:
    """A plan that somebody has written down already, to be compared with what is found.

    Attributes:
        recipe: the file that holds it.
        plan: its degrees.
        recompute: none, selective or full.
        work: what it must be possible for.
        uncounted: what else is set that takes or saves time or memory, and no prediction knows of.
        resting: what it puts away from the device.
    """

    recipe: str
    plan: Plan
    recompute: str
    work: Work
    uncounted: tuple[str, ...] = ()
    resting: Places = field(default_factory=Places)


def read_tokens(text: str, where: str = "--tokens-per-step", scales: dict[str, int] = STEP) -> int:
    """`4M`, `512k` or `65536`; with the scales of a run also `100B` and `15T`. Raises DanluError."""
    found = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*([{''.join(scales)}]?)\s*", text, re.IGNORECASE)
    tokens = round(float(found.group(1)) * scales[found.group(2).lower()]) if found else 0
    if not tokens:
        raise DanluError(f"{text!r} is no number of tokens", where=where, fix="write it as 4M or 65536")
    return tokens


def rows_of(tokens: str, length: int) -> int:
    """Rows of a step. Raises DanluError where they are not whole."""
    rows, rest = divmod(read_tokens(tokens), length)
    if rest or not rows:
        raise DanluError(f"{tokens} tokens are no whole number of rows of {length}", where="--tokens-per-step")
    return rows


def ask(
    model: str, gpus: str, length: int, tokens: str, precision: str, lora: Lora | None = None, offload: Offload = "none"
) -> Asked:
    """A question from words. Raises DanluError where one cannot be read."""
    columns, cluster = shape_for(model, length), Cluster.parse(gpus)
    return Asked(columns, cluster, length, rows_of(tokens, length), precision, lora=lora, offload=offload)


def ask_fit(
    fit: Fit,
    model: str | None,
    gpus: str,
    length: int,
    tokens: str,
    precision: str,
    lora: Lora | None = None,
    offload: Offload = "none",
) -> tuple[str, Asked]:
    """What is possible, in words and as a question. Raises DanluError where nothing is, or the words do not fit."""
    if (fit == "model") != (model is None):
        what = "--fit model looks for the model" if fit == "model" else f"--fit {fit} needs to know the model"
        raise DanluError(what, where="--model", fix="leave it out" if model else "say --model llama-3.1-8b")
    cluster, rows = Cluster.parse(gpus), rows_of(tokens, length)
    if model is None:
        name, asked = largest_model(cluster, length, rows, precision, lora, offload)
        return f"the largest of the known models is {name}", asked
    asked = Asked(shape(model), cluster, length, rows, precision, lora=lora, offload=offload)
    if fit == "context":
        asked = longest_context(asked)
        return f"the longest rows have {asked.length:,} tokens, {asked.rows:,} of them a step", asked
    if fit == "batch":
        asked = largest_batch(asked)
        return f"the largest batch is {asked.micro_rows:,} x {length:,} tokens at once", asked
    if cluster.count > 1:
        fix = f"say --gpus {cluster.accelerator.name}"
        raise DanluError("--fit cluster looks for the number of accelerators", where="--gpus", fix=fix)
    asked = smallest_cluster(asked)
    return f"the smallest cluster has {asked.cluster.count:,} {cluster.accelerator.name}", asked


def find(
    asked: Asked,
    tokens: int | None = None,
    written: Written | None = None,
    order: Callable[[list[Choice]], list[Choice]] = list,
) -> dict[str, Any]:
    """The answer as JSON-ready values.

    Args:
        tokens: of the whole run, where its cost is asked for.
        written: a plan to compare with what is found.
        order: puts the best plans into another order, as measuring them does; the first is the answer.
    """
    found = search(asked)
    found = replace(found, best=order(found.best))
    best = found.best[0]
    typed = command(asked, best, *((written.recipe, written.recompute, written.resting.words) if written else ()))
    answer = {
        "plan": asdict(best), "tokens_per_second": asked.rows * asked.length / best.seconds,
        "limit": limit(best, asked.cluster.share), "tried": found.tried, "fitting": found.fitting,
        "room": room(asked),
        "runners_up": [asdict(each) for each in found.best[1:]], "pareto": [asdict(each) for each in found.pareto],
        "changes": [asdict(each) for each in changes(asked, found)],
        "command": typed.line, "no_command": typed.why_not,
    }  # fmt: skip
    if tokens is not None:
        answer["run"] = asdict(whole_run(asked, best.seconds, tokens))
    if written is not None:
        answer["written"] = _written(asked, written) | {"uncounted": list(written.uncounted)}
    return answer


def _written(asked: Asked, written: Written) -> dict[str, Any]:
    """What is expected of a plan as it is written, or why it cannot be carried out."""
    try:
        check(written.plan, written.work, asked.cluster.count)
    except DanluError as problem:
        return {"plan": written.plan.short(), "problem": problem.what}
    choice = given(asked, written.plan, written.recompute, resting=written.resting)
    return asdict(choice) | {"fits": choice.gib <= room(asked)}


def print_found(answer: dict[str, Any]) -> None:
    """The answer as tables."""
    best = answer["plan"]
    result(f"plan {best['plan']}, recompute {best['recompute']}, {best['micro_rows']} rows a micro-batch")
    result(
        f"a step takes {best['seconds']:.3g} s (90 % between {best['low']:.3g} and {best['high']:.3g}), "
        f"{answer['tokens_per_second']:,.0f} token/s; the fullest process holds {best['gib']:.1f} GiB"
    )
    if best["offload"]:
        where = {"host": "in its host's memory", "disks": "on its disks"}
        told = " and ".join(f"{gib:,.1f} GiB {where[place]}" for place, gib in best["away"].items())
        words = ", ".join(f"{name}={value}" for name, value in best["offload"].items())
        result(f"put away with {words}: each process has {told}")
    result(f"limit: {answer['limit']}")
    for title, parts, unit in (("time", best["times"], "s"), ("memory", best["memory"], "GiB")):
        whole = parts["total"]
        rows = [(name, f"{part:.4g}", "#" * round(40 * part / whole)) for name, part in parts.items() if part > 0]
        table(title, ("part", unit, ""), rows)
    ups = [(each["plan"], _besides(each), f"{each['seconds']:.3g}", f"{each['gib']:.1f}")
           for each in answer["runners_up"]]  # fmt: skip
    table("runners-up", ("plan", "recompute", "s", "GiB"), ups)
    for change in answer["changes"]:
        how = f"{change['plan']}, recompute {_besides(change)}, {change['micro_rows']} rows a micro-batch"
        result(
            f"or {change['what']}: {change['seconds']:+.3g} s a step ({change['time']:+.0%}), {change['gib']:+.1f} GiB "
            f"({change['memory']:+.0%}), {change['price']:+.0%} accelerator-hours; {how}"
        )
    if "run" in answer:
        _print_run(answer["run"])
    if "written" in answer:
        _print_written(answer["written"], best)
    result(answer["command"] or f"no command of Danlu's carries that out: {answer['no_command']}")


def _besides(choice: dict[str, Any]) -> str:
    """What is computed again, and what is put away."""
    return ", ".join([choice["recompute"], *(f"{name}={value}" for name, value in choice["offload"].items())])


def _print_run(run: dict[str, Any]) -> None:
    energy = "what they draw is not known"
    if run["watts"] is not None:
        drawn = f"(at {run['drawn']:.0%} of {run['watts']:g} W, which is assumed)"
        energy = f"{_amount(run['kilowatt_hours'])} kWh of the accelerators alone {drawn}"
    result(
        f"{run['tokens']:,} tokens are {run['steps']:,} steps: {_amount(run['hours'])} hours, "
        f"{_amount(run['accelerator_hours'])} accelerator-hours, {energy}"
    )


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _print_written(written: dict[str, Any], best: dict[str, Any]) -> None:
    if written["uncounted"]:
        result(f"no prediction knows of {', '.join(written['uncounted'])}")
    if "problem" in written:
        result(f"as written, {written['plan']} cannot be carried out: {written['problem']}")
        return
    slower = written["seconds"] / best["seconds"] - 1
    result(
        f"as written, {written['plan']} with recompute {written['recompute']}: {written['seconds']:.3g} s a step "
        f"({slower:+.0%}), {written['gib']:.1f} GiB" + ("" if written["fits"] else ", which does not fit")
    )
