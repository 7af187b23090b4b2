"""What limits a chosen plan, what would change that and at which price, and what the whole run takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from danlu.plan.calibrate import Calibration
from danlu.plan.cluster import Accelerator, Cluster
from danlu.plan.memory import GIB
from danlu.plan.search import USABLE, Asked, Choice, Found, NoPlan, search

# Of the board's limit, on average over a run: assumed, not measured. Boards reach the limit in large matrix products
# and stay below it while they wait or communicate.
DRAWN = 0.8
WORTH = 0.02  # of a step's time or a device's memory that a change must save to be told
SHOWN = 3


@dataclass(frozen=True)
class Change:
    """Something else that could be done, what it buys and what it takes.

    Attributes:
        what: in words.
        plan, recompute, micro_rows, offload: what would then be run.
        seconds: of a step, more (or less) than the chosen plan's.
        gib: of the fullest process, more (or less).
        time, memory, price: the same two, and accelerator-hours for the same tokens, as shares of the chosen plan's.
    """

    what: str
    plan: str
    recompute: str
    micro_rows: int
    seconds: float
    gib: float
    time: float
    memory: float
    price: float
    offload: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class WholeRun:
    """What all steps of a run take, at the chosen plan's pace and without a failure.

    Attributes:
        tokens: that are learned from, in whole steps.
        steps: of the optimizer.
        hours: of wall clock.
        accelerator_hours: the same, times the accelerators.
        kilowatt_hours: of the accelerators alone, at `drawn` of their boards' limit of `watts`; None where what they
            draw is not known.
        drawn, watts: see there.
    """

    tokens: int
    steps: int
    hours: float
    accelerator_hours: float
    kilowatt_hours: float | None
    drawn: float
    watts: float | None


def whole_run(asked: Asked, seconds: float, tokens: int) -> WholeRun:
    """Args: seconds: of a step; tokens: of the run, rounded up to whole steps."""
    each = asked.rows * asked.length
    steps = math.ceil(tokens / each)
    hours = steps * seconds / 3600
    all_hours, watts = hours * asked.cluster.count, asked.cluster.share.watts or None
    energy = None if watts is None else all_hours * watts / 1000 * DRAWN
    return WholeRun(steps * each, steps, hours, all_hours, energy, DRAWN, watts)


def limit(choice: Choice, device: Accelerator) -> str:
    """What the chosen plan spends most on, in words."""
    share = choice.gib * GIB / device.memory / USABLE
    name, most = max(((name, part) for name, part in choice.times.items() if name != "total"), key=lambda each: each[1])
    return f"{name} takes {most / choice.times['total']:.0%} of a step; memory is {share:.0%} full"


def changes(
    asked: Asked, found: Found, clock: Calibration | None = None, scale: Calibration | None = None
) -> list[Change]:
    """The cheapest improvements, one of a kind: those that add the fewest accelerator-hours to the same work.

    The kinds are another plan on the same accelerators that takes less memory, numbers of fewer bits in matrix
    products, and more accelerators, which take less time. A kind that saves less than 2 % is left out.
    """
    best = found.best[0]
    kinds = (_smaller(found), _narrower(asked, clock, scale), _wider(asked, best, clock, scale))
    told = [_change(what, best, other, share) for what, other, share in filter(None, kinds)]
    worth = [each for each in told if each.time < -WORTH or each.memory < -WORTH]
    return sorted(worth, key=lambda each: each.price)[:SHOWN]


Other = tuple[str, Choice, float]  # in words, what would be run, and accelerators for each of those there are


def _change(what: str, best: Choice, other: Choice, accelerators: float) -> Change:
    time = other.seconds / best.seconds
    return Change(
        what, other.plan, other.recompute, other.micro_rows, other.seconds - best.seconds, other.gib - best.gib,
        time - 1, other.gib / best.gib - 1, time * accelerators - 1, other.offload,
    )  # fmt: skip


def _smaller(found: Found) -> Other | None:
    """The plan that frees the most memory for its time."""
    best = found.best[0]
    others = [each for each in found.pareto if each.gib < best.gib * (1 - WORTH)]
    if not others:
        return None
    bought = max(others, key=lambda each: (best.gib - each.gib) / max(each.seconds - best.seconds, 1e-9))
    same = bought.plan == best.plan and bought.micro_rows == best.micro_rows
    return (f"{bought.recompute} recompute" if same else "another plan"), bought, 1.0


def _narrower(asked: Asked, clock: Calibration | None, scale: Calibration | None) -> Other | None:
    """8-bit products, where the accelerator has them."""
    if asked.precision != "bf16" or "fp8" not in asked.cluster.accelerator.peak:
        return None
    return "fp8 products", search(replace(asked, precision="fp8"), clock, scale, count=1).best[0], 1.0


def _wider(asked: Asked, best: Choice, clock: Calibration | None, scale: Calibration | None) -> Other | None:
    """The accelerators more that save time at the lowest price."""
    device, count = asked.cluster.accelerator, asked.cluster.count
    tried: list[Other] = []
    for more in _additions(asked.cluster):
        try:
            wider = replace(asked, cluster=replace(asked.cluster, count=count + more))
            other = search(wider, clock, scale, count=1).best[0]
        except NoPlan:
            continue
        if other.seconds < best.seconds * (1 - WORTH):
            tried.append((f"+{more} {device.name}", other, 1 + more / count))
    return min(tried, key=lambda each: each[1].seconds * each[2], default=None)


def _additions(cluster: Cluster) -> Iterator[int]:
    """Nodes where there are whole nodes, else single ones; twice as many each time, up to as many again.

    A processor has the cores it has, and nothing was measured beyond a measured machine.
    """
    node, one_machine = cluster.accelerator.node, cluster.accelerator.processor or cluster.taught is not None
    more = node if cluster.count % node == 0 and not one_machine else 1
    most = 0 if cluster.accelerator.processor else node - cluster.count if one_machine else cluster.count
    while more <= min(most, cluster.count):
        yield more
        more *= 2
