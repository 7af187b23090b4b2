"""The allocation keeps its limits, is near the best that any choice could be, and knows how near."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.compress.searching.allocate import Choices, excess, solve
from danlu.compress.searching.costs import slopes


def drawn(seed: int, matrices: int = 6, options: int = 4) -> Choices:
    """Matrices whose better options are larger, as number formats are."""
    rng = np.random.default_rng(seed)
    costs = []
    for _ in range(matrices):
        size = np.sort(rng.uniform(1, 8, options))
        loss = rng.lognormal() * np.exp(-size) * rng.lognormal(0, 0.1, options)
        costs.append(np.stack([loss, size, rng.uniform(0.5, 1.5, options) * size]))
    names = tuple(map(str, range(matrices)))
    return Choices(names, (tuple(map(str, range(options))),) * matrices, tuple(costs))


def all_totals(choices: Choices) -> np.ndarray:
    picks = itertools.product(*(range(cost.shape[1]) for cost in choices.costs))
    return np.array([sum(cost[:, one] for cost, one in zip(choices.costs, pick, strict=True)) for pick in picks])


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), room=st.floats(0.3, 0.9), time=st.floats(0.4, 1.0))
def test_near_the_best_of_all_choices_and_within_limits(seed: int, room: float, time: float) -> None:
    choices = drawn(seed)
    totals = all_totals(choices)
    least, most = totals[:, 1].min(), totals[:, 1].max()
    limits = np.array([np.inf, least + room * (most - least), np.quantile(totals[:, 2], time)])
    possible = totals[(totals <= limits).all(axis=1)]
    answer = solve(choices, list(limits), 0)
    if not len(possible):
        assert not answer.within
        return
    assert answer.within and (answer.totals <= limits).all()
    best = possible[:, 0].min()
    assert best <= answer.totals[0] * (1 + 1e-12)
    assert answer.bound <= best * (1 + 1e-9), "what is proved is below all that is possible"
    assert answer.totals[0] <= 1.5 * best
    picked = sum(cost[:, one] for cost, one in zip(choices.costs, answer.chosen, strict=True))
    np.testing.assert_allclose(picked, answer.totals)


def test_the_smallest_file_that_keeps_a_loss() -> None:
    choices = drawn(3)
    totals = all_totals(choices)
    limits = [float(np.median(totals[:, 0])), np.inf, np.inf]
    answer = solve(choices, limits, 1)
    assert answer.within and answer.totals[0] <= limits[0]
    assert answer.totals[1] <= 1.1 * totals[totals[:, 0] <= limits[0], 1].min()


def test_an_impossible_limit_gives_the_nearest() -> None:
    choices = drawn(1)
    least = all_totals(choices)[:, 1].min()
    limits = [np.inf, 0.9 * least, np.inf]
    answer = solve(choices, limits, 0)
    assert not answer.within
    assert excess(answer.totals, np.array(limits)) < 0.12, "the smallest there is, or next to it"


def test_corrections_bring_sums_to_what_was_measured() -> None:
    told = [{"q4_0": 0.05, "q8_0": 0.001}, {"q4_0": 0.01, "q8_0": 0.002}]
    assert slopes([], []) == {}
    common = slopes(told[:1], [0.102])
    assert abs(sum(common[form] * value for form, value in told[0].items()) / 0.102 - 1) < 0.05
    both = slopes(told, [0.1, 0.02])
    for each, measured in zip(told, [0.1, 0.02], strict=True):
        assert abs(sum(both[form] * value for form, value in each.items()) / measured - 1) < 0.15
