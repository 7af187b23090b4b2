"""A loss is judged by the upper end of its interval, and files are aimed below the limit by what that takes."""

from __future__ import annotations

from math import sqrt

import pytest

from danlu.artifact import figure
from danlu.compress.searching.costs import Told
from danlu.compress.searching.outcome import Outcome, choose
from danlu.compress.searching.rise import LOSS, Rise
from danlu.compress.searching.wishes import read_target
from danlu.device.settings import Target
from danlu.device.verdict import judge


def outcome(number: int, divergence: float, rise: float, high: float | None, size: float = 1e6) -> Outcome:
    """A file whose loss rises so from 2 nat."""
    figures = {
        "heldout_loss_rise": figure(rise, "share", None if high is None else 2 * rise - high, high),
        "heldout_loss_original": figure(2.0, "nat/token"),
        "divergence": figure(divergence, "nat/token"),
        "file_size": figure(size, "byte"),
        "memory": figure(size, "byte"),
        "decode": figure(100.0, "token/s"),
    }
    return Outcome(number, {"a": "q4_0"}, "f16", Told(divergence, size, 0.01), figures, "whole", "")


def test_what_the_search_calls_met_its_certificate_does_not_fail() -> None:
    target = read_target(quality_loss="1%")
    inside, beyond = outcome(0, 0.02, 0.007, 0.0099, 2e6), outcome(1, 0.03, 0.009, 0.0124)
    assert choose([inside, beyond], target, "smallest") is inside, "the smaller one is within 1 % by its estimate alone"
    for each in (inside, beyond):
        of_certificate = judge(
            Target(quality_loss=0.01), loss_rise=each.figures["heldout_loss_rise"],
            **{name: each.figures[name] for name in ("file_size", "memory", "decode")},
        )  # fmt: skip
        assert bool(each.missed(target)) == any(line.short for line in of_certificate)
    assert "1.24% at the interval's upper end" in beyond.missed(target)


def test_the_next_file_is_aimed_so_that_the_upper_end_keeps_the_limit() -> None:
    known = Rise.of([outcome(0, 0.04, 0.016, 0.022), outcome(1, 0.01, 0.004, 0.007)], 4096)
    assert known.slope == pytest.approx(0.8) and known.doubt == pytest.approx(0.06), "the same for both files"
    for share in (0.001, 0.01, 0.05):
        most = known.most_divergence(share)
        assert known.slope * most + known.doubt * sqrt(most) == pytest.approx(share * 2.0)
    assert known.most_divergence(0.0) == 0


def test_before_a_file_is_measured_few_tokens_leave_more_room() -> None:
    few, many = (Rise.of([], tokens).most_divergence(0.01) for tokens in (1024, 16_384))
    assert few < many < 0.01 * LOSS
    assert Rise.of([], 1024).doubt == pytest.approx(1.96 * sqrt(2 / 1024))


def test_a_file_without_an_interval_is_taken_at_its_estimate() -> None:
    known = Rise.of([outcome(0, 0.02, 0.01, None)], 4096)
    assert known.doubt == 0 and known.most_divergence(0.01) == pytest.approx(0.02)
