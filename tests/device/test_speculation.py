"""Guesses that are checked: whatever is guessed, the text is the one that the model writes alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.device.engine import Engine
from danlu.device.speculation import COUNTS, Costs, Draft, Lookup, Smaller, Tally, speculate
from danlu.errors import DanluError

COPY = """<|im_start|>user
Repeat this: one two three four, one two three four, one two three four, one two three four<|im_end|>
<|im_start|>assistant
one two three four, one two three"""


class Wrong:
    """Always guesses, and never right."""

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        return [0] * count


class Known:
    """Guesses a text that is known."""

    def __init__(self, text: list[int], prompt: int) -> None:
        self.text, self.prompt = text, prompt

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        place = len(tokens) - self.prompt
        return self.text[place : place + count]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 5), st.data())
def test_what_followed_last_time_is_guessed(tokens: list[int], count: int, data: st.DataObject) -> None:
    draft = Lookup(longest=3, shortest=1)
    for length in sorted(data.draw(st.sets(st.integers(1, len(tokens))))):  # a text that grows by some tokens a time
        known = tokens[:length]
        expected: list[int] = []
        for size in range(min(3, length), 0, -1):
            ends = [end for end in range(size, length) if known[end - size : end] == known[length - size :]]
            if ends:
                expected = known[ends[-1] : ends[-1] + count]
                break
        assert draft.guess(known, count) == expected


@pytest.mark.parametrize("draft", ["lookup", "wrong", "known", "itself"])
def test_the_text_is_the_models_own(exact_engine: Engine, draft: str) -> None:
    engine = exact_engine
    prompt = engine.tokenize(COPY)
    alone = list(engine.generate(prompt, max_new_tokens=24))
    drafts: dict[str, Draft] = {
        "lookup": Lookup(),
        "wrong": Wrong(),
        "known": Known(alone, len(prompt)),
        "itself": Smaller(engine, engine),
    }
    tally = Tally()
    assert list(speculate(engine, prompt, drafts[draft], max_new_tokens=24, most=4, tally=tally)) == alone
    assert tally.tokens == 24 and tally.kept == tally.tokens - tally.steps
    if draft == "wrong":
        assert tally.kept == 0 and tally.steps == 24
    elif draft == "lookup":
        assert tally.plain()["tokens_per_step"] > 1.5
    else:
        assert tally.kept == tally.guessed and tally.steps == 5


def test_ends_where_the_model_would(exact_engine: Engine) -> None:
    prompt = exact_engine.tokenize(COPY)
    alone = list(exact_engine.generate(prompt, max_new_tokens=10_000))
    assert len(prompt) + len(alone) == exact_engine.context
    assert list(speculate(exact_engine, prompt, Lookup(), max_new_tokens=10_000)) == alone
    stop = frozenset({alone[11]})
    expected = alone[: alone.index(alone[11])]
    assert list(speculate(exact_engine, prompt, Lookup(), max_new_tokens=24, stop_ids=stop)) == expected
    assert list(speculate(exact_engine, prompt, Lookup(), max_new_tokens=0)) == []


def test_as_many_are_checked_as_pay() -> None:
    free = Costs(dict.fromkeys(COUNTS, 1.0))
    dear = Costs({count: 1.0 + count for count in COUNTS})
    half = Costs({count: 1.0 + 0.5 * count for count in COUNTS})
    assert free.best(0.3, 16) == 16 and free.best(0.3, 5) == 4
    assert dear.best(0.99, 16) == 0
    assert half.best(0.2, 16) == 0 and half.best(1.0, 16) == 16 and 0 < half.best(0.8, 16) < 16


def test_dear_checks_are_left_out_until_guesses_come_true(exact_engine: Engine) -> None:
    engine, prompt = exact_engine, exact_engine.tokenize(COPY)
    alone = list(engine.generate(prompt, max_new_tokens=20))
    half = Costs({count: 1.0 + 0.5 * count for count in COUNTS})
    wrong, right = Tally(), Tally()
    assert list(speculate(engine, prompt, Wrong(), max_new_tokens=20, costs=half, tally=wrong)) == alone
    assert wrong.guessed <= 2
    known = Known(alone, len(prompt))
    assert list(speculate(engine, prompt, known, max_new_tokens=20, costs=half, tally=right)) == alone
    assert right.kept == right.guessed > 8


def test_what_steps_cost_is_measured(engine: Engine, question: list[int]) -> None:
    alone = list(engine.generate(question, max_new_tokens=4))
    costs = Costs.measure(engine, question[:8])
    assert list(costs.seconds) == list(COUNTS) and all(seconds > 0 for seconds in costs.seconds.values())
    assert costs.seconds[48] > costs.seconds[0]
    assert list(engine.generate(question, max_new_tokens=4)) == alone


def test_what_cannot_be_is_refused(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(DanluError, match="the prompt is empty"):
        speculate(engine, [], Lookup(), max_new_tokens=1)
    with pytest.raises(DanluError, match="leaves no room"):
        speculate(engine, [1] * engine.context, Lookup(), max_new_tokens=1)
    with pytest.raises(DanluError, match="64 guesses a step"):
        speculate(engine, [1], Lookup(), max_new_tokens=1, most=64)
