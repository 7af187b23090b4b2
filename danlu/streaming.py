"""Token ids as text while they come: whole characters, cut at stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from danlu.tokenizer import Tokenizer

BROKEN = "\ufffd"  # what decoding shows for bytes that are no whole character (yet)
KEPT = 8  # tokens of context for decoding; a character spans at most 4


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
