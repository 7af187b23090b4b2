"""The bytes that each token of a vocabulary stands for, one by one: what two programs must agree on to mean the same.

A token may hold a part of a character, so that its text alone says nothing; its bytes always do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from danlu.data.vocabulary import CONTINUES, byte_symbols
from danlu.tokenizer import Tokenizer

BLANK = "▁"  # what SentencePiece writes for a space
ONE_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """From token ids to bytes and back.

    Args: tokenizer: whose vocabulary it is.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        document = tokenizer.document
        self._backend = tokenizer.complete_backend
        self._added = {token["id"]: str(token["content"]) for token in document["added_tokens"]}
        self._kinds = _kinds(document.get("decoder"))

    def of(self, token: int) -> bytes | None:
        """The bytes of a token, the space before a word among them; None where the vocabulary has no such id."""
        text = self._backend.id_to_token(token)
        if text is None or token in self._added:
            return None if text is None else self._added[token].encode()
        if "ByteLevel" in self._kinds:
            return bytes(_BYTES[symbol] for symbol in text) if all(symbol in _BYTES for symbol in text) else None
        one = ONE_BYTE.fullmatch(text) if "ByteFallback" in self._kinds else None
        if one is not None:
            return bytes([int(one[1], 16)])
        if "WordPiece" in self._kinds:
            return (text.removeprefix(CONTINUES) if text.startswith(CONTINUES) else f" {text}").encode()
        return (text.replace(BLANK, " ") if self._kinds & {"Metaspace", "Replace"} else text).encode()

    @cached_property
    def ids(self) -> Mapping[bytes, int | None]:
        """The token of each string of bytes; None where several share it."""
        found: dict[bytes, int | None] = {}
        for token in self._backend.get_vocab(with_added_tokens=True).values():
            made = self.of(token)
            if made is not None:
                found[made] = None if made in found else token
        return found


_BYTES = byte_symbols()


def _kinds(decoder: Mapping[str, Any] | None) -> frozenset[str]:
    """The steps of a tokenizer.json's decoder."""
    if decoder is None:
        return frozenset()
    return frozenset(step["type"] for step in decoder.get("decoders", [decoder]))
