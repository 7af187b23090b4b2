"""From the engine's token ids to text a reader can be shown while it is made: whole characters, cut at stop strings."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, Protocol

from danlu.streaming import StopStrings, TextStream
from danlu.tokenizer import Tokenizer


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
