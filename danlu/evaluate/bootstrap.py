"""Intervals for figures measured on a sample of documents, by resampling the documents with replacement.

The bootstrap is Efron's (1979, doi:10.1214/aos/1176344552); the interval is the bias-corrected and accelerated one
(BCa; Efron 1987, doi:10.1080/01621459.1987.10478410), which follows skew where the plain percentile interval does not.
Documents, or groups of them, are drawn and not tokens: tokens of one document are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from danlu.artifact import figure
from danlu.errors import DanluError

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]  # column totals [samples, columns] -> one value each [samples]

NORMAL = NormalDist()
DRAWS_AT_ONCE = 4_000_000  # indices held in memory while resampling (32 MB)


class Interval(NamedTuple):
    """An estimate and its confidence limits; the limits are nan where the sample allows none (a single document)."""

    value: float
    low: float
    high: float

    def figure(self, unit: str, by: str | None = None) -> dict[str, Any]:
        """As a figure of a card, without limits where there are none."""
        if math.isfinite(self.low) and math.isfinite(self.high):
            return figure(self.value, unit, self.low, self.high, by)
        return figure(self.value, unit, by=by)


class Change(NamedTuple):
    """What changed between two measurements of the same documents.

    Attributes:
        absolute: after - before, in the figure's own unit.
        relative: after / before - 1 as a share; None where the mean before is zero.
    """

    absolute: Interval
    relative: Interval | None


def interval(
    sums: ArrayLike, counts: ArrayLike | None = None, seed: int = 0, samples: int = 1000, level: float = 0.95
) -> Interval:
    """The ratio sum(sums) / sum(counts) with its interval over documents: loss per token, share of right tokens.

    Args:
        sums: [documents] what each document adds to the numerator.
        counts: [documents] what each adds to the denominator, 0 allowed; None means 1 each, a plain mean of scores.
        seed: the same seed gives the same interval.
        samples: resamples drawn.
        level: the confidence level.

    Raises DanluError where there is nothing to average.
    """
    return _bca(_ratio(0), _columns(counts, sums), seed, samples, level)


def paired_change(
    before_sums: ArrayLike,
    after_sums: ArrayLike,
    counts: ArrayLike | None = None,
    seed: int = 0,
    samples: int = 1000,
    level: float = 0.95,
) -> Change:
    """The change of a ratio between two measurements of the same documents, resampled together.

    Pairing removes what the documents have in common (hard ones are hard before and after), so the interval of the
    change is far narrower than the two intervals suggest.

    Args:
        before_sums, after_sums: [documents] numerators of the two measurements, in the same order.
        counts: [documents] the shared denominator; None means 1 each.
        seed, samples, level: as in `interval`.
    """
    columns = _columns(counts, before_sums, after_sums)
    before, after = _ratio(0), _ratio(1)
    absolute = _bca(lambda totals: after(totals) - before(totals), columns, seed, samples, level)
    if columns[:, 0].sum() == 0:
        return Change(absolute, None)
    return Change(absolute, _bca(lambda totals: totals[:, 1] / totals[:, 0] - 1, columns, seed, samples, level))


def proportion(successes: int, trials: int, level: float = 0.95) -> Interval:
    """A share of yes-or-no outcomes with Wilson's score interval (1927, doi:10.1080/01621459.1927.10502953).

    Resampling cannot be used here: of 0 hits in 24 every resample has 0, and the interval [0, 0] would claim certainty.
    """
    if trials == 0:
        raise DanluError("there is nothing to average: no trial was made")
    z = NORMAL.inv_cdf((1 + level) / 2)
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    reach = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return Interval(share, max(0.0, min(share, centre - reach)), min(1.0, max(share, centre + reach)))


def _ratio(column: int) -> Statistic:
    return lambda totals: totals[:, column] / totals[:, -1]


def _columns(counts: ArrayLike | None, *sums: ArrayLike) -> Floats:
    """The numerators and, last, the denominator as float64 [documents, columns], empty documents left out."""
    numerators = [np.asarray(each, dtype=np.float64) for each in sums]
    denominator = np.ones_like(numerators[0]) if counts is None else np.asarray(counts, dtype=np.float64)
    if any(each.shape != denominator.shape or each.ndim != 1 for each in numerators):
        raise ValueError(f"one value a document is needed, not shapes {[each.shape for each in numerators]}")
    columns = np.stack([*numerators, denominator], axis=1)[denominator > 0]
    if not len(columns):
        raise DanluError("there is nothing to average: no document has anything to score")
    return columns


def _bca(statistic: Statistic, columns: Floats, seed: int, samples: int, level: float) -> Interval:
    """The statistic of the column totals with its BCa limits, the acceleration from the jackknife."""
    value = float(statistic(columns.sum(axis=0, keepdims=True))[0])
    if len(columns) < 2:
        return Interval(value, math.nan, math.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        replicates = statistic(_resampled_totals(columns, seed, samples))
        left_out = statistic(columns.sum(axis=0) - columns)
    if not (np.isfinite(replicates).all() and np.isfinite(left_out).all()):
        return Interval(value, math.nan, math.nan)

    below = (np.sum(replicates < value) + 0.5 * np.sum(replicates == value)) / samples
    bias = NORMAL.inv_cdf(_inside(below, samples))
    influence = left_out.mean() - left_out
    spread = np.sum(influence**2)
    acceleration = np.sum(influence**3) / (6 * spread**1.5) if spread > 0 else 0.0
    limits = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        shifted = bias + NORMAL.inv_cdf(tail)
        limits.append(_inside(NORMAL.cdf(bias + shifted / (1 - acceleration * shifted)), samples))
    low, high = np.quantile(replicates, limits)
    return Interval(value, float(low), float(high))


def _inside(probability: float, samples: int) -> float:
    """Kept off 0 and 1, where the normal quantile is infinite and `samples` draws cannot tell anyway."""
    return float(min(max(probability, 0.5 / samples), 1 - 0.5 / samples))


def _resampled_totals(columns: Floats, seed: int, samples: int) -> Floats:
    """Column totals of `samples` draws of as many documents as there are, with replacement: [samples, columns]."""
    documents = len(columns)
    rng = np.random.default_rng(seed)
    at_once = max(1, DRAWS_AT_ONCE // documents)
    totals = np.empty((samples, columns.shape[1]))
    for start in range(0, samples, at_once):
        drawn = rng.integers(documents, size=(min(at_once, samples - start), documents))
        for column in range(columns.shape[1]):
            totals[start : start + len(drawn), column] = columns[drawn, column].sum(axis=1)
    return totals
