"""From the engine's token ids to text a reader can be shown while it is made: whole characters, cut at stop strings."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, Protocol

from danlu.tokenizer import Tokenizer

BROKEN = "\ufffd"  # what decoding shows for bytes that are no whole character (yet)
KEPT = 8  # tokens of context for decoding; a character spans at most 4


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and how many may be made.

    Attributes:
        max_new_tokens: at most so many tokens.
        temperature: 0 takes the likeliest token; 1 samples from the model's own distribution.
        top_p: sample from the smallest set of tokens with at least this probability (arXiv:1904.09751).
        seed: the same seed, prompt and settings give the same answer on the same machine.
        frequency_penalty, presence_penalty: taken off a token's logit, per use so far and once if used (OpenAI).
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0


class Backend(Protocol):
    """A loaded model that continues token ids, whatever computes it."""

    name: str
    context: int  # tokens, prompt and answer together
    tokenizer: Tokenizer
    penalties: bool  # whether frequency_penalty and presence_penalty can be honoured
    system: str | None  # what stood before conversations that bring no system message when the model was tuned

    def generate(self, prompt: list[int], sampling: Sampling) -> Generator[int, None, None]:
        """Continue the prompt until a stop token, which is not given out, or the limit."""

    def close(self) -> None:
        """Free the model's memory."""


@dataclass(frozen=True)
class Piece:
    """What one more token of an answer brought.

    Attributes:
        text: new text; may be empty while a character or a possible stop string is incomplete.
        tokens: tokens made so far in this answer.
        finish: None while the answer goes on; "stop" where the model or a stop string ended it, "length" at the limit.
    """

    text: str
    tokens: int
    finish: Literal["stop", "length"] | None = None


class TextStream:
    """Decodes token by token and gives out only whole characters.

    A token may hold a part of a character (a Chinese one spans up to three tokens), and how a token decodes can depend
    on its neighbours (SentencePiece drops the space before the first), so a short window of tokens is decoded.

    Args:
        tokenizer: decodes the ids; special tokens give no text.
        before: the ids the stream continues, where the text shall join theirs.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(before[-KEPT:])
        self._shown = tokenizer.decode(self._window).rstrip(BROKEN)

    def push(self, token: int) -> str:
        """The text that is certain now that `token` is there."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        whole = text.rstrip(BROKEN)
        new = whole[len(self._shown) :]
        if new:
            self._shown = whole
        if text == whole and len(self._window) > 2 * KEPT:
            self._window = self._window[-KEPT:]
            self._shown = self._tokenizer.decode(self._window)
        return new


class StopStrings:
    """Cuts a stream of text at the first of some strings, wherever the pieces' borders lie."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is certain to come before a stop string, and whether one was met."""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            return self._held[: min(found)], True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return ready, False

    def rest(self) -> str:
        """What was held back; no stop string can come any more."""
        return self._held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` could be the beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def answer(
    backend: Backend, prompt: list[int], sampling: Sampling, stops: Sequence[str] = (), joined: bool = False
) -> Generator[Piece, None, None]:
    """Answer a prompt; one Piece a token, the last with its reason to finish.

    A character cut in half by the limit is left out: half a character is no text.

    Args:
        backend: the model.
        prompt: ids; with `sampling.max_new_tokens` they fit the context (see `room`).
        sampling: how to choose tokens.
        stops: strings that end the answer and are no part of it.
        joined: the text continues the prompt's text (a plain completion) and does not begin anew (a chat turn).
    """
    text, cut = TextStream(backend.tokenizer, prompt if joined else ()), StopStrings(stops)
    made = 0
    with closing(backend.generate(prompt, sampling)) as tokens:
        for token in tokens:
            made += 1
            ready, stopped = cut.push(text.push(token))
            yield Piece(ready, made, "stop" if stopped else None)
            if stopped:
                return
    yield Piece(cut.rest(), made, "length" if made >= sampling.max_new_tokens else "stop")
