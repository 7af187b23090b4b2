"""`--guess`: the same answers at temperature 0, and the same draws where there is a temperature."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from danlu.device import speculation
from danlu.errors import DanluError
from danlu.serve.app import make_app
from danlu.serve.backend import GGUFBackend, Guesses, open_backend
from danlu.serve.chat import chat
from danlu.serve.text import Sampling
from tests.serve.conftest import CONTEXT

PROMPT = "a b c d, a b c d, a b c d, a b c d,"


@pytest.fixture(scope="module")
def guessing(gguf: Path) -> Iterator[GGUFBackend]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(speculation, "COUNTS", (0, 2, 8))
        made = open_backend(gguf, context=CONTEXT, threads=1, guesses=Guesses())
    assert isinstance(made, GGUFBackend)
    yield made
    made.close()


def test_only_greedy_answers_are_guessed(guessing: GGUFBackend, backend: GGUFBackend) -> None:
    prompt, greedy = backend.tokenizer.encode(PROMPT), Sampling(max_new_tokens=24)
    assert guessing.tally is not None and guessing.tally.steps == 0
    sampled = Sampling(max_new_tokens=8, temperature=1.5, seed=3)
    for plain in (sampled, replace(greedy, frequency_penalty=1.0), replace(greedy, rated=True)):
        assert list(guessing.generate(prompt, plain)) == list(backend.generate(prompt, plain))
    assert guessing.tally.steps == 0
    assert list(guessing.generate(prompt, greedy)) == list(backend.generate(prompt, greedy))
    assert guessing.tally.tokens == 24 and backend.tally is None


def test_served_answers_are_the_same(guessing: GGUFBackend, backend: GGUFBackend) -> None:
    asked = {"model": backend.name, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    ids = list(backend.generate(backend.tokenizer.encode(PROMPT), Sampling(max_new_tokens=12)))
    with TestClient(make_app(guessing), base_url="http://localhost") as client:
        for more in ({}, {"logprobs": 1}):
            made = client.post("/v1/completions", json=asked | more).json()
            assert made["choices"][0]["text"] == backend.tokenizer.decode(ids)


def test_guesses_need_a_gguf_and_no_temperature(tiny_model: Path, gguf: Path) -> None:
    with pytest.raises(DanluError, match="temperature 1 draws others"):
        chat(gguf, prompt="Hi", temperature=1.0, guesses=Guesses())
    with pytest.raises(DanluError, match="reads GGUF files"):
        open_backend(tiny_model, guesses=Guesses())


def test_a_conversation_says_how_many_were_right(
    gguf: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculation, "COUNTS", (0, 2))
    chat(gguf, prompt="Say: a b c d, a b c d", max_tokens=8, context=CONTEXT, threads=1, guesses=Guesses())
    assert "guesses were right" in capsys.readouterr().err
