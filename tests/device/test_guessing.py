"""Answers that are guessed ahead, as servers and certificates use them."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from danlu.device import speculation
from danlu.device.engine import Engine
from danlu.device.guessing import Guesser, guess_figures
from danlu.errors import DanluError
from danlu.tokenizer import Tokenizer
from tests.gguf_files import smaller, vocabulary_file

COPY = "one two three four, " * 6


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer steps are timed."""
    monkeypatch.setattr(speculation, "COUNTS", (0, 2, 8))


@pytest.mark.parametrize("draft", [False, True])
def test_the_text_is_the_models_own_and_guesses_are_counted(exact_engine: Engine, smollm2: Path, draft: bool) -> None:
    prompt = exact_engine.tokenize(COPY)
    alone = list(exact_engine.generate(prompt, max_new_tokens=16))
    with closing(Guesser(exact_engine, smollm2 if draft else None)) as guesser:
        assert set(guesser._costs.seconds) == {0, 2, 8} and guesser._costs.seconds[2] > guesser._costs.seconds[0]
        for _ in range(2):  # each answer is a text of its own
            assert list(guesser.generate(prompt, max_new_tokens=16)) == alone
        assert guesser.tally.tokens == 32 and guesser.tally.steps + guesser.tally.kept == 32
        assert list(guesser.generate(prompt, max_new_tokens=16, stop_ids=frozenset({alone[3]}))) == alone[:3]


def test_a_draft_with_other_words_is_refused(exact_engine: Engine, tmp_path: Path) -> None:
    other = vocabulary_file(smaller(Tokenizer.load(exact_engine.path), 1000), tmp_path / "other.gguf")
    with pytest.raises(DanluError, match="its tokens are not those of"):
        Guesser(exact_engine, other)


def test_what_it_gains_is_measured(smollm2: Path, engine: Engine) -> None:
    prompt = engine.tokenize(COPY)
    made = guess_figures(smollm2, prompt, context=128, threads=1, tokens=8, repeats=2)
    assert made["decode_alone"]["value"] > 0 and made["decode_guessing"]["unit"] == "token/s"
    assert made["guessing_same_tokens"]["value"] == 1.0
    assert 0 <= made["guesses_kept"]["value"] <= 1
    assert not any(name.startswith("draft") for name in made)
