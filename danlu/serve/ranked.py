"""What a model thought of each token, as OpenAI writes it: `logprobs`, of an answer's tokens or of a prompt's.

Log probabilities are log softmax of the logits as the model made them, before temperature, top-p and penalties.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from danlu.data.token_bytes import TokenBytes

LOWEST = -9999.0  # what OpenAI writes for a token that is as good as impossible; JSON has no infinity
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Ranked:
    """A token and what might have stood in its place.

    Attributes:
        token: its id.
        offset: characters of the choice's text before it.
        logprob: in nat; None for a text's first token, which nothing stands before.
        top: ids and log probabilities of the likeliest tokens there, the likeliest first.
    """

    token: int
    offset: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """[n, vocab] -> the same in nat."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def rank(logits: Logits, tokens: Sequence[int], offsets: Sequence[int], most: int) -> Iterator[Ranked]:
    """Rate tokens by the logits that they were, or might have been, chosen from.

    Args:
        logits: [n, vocab].
        tokens, offsets: n of each, see `Ranked`.
        most: how many of the likeliest are named.
    """
    chances = np.maximum(log_softmax(logits), LOWEST)
    count = min(most, chances.shape[1])
    likeliest = np.argpartition(-chances, count - 1, axis=1)[:, :count] if count else np.empty((len(chances), 0), int)
    for row, names, token, offset in zip(chances, likeliest, tokens, offsets, strict=True):
        named = names[np.lexsort((names, -row[names]))].tolist()
        top = tuple((name, float(row[name])) for name in named)
        yield Ranked(token, offset, float(row[token]), top)


class Names:
    """How tokens are written.

    Args:
        token_bytes: of the vocabulary whose tokens they are.
        as_ids: as `token_id:17` in place of their text, which several tokens may share (vLLM's
            `return_tokens_as_token_ids`).
    """

    def __init__(self, token_bytes: TokenBytes, as_ids: bool = False) -> None:
        self._bytes, self._as_ids = token_bytes, as_ids

    def bytes(self, token: int) -> list[int] | None:
        """The token's bytes; None for an id without a token, of which a model's head may have some."""
        made = self._bytes.of(token)
        return None if made is None else list(made)

    def text(self, token: int) -> str:
        """The token's text; U+FFFD stands for parts of characters."""
        if self._as_ids:
            return f"token_id:{token}"
        return (self._bytes.of(token) or b"").decode(errors="replace")

    def key(self, token: int) -> str:
        r"""The same where texts must differ: parts of characters as `bytes:\xe4\xb8`."""
        made = self._bytes.of(token)
        if self._as_ids or made is None:
            return f"token_id:{token}"
        try:
            return made.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in made)


def chat_logprobs(ranked: Iterable[Ranked], names: Names) -> dict[str, Any]:
    """The `logprobs` object of a chat's choice."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": names.text(token), "logprob": logprob, "bytes": names.bytes(token)}

    content = [entry(one.token, one.logprob) | {"top_logprobs": [entry(*other) for other in one.top]} for one in ranked]
    return {"content": content, "refusal": None}


def text_logprobs(ranked: Iterable[Ranked], names: Names) -> dict[str, Any]:
    """The `logprobs` object of a plain completion's choice.

    The token that stands there is always among its own `top_logprobs`, so they may be one more than was asked for. Of
    two tokens with the same bytes the likelier is named.
    """
    ranked = list(ranked)
    return {
        "tokens": [names.key(one.token) for one in ranked],
        "token_logprobs": [one.logprob for one in ranked],
        "top_logprobs": [_by_name(one, names) for one in ranked],
        "text_offset": [one.offset for one in ranked],
    }


def _by_name(one: Ranked, names: Names) -> dict[str, float] | None:
    if one.logprob is None:
        return None
    found: dict[str, float] = {}
    for token, logprob in (*one.top, (one.token, one.logprob)):
        found.setdefault(names.key(token), logprob)
    return found
