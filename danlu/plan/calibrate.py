"""Coefficients from measured runs: bounded least squares with priors, and what is known of layers measured before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from danlu.plan.coefficient import Coefficient
from danlu.plan.jobs import Column, Jobs

Predict = Callable[[Jobs, dict[str, float]], Column]
NOISE = 0.03  # of a measured run, in natural logarithms; errors beyond twice of it count by their size, not its square
SHRINK = 2.0  # runs that the belief "as the formula says" counts for, against those measured of the same layer
CLOSER = 0.3  # doubt of a coefficient on one kind of hardware, once runs on others have been seen, against before
FARTHEST = 0.7  # logarithm of the most that a layer measured before may differ from the formula
OUTSIDE = 0.1  # of measured runs, that the interval leaves out


@dataclass(frozen=True)
class Known:
    """How much longer (or larger) jobs with some columns alike were than the formula says.

    Attributes:
        columns: that are alike; jobs of which the first is 0 are like no others.
        factors: logarithms by those columns' values.
    """

    columns: tuple[str, ...]
    factors: dict[tuple[float, ...], float]

    def of(self, jobs: Jobs) -> Column:
        """Logarithms of the factor, 0 for jobs unlike all that were measured."""
        return np.array([self.factors.get(key, 0.0) for key in keys(jobs, self.columns)])


@dataclass(frozen=True)
class Calibration:
    """What measured runs taught.

    Attributes:
        coefficients: by name.
        known: from the coarser to the finer.
        common: those of them that hold for other hardware, too.
        spread: half the width of the interval that holds 9 of 10 measured runs, in natural logarithms.
        runs: that it was fitted to.
    """

    coefficients: dict[str, float]
    known: list[Known] = field(default_factory=list)
    spread: float = 0.5
    runs: int = 0
    common: list[Known] = field(default_factory=list)

    def predict(self, formula: Predict, jobs: Jobs) -> Column:
        """The formula with these coefficients, times what is known of like jobs."""
        told = np.broadcast_to(formula(jobs, self.coefficients), len(jobs))
        return told * np.exp(logarithm(self.known, jobs))


def logarithm(known: Sequence[Known], jobs: Jobs) -> Column:
    """Of all factors together."""
    return sum((each.of(jobs) for each in known), np.zeros(len(jobs)))


def keys(jobs: Jobs, columns: tuple[str, ...]) -> list[tuple[float, ...]]:
    """The values of some columns, row by row."""
    return list(zip(*(np.broadcast_to(getattr(jobs, name), len(jobs)).tolist() for name in columns), strict=True))


def believed(coefficients: dict[str, Coefficient], spread: float) -> Calibration:
    """Without a measurement."""
    return Calibration({name: each.start for name, each in coefficients.items()}, spread=spread)


def calibrate(
    formula: Predict,
    coefficients: dict[str, Coefficient],
    jobs: Jobs,
    measured: Column,
    levels: tuple[tuple[str, ...], ...] = (),
    common: tuple[tuple[str, ...], ...] = (),
    wider: Calibration | None = None,
) -> Calibration:
    """Fit the coefficients to measured runs, then learn what like jobs have in common, level by level.

    Args:
        formula: (jobs, coefficients) -> what is predicted, positive.
        measured: of each job, in the formula's unit.
        levels: columns by which jobs are held alike, the coarser first.
        common: the same, of what holds for other hardware, too: learned first, and taken out before the coefficients
            are fitted once more.
        wider: what runs on other hardware taught, these among them: believed here before anything is measured.
    """
    believed_here = coefficients if wider is None else _closer(coefficients, wider)
    known: list[Known] = []
    if wider is not None:
        known = list(wider.common)
    elif common:
        fitted = fit(formula, coefficients, jobs, measured)
        left = np.log(measured) - np.log(np.broadcast_to(formula(jobs, fitted), len(jobs)))
        for columns in common:
            known.append(_known(columns, jobs, left))
            left = left - known[-1].of(jobs)
    shared = list(known)
    fitted = fit(formula, believed_here, jobs, measured / np.exp(logarithm(shared, jobs)))
    left = np.log(measured) - np.log(np.broadcast_to(formula(jobs, fitted), len(jobs))) - logarithm(shared, jobs)
    for columns in levels:
        level = _known(columns, jobs, left)
        left = left - level.of(jobs)
        known.append(level)
    # Errors of runs that were fitted to are smaller than those of others: the more so, the fewer runs there were.
    spread = float(np.quantile(np.abs(left), 1 - OUTSIDE)) * (1 + 2 * len(coefficients) / len(measured))
    return Calibration(fitted, known, spread, len(measured), shared)


def _closer(coefficients: dict[str, Coefficient], wider: Calibration) -> dict[str, Coefficient]:
    """The same coefficients, believed to be as wider runs taught, and that less doubtful."""
    return {
        name: replace(each, start=wider.coefficients[name], doubt=each.doubt * CLOSER)
        for name, each in coefficients.items()
    }


def _known(columns: tuple[str, ...], jobs: Jobs, left: Column) -> Known:
    found: dict[tuple[float, ...], list[float]] = {}
    for key, value in zip(keys(jobs, columns), left.tolist(), strict=True):
        if key[0]:  # else it is not told, and unlike all others
            found.setdefault(key, []).append(value)
    shrunk = {key: np.median(values) * len(values) / (len(values) + SHRINK) for key, values in found.items()}
    return Known(columns, {key: float(np.clip(value, -FARTHEST, FARTHEST)) for key, value in shrunk.items()})


def fit(
    formula: Predict, coefficients: dict[str, Coefficient], jobs: Jobs, measured: Column, rounds: int = 25
) -> dict[str, float]:
    """The likeliest coefficients: Levenberg-Marquardt steps on logarithms, cut at the bounds.

    Errors are logarithms of ratios; their weight falls where they are large (pseudo-Huber), so that a few runs that
    something else slowed down do not bend the others.
    """
    names = list(coefficients)
    low, high, start = (
        np.log([getattr(coefficients[name], end) for name in names]) for end in ("low", "high", "start")
    )
    doubt = np.array([coefficients[name].doubt for name in names])
    truth = np.log(measured)

    def errors(point: Column) -> Column:
        told = formula(jobs, dict(zip(names, np.exp(point).tolist(), strict=True)))
        return np.log(np.broadcast_to(told, len(truth))) - truth

    def surprise(error: Column, point: Column) -> float:
        robust = 8 * (np.sqrt(1 + (error / (2 * NOISE)) ** 2) - 1)
        return float(robust.sum() + (((point - start) / doubt) ** 2).sum())

    point, damping = start, 1e-2
    error = errors(point)
    best = surprise(error, point)
    for _ in range(rounds):
        slopes = np.stack([(errors(point + step) - error) / 1e-4 for step in 1e-4 * np.eye(len(names))], axis=1)
        weight = 1 / np.sqrt(1 + (error / (2 * NOISE)) ** 2) / NOISE**2
        curvature = (slopes * weight[:, None]).T @ slopes + np.diag(1 / doubt**2)
        gradient = slopes.T @ (weight * error) + (point - start) / doubt**2
        improved, gain = False, 0.0
        for _ in range(8):
            moved = np.clip(point - _solve(curvature, gradient, damping), low, high)
            tried = errors(moved)
            now = surprise(tried, moved)
            if now < best:
                improved, gain = True, best - now
                point, error, best, damping = moved, tried, now, damping / 4
                break
            damping *= 4
        if not improved or gain < 1e-3 * best:
            break
    return dict(zip(names, np.exp(point).tolist(), strict=True))


def _solve(curvature: NDArray[np.float64], gradient: Column, damping: float) -> Column:
    damped = curvature + damping * np.diag(np.diag(curvature))
    return np.asarray(np.linalg.solve(damped, gradient))


def folds(groups: list[tuple[str, ...]], count: int = 5, seed: int = 0) -> NDArray[np.intp]:
    """A fold for each row, so that all rows of a group share one."""
    names = sorted(set(groups))
    places = np.random.default_rng(seed).permutation(len(names)) % count
    fold = dict(zip(names, places.tolist(), strict=True))
    return np.array([fold[group] for group in groups])
