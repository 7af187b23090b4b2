"""Each line of a target, met and missed."""

from __future__ import annotations

import math

import pytest

from danlu.artifact import figure
from danlu.device.certify import missed
from danlu.device.settings import Target
from danlu.device.verdict import judge, upper_end, worst_miss

MEASURED = {
    "file_size": figure(105e6, "byte"),
    "memory": figure(200e6, "byte"),
    "decode": figure(120.0, "token/s", 90.0, 130.0),
    "loss_rise": figure(0.015, "share", 0.01, 0.025),
}


def only_miss(**target: object) -> str:
    """The words of the one line that is missed."""
    [short] = [line.short for line in judge(Target(**target), **MEASURED) if line.short]  # type: ignore[arg-type]
    return short


def test_what_is_not_asked_is_not_judged() -> None:
    lines = judge(Target(), **MEASURED)
    assert [line.asked for line in lines] == [None] * 4
    assert all(line.plain()["passed"] for line in lines)
    assert worst_miss(lines) == 0


def test_a_target_that_is_met_to_the_byte() -> None:
    lines = judge(Target(file_size=105e6, memory="200MB", speed=120, quality_loss="2.5%"), **MEASURED)
    assert [line.plain()["passed"] for line in lines] == [True] * 4
    assert lines[1].asked == figure(200_000_000, "byte")


def test_every_miss_says_by_how_much() -> None:
    assert only_miss(file_size="100MB") == "105.0 MB is 5.0 MB (5.0%) more than the 100.0 MB asked"
    assert only_miss(memory="160MB") == "200.0 MB is 40.0 MB (25.0%) more than the 160.0 MB asked"
    assert only_miss(speed=160) == "120.0 token/s is 40.0 token/s (25.0%) less than the 160.0 token/s asked"
    assert only_miss(quality_loss="1%") == "2.50% at the interval's upper end is 1.50% more than the 1.00% asked"


def test_the_loss_is_judged_by_the_upper_end() -> None:
    assert only_miss(quality_loss="2%"), "1.5% was measured, but up to 2.5% is likely"
    single = MEASURED | {"loss_rise": figure(0.015, "share")}  # one document: no interval
    assert not any(line.short for line in judge(Target(quality_loss="2%"), **single))


def test_the_upper_end_of_what_has_no_interval_is_itself() -> None:
    assert upper_end(figure(0.015, "share", 0.01, 0.025)) == 0.025 and upper_end(figure(0.015, "share")) == 0.015


def test_the_worst_line_counts() -> None:
    assert worst_miss(judge(Target(file_size="100MB", speed=160), **MEASURED)) == pytest.approx(0.25)
    assert worst_miss(judge(Target(quality_loss=0), **MEASURED)) == math.inf


def test_missed_is_an_error_only_where_a_line_was_missed() -> None:
    lines = [line.plain() for line in judge(Target(speed=100, file_size="1GB"), **MEASURED)]
    assert missed({"lines": lines}) is None
    lines = [line.plain() for line in judge(Target(speed=160, file_size="100MB"), **MEASURED)]
    error = missed({"lines": lines}, where="certificate.json")
    assert error is not None and error.exit_code == 1
    assert str(error).startswith("certificate.json: the target is missed:\n  file size: 105.0 MB is 5.0 MB")
    assert "decoding: 120.0 token/s is 40.0 token/s" in str(error)
