"""Rows of two sides: what is read and what is to be written, or two texts that belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from danlu.data.batch import RowBatch
from danlu.data.datasets import Pair
from danlu.data.encoding import Encoded, Limit, encode_all, fitted
from danlu.data.memory import Ragged, tensor
from danlu.data.stream import IGNORED
from danlu.errors import DanluError
from danlu.tokenizer import Tokenizer


@dataclass(frozen=True)
class PairBatch(RowBatch):
    """What an encoder reads and a decoder writes.

    Attributes:
        tokens: int64 [B, S], read.
        segments: int32 [B, S], the number of the document, 0 for padding.
        written: int64 [B, T], the targets one place later, behind the id that every answer begins with.
        written_segments: int32 [B, T], as `segments`: a document's answer looks at that document alone.
        targets: int64 [B, T], what comes next; -100 where that is not learned.
        weights: fp32 [B, T], what each target's loss is multiplied by; None for 1.
    """

    tokens: torch.Tensor
    segments: torch.Tensor
    written: torch.Tensor
    written_segments: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor | None = None

    @cached_property
    def count(self) -> int:
        """How many targets are learned."""
        return int((self.targets != IGNORED).sum())

    @cached_property
    def size(self) -> int:
        """Tokens of both sides, padding aside."""
        return int((self.segments > 0).sum() + (self.written_segments > 0).sum())


@dataclass(frozen=True)
class TextPairs(RowBatch):
    """Texts that belong together, side by side.

    Attributes:
        tokens: int64 [B, 2, T].
        segments: int32 [B, 2, T], 1, or 0 for padding.
    """

    tokens: torch.Tensor
    segments: torch.Tensor

    @property
    def count(self) -> int:
        """Pairs."""
        return len(self.tokens)

    @cached_property
    def size(self) -> int:
        """Tokens of both sides, padding aside."""
        return int((self.segments > 0).sum())


@dataclass(frozen=True)
class ImageTexts(RowBatch):
    """Images and what is said of them.

    Attributes:
        tokens: int64 [B, T].
        segments: int32 [B, T], 1, or 0 for padding.
        pixels: float [B, channels, height, width].
    """

    tokens: torch.Tensor
    segments: torch.Tensor
    pixels: torch.Tensor

    @property
    def count(self) -> int:
        """Pairs."""
        return len(self.tokens)

    size = count


@dataclass(frozen=True)
class PairRows:
    """Answers beside what they answer, in memory.

    Attributes:
        source: what is read.
        target: what is written, its end included.
        start: the id that every answer begins with.
    """

    source: Ragged
    target: Ragged
    start: int

    def __len__(self) -> int:
        return len(self.source)

    def lengths(self, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens of both sides of the rows with these numbers, int64 [B]."""
        return self.source.lengths(chosen) + self.target.lengths(chosen)

    def take(self, chosen: npt.NDArray[np.int64]) -> PairBatch:
        """The batch of the rows with these numbers, each side padded to a multiple of 8."""
        return answer(
            self.source.padded(chosen, 0),
            self.source.segments(chosen),
            self.target.padded(chosen, IGNORED),
            self.target.segments(chosen),
            self.start,
        )


@dataclass(frozen=True)
class TextPairRows:
    """Texts that belong together, in memory."""

    first: Ragged
    second: Ragged

    def __len__(self) -> int:
        return len(self.first)

    def lengths(self, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens of both sides of the rows with these numbers, int64 [B]."""
        return self.first.lengths(chosen) + self.second.lengths(chosen)

    def take(self, chosen: npt.NDArray[np.int64]) -> TextPairs:
        """The batch of the rows with these numbers; both sides are padded alike."""
        both = Ragged.of([side[row] for row in chosen.tolist() for side in (self.first, self.second)])
        rows = np.arange(len(both))
        tokens, segments = tensor(both.padded(rows, 0)), tensor(both.segments(rows))
        return TextPairs(tokens.unflatten(0, (-1, 2)), segments.unflatten(0, (-1, 2)))


def answer(
    tokens: npt.NDArray[np.int64],
    segments: npt.NDArray[np.int32],
    targets: npt.NDArray[np.int64],
    written_segments: npt.NDArray[np.int32],
    start: int,
) -> PairBatch:
    """The batch in which each document's targets are to be written, one after another, behind `start`.

    Args: see `PairBatch`; targets are -100 where there is padding and nowhere else.
    """
    before = np.roll(written_segments, 1, axis=1)
    before[:, 0] = 0
    written = np.where(written_segments != before, start, np.roll(targets, 1, axis=1))
    written = np.where(written_segments > 0, written, 0)
    return PairBatch(tensor(tokens), tensor(segments), tensor(written), tensor(written_segments), tensor(targets))


def pair_rows(tokenizer: Tokenizer, pairs: Sequence[Pair], start: int, source: Limit, target: Limit) -> PairRows:
    """Pairs as rows for an encoder and a decoder.

    Args:
        start: the id that every answer begins with, as the model's configuration says.
        source, target: how long each side may be; each keeps its end when it is cut.

    Raises DanluError where a side is too long and must not be cut, or the tokenizer has no token for a text's end.
    """
    read = fitted(encode_all(tokenizer, [first for first, _ in pairs]), source)
    written = [_closed(tokenizer, one) for one in encode_all(tokenizer, [second for _, second in pairs])]
    return PairRows(_ids(read), _ids(fitted(written, target)), start)


def text_pair_rows(tokenizer: Tokenizer, pairs: Sequence[Pair], limit: Limit) -> TextPairRows:
    """Texts that belong together as rows for an encoder, each between what the tokenizer puts around a text.

    Raises DanluError where a text is too long and must not be cut.
    """
    first, second = (fitted(encode_all(tokenizer, [pair[side] for pair in pairs]), limit) for side in (0, 1))
    return TextPairRows(_ids(first), _ids(second))


def _ids(rows: list[Encoded]) -> Ragged:
    return Ragged.of([row.ids for row in rows])


def _closed(tokenizer: Tokenizer, row: Encoded) -> Encoded:
    """The same with a token at its end that ends a text, where the tokenizer puts none there."""
    if row.sequences and row.sequences[-1] is None:
        return row
    if tokenizer.eos_id is None:
        raise DanluError("the tokenizer has no token that ends a text", fix="name an eos_token in its configuration")
    end = len(row.ids) and row.places[-1][1]
    return Encoded([*row.ids, tokenizer.eos_id], [*row.types, 0], [*row.places, (end, end)], [*row.sequences, None])
