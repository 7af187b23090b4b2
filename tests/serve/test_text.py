"""Characters and stop strings survive any token borders."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.serve.backend import GGUFBackend
from danlu.serve.text import Sampling, answer
from danlu.streaming import StopStrings, TextStream
from danlu.tokenizer import Tokenizer

CHINESE = "炼大模型👩‍🔬：丹炉里的火，烧了七七四十九天。\n龘𠮷 naïve café 🇨🇳 end"


class Scripted:
    """Says given tokens, to put the borders where a test wants them."""

    name, context, penalties, system = "scripted", 10_000, True, None

    def __init__(self, tokenizer: Tokenizer, ids: list[int]) -> None:
        self.tokenizer, self.ids, self.closed = tokenizer, ids, False

    def generate(self, prompt: list[int], sampling: Sampling) -> Generator[int, None, None]:
        try:
            yield from self.ids[: sampling.max_new_tokens]
        finally:
            self.closed = True

    def close(self) -> None:
        pass


def pieces(tokenizer: Tokenizer, ids: list[int]) -> Iterator[str]:
    stream = TextStream(tokenizer)
    return (stream.push(token) for token in ids)


def test_chinese_and_emoji_arrive_whole(backend: GGUFBackend) -> None:
    tokenizer = backend.tokenizer
    ids = tokenizer.encode(CHINESE)
    said = list(pieces(tokenizer, ids))
    assert "".join(said) == CHINESE
    assert len(ids) > len(CHINESE)  # characters were split over tokens, or this tests nothing
    assert not any("\ufffd" in piece for piece in said)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=60))
def test_any_text_streams_unchanged(backend: GGUFBackend, text: str) -> None:
    ids = backend.tokenizer.encode(text, special=False)
    assert "".join(pieces(backend.tokenizer, ids)) == backend.tokenizer.decode(ids).rstrip("\ufffd")


def test_a_character_cut_by_the_limit_is_left_out(backend: GGUFBackend) -> None:
    ids = backend.tokenizer.encode("好龘")
    cut = Scripted(backend.tokenizer, ids)
    found = list(answer(cut, [0], Sampling(max_new_tokens=len(ids) - 1)))
    assert "".join(piece.text for piece in found) == "好"
    assert (found[-1].finish, found[-1].tokens) == ("length", len(ids) - 1)


@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    cuts=st.sets(st.integers(1, 29)),
)
def test_stop_strings_at_any_border(text: str, stops: list[str], cuts: set[int]) -> None:
    borders = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    held, said, stopped = StopStrings(stops), "", False
    for start, end in pairwise(borders):
        ready, stopped = held.push(text[start:end])
        said += ready
        assert not any(stop in said for stop in stops)
        if stopped:
            break
    said += "" if stopped else held.rest()
    ends = [text.find(stop) for stop in stops if stop in text]
    assert stopped == bool(ends)
    assert text.startswith(said)
    assert any(text[len(said) :].startswith(stop) for stop in stops) if stopped else said == text


def test_a_stop_string_ends_the_generation_at_once(backend: GGUFBackend) -> None:
    ids = backend.tokenizer.encode("one two three four five six")
    script = Scripted(backend.tokenizer, ids)
    found = list(answer(script, [0], Sampling(max_new_tokens=100), stops=["o thr"]))
    assert "".join(piece.text for piece in found) == "one tw"
    assert found[-1].finish == "stop"
    assert found[-1].tokens < len(ids)
    assert script.closed


def test_a_plain_completion_joins_the_prompt(backend: GGUFBackend) -> None:
    tokenizer = backend.tokenizer
    ids = tokenizer.encode("龘 and more")
    script = Scripted(tokenizer, ids[1:])  # the prompt ends within the character
    joined = "".join(piece.text for piece in answer(script, ids[:1], Sampling(100), joined=True))
    assert joined == "龘 and more"
