"""From the engine's token ids to text a reader can be shown while it is made: whole characters, cut at stop strings."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from danlu.device.speculation import Tally
from danlu.serve.ranked import Logits, Ranked, rank
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
        rated: `Backend.logits` is asked for behind each token.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    rated: bool = False

    @property
    def greedy(self) -> bool:
        """Whether each token is the one that the model finds likeliest."""
        return self.temperature == 0 and self.frequency_penalty == 0 and self.presence_penalty == 0


class Backend(Protocol):
    """A loaded model that continues token ids, whatever computes it."""

    name: str
    context: int  # tokens, prompt and answer together
    tokenizer: Tokenizer
    penalties: bool  # whether frequency_penalty and presence_penalty can be honoured
    tally: Tally | None  # of guesses, where answers are guessed ahead
    system: str | None  # what stood before conversations that bring no system message when the model was tuned

    def generate(self, prompt: list[int], sampling: Sampling) -> Generator[int, None, None]:
        """Continue the prompt until a stop token, which is not given out, or the limit."""

    def logits(self) -> Logits:
        """What the latest token that `generate` gave out was chosen from, [vocab], as the model made it."""

    def score(self, prompt: list[int]) -> Generator[Logits, None, None]:
        """Logits behind each token of a prompt but its last, part by part: [n, vocab], good until the next part."""

    def close(self) -> None:
        """Free the model's memory."""


@dataclass(frozen=True)
class Piece:
    """What one more token of an answer brought.

    Attributes:
        text: new text; may be empty while a character or a possible stop string is incomplete.
        tokens: tokens made so far in this answer.
        finish: None while the answer goes on; "stop" where the model or a stop string ended it, "length" at the limit.
        ranked: what the model thought of the token, or of each of the prompt's, where that is asked for.
    """

    text: str
    tokens: int
    finish: Literal["stop", "length"] | None = None
    ranked: tuple[Ranked, ...] = ()


def answer(
    backend: Backend,
    prompt: list[int],
    sampling: Sampling,
    stops: Sequence[str] = (),
    joined: bool = False,
    top: int | None = None,
    echo: bool = False,
) -> Generator[Piece, None, None]:
    """Answer a prompt; one Piece a token, the last with its reason to finish.

    A character cut in half by the limit is left out: half a character is no text.

    Args:
        backend: the model.
        prompt: ids; with `sampling.max_new_tokens` they fit the context (see `room`).
        sampling: how to choose tokens.
        stops: strings that end the answer and are no part of it.
        joined: the text continues the prompt's text (a plain completion) and does not begin anew (a chat turn).
        top: rate every token against so many of the likeliest; None leaves it.
        echo: the first Piece is the prompt.
    """
    text, cut = TextStream(backend.tokenizer, prompt if joined else ()), StopStrings(stops)
    made = written = 0
    if echo:
        said = _echo(backend, prompt, top)
        written = len(said.text)
        yield said
    if sampling.max_new_tokens == 0:
        yield Piece("", 0, "length")
        return
    with closing(backend.generate(prompt, sampling)) as tokens:
        for token in tokens:
            made += 1
            ranked = () if top is None else tuple(rank(backend.logits()[None], [token], [written], top))
            new = text.push(token)
            written += len(new)
            ready, stopped = cut.push(new)
            yield Piece(ready, made, "stop" if stopped else None, ranked)
            if stopped:
                return
    yield Piece(cut.rest(), made, "length" if made >= sampling.max_new_tokens else "stop")


def _echo(backend: Backend, prompt: list[int], top: int | None) -> Piece:
    """The prompt itself as text, its tokens rated where `top` says against how many."""
    stream = TextStream(backend.tokenizer)
    parts = [stream.push(token) for token in prompt]
    if top is None:
        return Piece("".join(parts), 0)
    offsets = np.cumsum([0, *map(len, parts)]).tolist()
    ranked = [Ranked(prompt[0], 0)]
    for logits in backend.score(prompt) if len(prompt) > 1 else ():
        here = slice(len(ranked), len(ranked) + len(logits))
        ranked += rank(logits, prompt[here], offsets[here], top)
    return Piece("".join(parts), 0, ranked=tuple(ranked))
