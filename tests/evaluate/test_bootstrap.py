"""The intervals hold what they promise: coverage, pairing, determinism, and honesty where the sample is too small."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.errors import DanluError
from danlu.evaluate import bootstrap
from danlu.evaluate.bootstrap import interval, paired_change, proportion


def documents(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Synthetic held-out documents: skewed lengths, a skewed mean loss each; the true ratio is exactly 2."""
    counts = rng.integers(5, 200, count)
    return counts * rng.gamma(4.0, 0.5, count), counts


def test_interval_covers_the_truth_about_as_often_as_promised():
    rng = np.random.default_rng(1)
    trials, hits = 400, 0
    for trial in range(trials):
        found = interval(*documents(rng, 60), seed=trial, samples=600)
        hits += found.low <= 2.0 <= found.high
    assert 0.915 <= hits / trials <= 0.98


def test_value_is_the_ratio_of_sums_and_not_the_mean_of_ratios():
    found = interval([10.0, 1.0], [10, 2])
    assert found.value == pytest.approx(11 / 12)


def test_plain_scores_agree_with_scipys_bca():
    stats = pytest.importorskip("scipy.stats")
    scores = np.random.default_rng(3).gamma(1.5, 1.0, 80)
    ours = interval(scores, samples=20_000)
    theirs = stats.bootstrap((scores,), np.mean, n_resamples=20_000, method="BCa", rng=5).confidence_interval
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.03 * width)


def test_pairing_finds_a_small_change_that_the_two_intervals_hide():
    rng = np.random.default_rng(4)
    before, counts = documents(rng, 80)
    after = before * 0.97 + counts * rng.normal(0, 0.01, 80)
    apart = interval(before, counts), interval(after, counts)
    assert apart[1].high > apart[0].low, "unpaired, the two overlap"
    change = paired_change(before, after, counts)
    assert change.absolute.high < 0
    assert change.absolute.value == pytest.approx(apart[1].value - apart[0].value)
    assert change.relative is not None
    assert change.relative.low < -0.03 < change.relative.high
    assert change.relative.high - change.relative.low < 0.01


def test_paired_change_covers_the_truth():
    rng = np.random.default_rng(5)
    trials, hits = 300, 0
    for trial in range(trials):
        before, counts = documents(rng, 50)
        after = before - counts * rng.gamma(2.0, 0.05, 50)  # the true change is -0.1
        found = paired_change(before, after, counts, seed=trial, samples=600).absolute
        hits += found.low <= -0.1 <= found.high
    assert 0.91 <= hits / trials <= 0.985


def test_same_seed_same_interval_other_seed_nearly_so():
    sums, counts = documents(np.random.default_rng(6), 40)
    assert interval(sums, counts, seed=7) == interval(sums, counts, seed=7)
    assert interval(sums, counts, seed=7) != interval(sums, counts, seed=8)


def test_drawing_in_parts_is_bounded_and_deterministic(monkeypatch):
    sums, counts = documents(np.random.default_rng(6), 40)
    monkeypatch.setattr(bootstrap, "DRAWS_AT_ONCE", 90)
    assert interval(sums, counts) == interval(sums, counts)


def test_documents_without_tokens_change_nothing():
    sums, counts = documents(np.random.default_rng(8), 30)
    assert interval([*sums, 0.0], [*counts, 0]) == interval(sums, counts)


def test_one_document_has_a_value_and_no_interval():
    found = interval([4.0], [2])
    assert found.value == 2.0
    assert math.isnan(found.low) and math.isnan(found.high)
    assert found.figure("nat/token") == {"value": 2.0, "unit": "nat/token"}


def test_nothing_to_average_is_said():
    with pytest.raises(DanluError, match="nothing to average"):
        interval([0.0, 0.0], [0, 0])
    with pytest.raises(DanluError, match="nothing to average"):
        proportion(0, 0)


def test_shapes_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="one value a document"):
        interval([1.0, 2.0], [1])


def test_a_mean_of_zero_before_has_no_relative_change():
    change = paired_change([0, 0, 0, 0], [1, 0, 0, 1])
    assert change.relative is None
    assert change.absolute.value == 0.5


def test_a_relative_change_that_some_resample_cannot_have_gets_no_limits():
    change = paired_change([1, 0, 0, 0], [1, 1, 0, 0])
    assert change.relative is not None
    assert change.relative.figure("share") == {"value": 1.0, "unit": "share"}


def test_figure_carries_the_limits():
    made = interval([1.0, 2.0, 4.0, 3.0]).figure("score", by="test")
    assert made["low"] < made["value"] < made["high"]
    assert made["by"] == "test"


def test_no_hit_at_all_is_not_certainty():
    found = proportion(0, 24)
    assert found.value == 0 and found.low == 0
    assert found.high == pytest.approx(0.138, abs=0.001)  # Wilson's upper limit for 0 of 24


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 1000)), min_size=2, max_size=30), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_limits_lie_within_what_documents_show(items, seed):
    sums, counts = np.array([s for s, _ in items]), np.array([c for _, c in items])
    if np.count_nonzero(counts) < 2:
        return
    found = interval(sums, counts, seed=seed, samples=100)
    ratios = sums[counts > 0] / counts[counts > 0]
    slack = 1e-9 * max(ratios.max(), 1)
    assert ratios.min() - slack <= found.low <= found.high <= ratios.max() + slack
