"""Which mix of formats is made next: the best under the limits, by costs that measured files have corrected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import median

import numpy as np

from danlu.compress.searching.allocate import excess, solve
from danlu.compress.searching.asked import Asked
from danlu.compress.searching.costs import BYTES, DIVERGENCE, SECONDS, Costs
from danlu.compress.searching.outcome import Outcome, Told, choose
from danlu.compress.searching.rise import Rise
from danlu.compress.searching.settings import Preference
from danlu.compress.searching.starts import Start, of_start
from danlu.device.stack import bytes_per_weight
from danlu.device.verdict import amount, worst_miss
from danlu.errors import DanluError

CLOCK_DOUBT = 1.15  # a speed further than this beyond what is told as possible is refused before the work
ROOM = 0.995  # of a limit that a choice may take: what is told is not exact
LEAST = 0.2  # of what is measured that rounding has brought in any case
FIGURES: dict[Preference, int] = {"best": DIVERGENCE, "smallest": BYTES, "fastest": SECONDS}


@dataclass(frozen=True)
class Mix:
    """A format for each matrix of a model.

    Attributes:
        start: the model. forms: of its matrices. cache: of keys and values.
        within: whether all limits are kept, as told.
        told: of the whole.
    """

    start: Start
    forms: dict[str, str]
    cache: str
    within: bool
    told: Told

    def is_of(self, outcome: Outcome) -> bool:
        """Whether this is what was made there."""
        return (self.start.name, self.forms, self.cache) == (outcome.start, outcome.forms, outcome.cache)

    def keeps(self, divergence: float) -> bool:
        """Whether it is told to keep all limits and this one, nat a token, which none is where the best is sought."""
        return self.within and self.told.divergence <= divergence


def best_mix(asked: Asked, starts: Sequence[Start], caches: Mapping[str, float], rise: Rise) -> Mix:
    """The best of all models, formats and caches.

    Args:
        starts: models to choose from.
        caches: the divergence that each format of keys and values brings.
        rise: of the loss with the divergence.
    """
    smallest = FIGURES[asked.prefer]
    found: list[tuple[bool, float, Mix]] = []
    for start, cache in product(starts, caches):
        costs, choices, own = start.costs, start.costs.choices(), start.own + caches[cache]
        limits = _limits(asked, costs, cache, own, rise)
        answer = solve(choices, limits, smallest)
        forms = choices.named(answer.chosen)
        told = costs.told(forms, cache, own)
        held = told.bytes + costs.cache_bytes(cache, asked.context)
        score = {DIVERGENCE: told.divergence, BYTES: held, SECONDS: told.seconds}[smallest]
        if not answer.within:
            score = excess(answer.totals, np.asarray(limits))
        found.append((not answer.within, score, Mix(start, forms, cache, answer.within, told)))
    return min(found, key=lambda each: each[:2])[2]


def _limits(asked: Asked, costs: Costs, cache: str, own: float, rise: Rise) -> tuple[float, float, float]:
    """Of divergence, bytes and seconds of matrices."""
    target, context = asked.target, asked.context
    sizes = [] if target.memory is None else [target.memory - costs.cache_bytes(cache, context)]
    sizes += [] if target.file_size is None else [target.file_size]
    room = min(sizes) - costs.fixed if sizes else np.inf
    seconds = np.inf if target.speed is None else ROOM / target.speed - costs.rest_seconds(cache)
    if target.quality_loss is None or asked.prefer == "best":
        return np.inf, room, seconds  # the least divergence is wanted in any case
    return max(rise.most_divergence(target.quality_loss) - own, 1e-9), room, seconds


def most_own(asked: Asked, outcomes: Sequence[Outcome]) -> float:
    """A smaller model whose own divergence, nat a token, is not below this cannot win.

    Where a loss is allowed that is what it comes to, and where quality is bettered what the best file has that meets
    the target, if that is less; else there is none.
    """
    loss = asked.target.quality_loss
    allowed = np.inf if loss is None else rise_of(asked, outcomes).most_divergence(loss)
    if asked.prefer != "best" or not able(asked, outcomes):
        return allowed
    best = best_of(asked, outcomes)
    return allowed if worst_miss(best.lines(asked.target)) else min(best.value("divergence"), allowed)


def with_doubt(asked: Asked) -> Asked:
    """The same with a speed that is less by what the clock may be off."""
    speed = asked.target.speed
    patient = asked.target.model_copy(update={"speed": None if speed is None else speed / CLOCK_DOUBT})
    return replace(asked, target=patient)


def rise_of(asked: Asked, outcomes: Sequence[Outcome]) -> Rise:
    """How the loss rises with the divergence, as far as these files tell."""
    return Rise.of(outcomes, asked.settings.chosen_tokens)


def able(asked: Asked, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those that may be chosen: what was made for another call may hold keys and values as this one does not want."""
    return [each for each in outcomes if asked.may_hold(each.cache)]


def best_of(asked: Asked, outcomes: Sequence[Outcome]) -> Outcome:
    """The best of those that may be chosen, of which there is one: see `choose`."""
    return choose(able(asked, outcomes), asked.target, asked.prefer)


def correct(starts: Mapping[str, Start], caches: Mapping[str, float], outcomes: Sequence[Outcome]) -> dict[str, Start]:
    """Costs as whole files have corrected them; where the device is another one, its clock is left as it is.

    Args: starts: by name, those of all outcomes among them. caches: see `best_mix`.
    """
    told = [starts[each.start].costs.by_format(each.forms) for each in outcomes]
    measured = [_by_rounding(each, starts[each.start], caches) for each in outcomes]
    timed = [each for each in outcomes if "decode_here" not in each.figures]
    rates = [1 / each.value("decode") / _seconds(starts[each.start].costs, each) for each in timed]
    pace = median(rates) if rates else 1.0
    return {name: replace(start, costs=start.costs.corrected(told, measured, pace)) for name, start in starts.items()}


def _by_rounding(outcome: Outcome, start: Start, caches: Mapping[str, float]) -> float:
    """The part of a file's divergence that rounding weights has brought."""
    measured = outcome.value("divergence")
    beside = start.own + caches[outcome.cache] + start.costs.by_inputs(outcome.forms)
    return max(measured - beside, LEAST * measured)


def _seconds(costs: Costs, outcome: Outcome) -> float:
    return float(costs.totals(outcome.forms)[SECONDS]) + costs.rest_seconds(outcome.cache)


def check_possible(asked: Asked, models: Mapping[str, Costs]) -> None:
    """Raise DanluError where no mix of any of these models can meet a limit of memory or speed, naming the nearest.

    Args: models: by name.
    """
    target, context = asked.target, asked.context
    cache = min(asked.caches, key=bytes_per_weight)
    files = {name: _least(costs, BYTES) + costs.fixed for name, costs in models.items()}
    held = {name: files[name] + costs.cache_bytes(cache, context) for name, costs in models.items()}
    rest = {name: min(map(costs.rest_seconds, asked.caches)) for name, costs in models.items()}
    speeds = {name: 1 / (_least(costs, SECONDS) + rest[name]) for name, costs in models.items()}
    smallest, fastest = min(held, key=held.__getitem__), max(speeds, key=speeds.__getitem__)
    least, most, speed = files[smallest], held[smallest], speeds[fastest]
    short = []
    if target.memory is not None and most > target.memory:
        parts = f"{amount(least, 'byte')} of file, the rest for {context:,} tokens of keys and values as {cache}"
        wanted = f"{amount(target.memory, 'byte')} is asked"
        short.append(f"memory: the smallest mix{of_start(smallest)} takes {amount(most, 'byte')}, {parts}; {wanted}")
    if target.file_size is not None and min(files.values()) > target.file_size:
        asked_for = amount(target.file_size, "byte")
        short.append(f"file: the smallest mix takes {amount(min(files.values()), 'byte')}; {asked_for} is asked")
    if target.speed is not None and speed * CLOCK_DOUBT < target.speed:
        wanted = f"{target.speed:,.0f} is asked"
        short.append(f"speed: the fastest mix{of_start(fastest)} is told to make {speed:,.0f} token/s; {wanted}")
    if short:
        raise DanluError(
            "no mix of these formats can meet the target:" + "".join(f"\n  {each}" for each in short),
            where=asked.checkpoint.path,
            fix="ask for less, a shorter --context or smaller --types, or prune first: danlu compress vocabulary",
        )


def _least(costs: Costs, figure: int) -> float:
    return sum(float(cost[figure].min()) for cost in costs.choices().costs)
