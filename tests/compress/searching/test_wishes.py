"""Limits as people write them, and what is said where they are none."""

from __future__ import annotations

import pytest

from danlu.compress.searching.settings import FAST
from danlu.compress.searching.wishes import read_settings, read_target
from danlu.errors import DanluError


def test_limits_are_read_as_written() -> None:
    target = read_target(memory="100MB", speed="250tok/s", quality_loss="1%", file_size=None)
    assert (target.memory, target.speed, target.quality_loss) == (100_000_000, 250, 0.01)
    assert read_target(memory=None, speed="12.5 token/s", quality_loss=None, file_size=None).speed == 12.5


@pytest.mark.parametrize(
    ("written", "where"),
    [
        ({}, "danlu compress"),
        ({"speed": "fast"}, "--speed"),
        ({"memory": "much"}, "--memory"),
        ({"quality_loss": "-1%"}, "--loss"),
        ({"speed": "0"}, "--speed"),
    ],
)
def test_what_is_no_limit_is_refused_where_it_stands(written: dict[str, str], where: str) -> None:
    with pytest.raises(DanluError) as raised:
        read_target(**written)
    assert raised.value.where == where


def test_wishes_go_before_presets() -> None:
    settings = read_settings(True, False, {"types": "q4_0, Q8_0", "minutes": 3.0, "context": None})
    assert settings.types == ("q4_0", "q8_0") and settings.minutes == 3
    assert settings.candidates == FAST["candidates"]
    assert read_settings(False, True, {"tuning_steps": 3}).tuning_steps == 3
    with pytest.raises(DanluError, match="exclude each other"):
        read_settings(True, True, {})
    with pytest.raises(DanluError, match="did you mean q4_0"):
        read_settings(False, False, {"types": "q4_00"})
    assert read_settings(False, False, {"pruning": ("layers=3", "none")}).pruning == ("layers=3", "none")
    with pytest.raises(DanluError, match="names no smaller model"):
        read_settings(False, False, {"pruning": ("depth=3",)})
