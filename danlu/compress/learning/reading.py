"""What servers answer with `logprobs`, read as token ids of one vocabulary.

There are two shapes: that of plain completions (vLLM, danlu serve) and that of chats, which llama.cpp has for both. A
token is known by its id where the server gives it, or else by its bytes or its text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from danlu.data.token_bytes import TokenBytes
from danlu.errors import DanluError
from danlu.streaming import BROKEN
from danlu.tokenizer import Tokenizer

ID = re.compile(r"token_id:(\d+)")  # vLLM, danlu serve
BYTES = re.compile(r"bytes:((?:\\x[0-9a-f]{2})+)")  # OpenAI, danlu serve
SLACK = 1e-3  # by which summed probabilities may be over 1: servers round


@dataclass(frozen=True)
class Said:
    """What a server said of one place.

    Attributes:
        token: the id that stands there; None where its name belongs to no token, or to several.
        logprobs: ids of the likeliest tokens, the one that stands there among them, and how likely they are, in nat;
            empty for a text's first token.
        unplaced: tokens that were named, and whose names belong to no token or to several.
    """

    token: int | None
    logprobs: Mapping[int, float]
    unplaced: int


class Reader:
    """Reads answers in a vocabulary.

    Args:
        tokenizer: whose ids are meant.
        words: ids that the model to be taught has: those from here on are none of its words.
        where: of the server, named in errors.

    Attributes: tokenizer, words: as given.
    """

    def __init__(self, tokenizer: Tokenizer, words: int, where: str) -> None:
        self.tokenizer, self._bytes, self.words, self._where = tokenizer, TokenBytes(tokenizer), words, where

    def read(self, choice: Mapping[str, Any]) -> list[Said] | None:
        """The tokens of one choice of an answer; None where it has no `logprobs`.

        Raises DanluError where they are not what they should be, or a token is another one than this vocabulary's.
        """
        given = choice.get("logprobs")
        if not isinstance(given, Mapping):
            return None
        try:
            if isinstance(given.get("content"), list):
                return [self._said(one, one.get("logprob"), _named(one)) for one in given["content"]]
            if isinstance(given.get("tokens"), list):
                return [self._said({"token": token}, own, tops) for token, own, tops in _lines(given)]
        except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            raise DanluError(f"its logprobs cannot be read: {error!r}", where=self._where) from None
        return None

    def token(self, named: Mapping[str, Any]) -> int | None:
        """The id of a token that is named by some of `token`, `bytes` and `id`."""
        text, given, number = str(named["token"]), named.get("bytes"), named.get("id")
        made = bytes(given) if given is not None else None
        if found := ID.fullmatch(text):
            number = int(found[1])
        if number is None:
            return self._by_text(text, made)
        if number >= self.words:
            return None
        own = self._bytes.of(number)
        if made and own is not None and made != own:
            raise other_words(self._where, f"its token {number} is {made!r}, the student's {own!r}")
        return int(number)

    def _by_text(self, text: str, made: bytes | None) -> int | None:
        if made is None and (found := BYTES.fullmatch(text)):
            made = bytes.fromhex(found[1].replace(r"\x", ""))
        if made is None and BROKEN in text:
            return None
        token = self._bytes.ids.get(text.encode() if made is None else made)
        return self.tokenizer.id_of(text) if token is None and made is None else token

    def _said(self, named: Mapping[str, Any], own: Any, tops: Iterable[tuple[Mapping[str, Any], Any]]) -> Said:
        token, unplaced = self.token(named), 0
        found: dict[int, float] = {}
        for name, logprob in tops:
            other = self.token(name)
            if other is None:
                unplaced += 1
            else:
                found[other] = max(_number(logprob), found.get(other, -math.inf))
        if token is not None and own is not None:
            found[token] = _number(own)
        total = math.fsum(map(math.exp, found.values()))
        if total > 1 + SLACK:
            raise DanluError(f"its probabilities of one token add up to {total:.4f}", where=self._where)
        return Said(token, found, unplaced)


def other_words(where: str, what: str) -> DanluError:
    """The error for a server that means other tokens than the student."""
    fix = "take a teacher with the student's vocabulary"
    return DanluError(f"its tokens are not the student's: {what}", where=where, fix=fix)


def _number(value: Any) -> float:
    """A log probability; what is over 0 by rounding is 0."""
    made = float(value)
    if math.isnan(made) or made > SLACK:
        raise ValueError(f"{value} is no log probability")
    return min(made, 0.0)


def _named(one: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Any]]:
    return ((other, other["logprob"]) for other in one.get("top_logprobs") or ())


def _lines(given: Mapping[str, Any]) -> Iterator[tuple[str, Any, Iterator[tuple[dict[str, str], Any]]]]:
    """Token, its log probability and the likeliest ones, place by place."""
    tokens = given["tokens"]
    tops = given.get("top_logprobs") or [None] * len(tokens)
    for token, own, top in zip(tokens, given["token_logprobs"], tops, strict=True):
        yield token, own, (({"token": name}, logprob) for name, logprob in (top or {}).items())
