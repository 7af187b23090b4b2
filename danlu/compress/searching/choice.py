"""Which mix of formats is made next: the best under the limits, by costs that measured files have corrected."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np

from danlu.compress.searching.allocate import Answer, excess, solve
from danlu.compress.searching.asked import Asked
from danlu.compress.searching.costs import BYTES, DIVERGENCE, SECONDS, Costs
from danlu.compress.searching.outcome import Outcome
from danlu.compress.searching.settings import Preference
from danlu.device.engine import CACHES
from danlu.device.verdict import amount
from danlu.errors import DanluError

CLOCK_DOUBT = 1.15  # a speed further than this beyond what is told as possible is refused before the work
ROOM = 0.995  # of a limit that a choice may take: what is told is not exact
LOSS = 2.5  # nat a token, of a model whose own is not measured yet


def best_mix(
    asked: Asked, costs: Costs, caches: dict[str, float], loss: float | None, rise: float
) -> tuple[dict[str, str], str, Answer]:
    """The format of each matrix, of keys and values, and what is told of the whole.

    Args:
        caches: the divergence that each format of keys and values brings.
        loss: the original's, nat a token; None where it is not known yet.
        rise: of the loss, nat for each nat of divergence.
    """
    figure_of: dict[Preference, int] = {"best": DIVERGENCE, "smallest": BYTES, "fastest": SECONDS}
    smallest, choices = figure_of[asked.prefer], costs.choices()
    found: list[tuple[bool, float, str, Answer]] = []
    for cache, own in caches.items():
        limits = _limits(asked, costs, cache, own, loss, rise)
        answer = solve(choices, limits, smallest)
        score = float(answer.totals[smallest]) + (own if smallest == DIVERGENCE else 0.0)
        if not answer.within:
            score = excess(answer.totals, np.asarray(limits))
        found.append((not answer.within, score, cache, answer))
    _, _, cache, answer = min(found, key=lambda each: each[:2])
    named = zip(choices.names, choices.options, answer.chosen, strict=True)
    return {name: options[number] for name, options, number in named}, cache, answer


def _limits(
    asked: Asked, costs: Costs, cache: str, own: float, loss: float | None, rise: float
) -> tuple[float, float, float]:
    """Of divergence, bytes and seconds of matrices."""
    target, context = asked.target, asked.context
    sizes = [] if target.memory is None else [target.memory - costs.cache_bytes(cache, context)]
    sizes += [] if target.file_size is None else [target.file_size]
    room = min(sizes) - costs.fixed if sizes else np.inf
    seconds = np.inf if target.speed is None else ROOM / target.speed - costs.rest_seconds(cache)
    if target.quality_loss is None or asked.prefer == "best":
        return np.inf, room, seconds  # the least divergence is wanted in any case
    known = LOSS if loss is None else loss
    return max(target.quality_loss * known / rise - own, 1e-9), room, seconds


def rise_by_divergence(outcomes: Sequence[Outcome]) -> float:
    """How many nat the loss rises for each nat of divergence; 1 where the text is the model's own."""
    rates = [
        each.value("heldout_loss_rise") * each.value("heldout_loss_original") / max(each.value("divergence"), 1e-9)
        for each in outcomes
    ]
    return float(np.clip(median(rates), 0.3, 3.0)) if rates else 1.0


def correct(costs: Costs, outcomes: Sequence[Outcome]) -> Costs:
    """Costs as whole files have corrected them; where the device is another one, its clock is left as it is."""
    told = [costs.by_format(each.forms) for each in outcomes]
    here = [1 / each.value("decode") for each in outcomes if "decode_here" not in each.figures]
    expected = [
        float(costs.totals(each.forms)[SECONDS]) + costs.rest_seconds(each.cache)
        for each in outcomes
        if "decode_here" not in each.figures
    ]
    pace = median([one / other for one, other in zip(here, expected, strict=True)]) if here else 1.0
    return costs.corrected(told, [each.value("divergence") for each in outcomes], pace)


def check_possible(asked: Asked, costs: Costs) -> None:
    """Raise DanluError where no mix can meet a limit of memory or speed, naming the nearest and what it misses."""
    target, choices = asked.target, costs.choices()
    context = asked.context
    least = sum(float(cost[BYTES].min()) for cost in choices.costs) + costs.fixed
    cache = min(asked.settings.caches, key=lambda cache: costs.cache_bytes(cache, context))
    held = least + costs.cache_bytes(cache, context)
    fastest = 1 / (sum(float(cost[SECONDS].min()) for cost in choices.costs) + costs.rest_seconds(CACHES[0]))
    short = []
    if target.memory is not None and held > target.memory:
        short.append(
            f"memory: the smallest mix takes {amount(held, 'byte')}, {amount(least, 'byte')} of file and the rest for "
            f"{context:,} tokens of keys and values as {cache}; {amount(target.memory, 'byte')} is asked"
        )
    if target.file_size is not None and least > target.file_size:
        asked_for = amount(target.file_size, "byte")
        short.append(f"file: the smallest mix takes {amount(least, 'byte')}; {asked_for} is asked")
    if target.speed is not None and fastest * CLOCK_DOUBT < target.speed:
        short.append(f"speed: the fastest mix is told to make {fastest:,.0f} token/s; {target.speed:,.0f} is asked")
    if short:
        raise DanluError(
            "no mix of these formats can meet the target:" + "".join(f"\n  {each}" for each in short),
            where=asked.checkpoint.path,
            fix="ask for less, a shorter --context or smaller --types, or prune first: danlu compress vocabulary",
        )
