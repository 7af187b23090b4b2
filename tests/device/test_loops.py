"""Loops at the end of answers, with and without an engine; speed without a pause; phones that nobody has here."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.device.loops import LEAST, TURNS, ends_in_loop, loop_rate
from danlu.device.phones import PHONES, extrapolate
from danlu.device.stack import Stack, write_stack
from danlu.device.sustained import sustained_speed


@given(st.lists(st.integers(0, 5), max_size=20), st.lists(st.integers(0, 50), min_size=1, max_size=20, unique=True))
def test_a_cycle_said_over_and_over_is_found_whatever_went_before(start: list[int], cycle: list[int]) -> None:
    often = max(TURNS, -(-LEAST // len(cycle)))
    assert ends_in_loop(start + cycle * often)


@given(st.lists(st.integers(0, 10**9), unique=True, max_size=200))
def test_text_that_never_comes_again_is_no_loop(tokens: list[int]) -> None:
    assert not ends_in_loop(tokens)
    assert not ends_in_loop(tokens + tokens), "twice is not three times"


def test_a_short_word_said_thrice_is_no_loop() -> None:
    assert not ends_in_loop([*range(100), 7, 7, 7])
    assert ends_in_loop([*range(100), *[7] * LEAST])
    assert not ends_in_loop([*[7] * LEAST, 8]), "a loop that was left again"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("stack") / "stack.gguf"
    write_stack(Stack("q8_0", 64, 2), made)
    return made


def test_a_model_of_equal_layers_loops(file: Path) -> None:
    rate = loop_rate(file, [[1, 2, 3], [9, 8]], 48, threads=1)
    assert rate.value in (0.0, 0.5, 1.0) and 0 <= rate.low <= rate.value <= rate.high <= 1


def test_speed_without_a_pause_says_its_trend(file: Path) -> None:
    found = sustained_speed(file, [1, 2, 3], 0.5, context=64, threads=1)
    speed = found["sustained"]
    assert 0 <= speed["low"] <= speed["value"] <= speed["high"] and speed["value"] > 10
    assert found["sustained_trend"]["value"] >= -1


def test_an_extrapolation_is_a_share_of_the_bandwidth_and_says_so() -> None:
    found = extrapolate(4.5, 0.8, ("a board", 40.0))
    assert set(found) == {*PHONES, "a board"} and set(extrapolate(4.5, 0.8)) == set(PHONES)
    assert "40.0 GB/s as its profile measured" in found["a board"]["by"]
    assert found["a board"]["value"] == pytest.approx(0.8 * 40e9 / (7e9 * 4.5 / 8))
    assert all("not measured" in each["by"] for each in found.values())
