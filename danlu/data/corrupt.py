"""Rows made harder: tokens hidden one by one (BERT) or span by span (T5), as pure functions of seed and step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from danlu.data.batch import Batches
from danlu.data.memory import Ragged, tensor
from danlu.data.pairs import PairBatch, answer
from danlu.data.permutation import GOLDEN, WORD, key_of, mix
from danlu.data.stream import IGNORED, Batch
from danlu.errors import DanluError

Keys = npt.NDArray[np.uint64]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Masking:
    """How tokens are hidden (BERT, arXiv:1810.04805).

    Attributes:
        mask: the id that stands for a hidden token.
        vocab_size: random words are drawn from the ids below it.
        special: ids that are never hidden, such as [CLS] and [SEP].
        share: of each row's other tokens, so many are to be found out, but at least one.
        masked: share of those that become `mask`.
        random: share of those that become a random word; the rest stay as they are.

    Raises DanluError where a share is none, or the mask is no word of the vocabulary.
    """

    mask: int
    vocab_size: int
    special: frozenset[int]
    share: float = 0.15
    masked: float = 0.8
    random: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.mask < self.vocab_size:
            raise DanluError(f"the mask {self.mask} is none of the {self.vocab_size:,} words", where="masking")
        if not 0 < self.share <= 1 or min(self.masked, self.random) < 0 or self.masked + self.random > 1:
            what = f"share {self.share}, masked {self.masked} and random {self.random} must be shares,"
            raise DanluError(f"{what} the first more than 0, the others at most 1 together", where="masking")


@dataclass(frozen=True)
class SpanCorruption:
    """How spans are hidden (T5, arXiv:1910.10683).

    Attributes:
        first_sentinel: the id that stands for the first hidden span; the next ones count down from it.
        sentinels: how many there are.
        end: the id behind what is read and what is written.
        start: the id that every answer begins with.
        density: share of a document's tokens that are hidden.
        length: of a span, on average.

    Raises DanluError where there are no such sentinels, or a setting is out of its range.
    """

    first_sentinel: int
    end: int
    start: int = 0
    sentinels: int = 100
    density: float = 0.15
    length: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.sentinels <= self.first_sentinel + 1:
            what = f"{self.sentinels} sentinels cannot be counted down from id {self.first_sentinel}"
            raise DanluError(what, where="span corruption")
        if not 0 < self.density < 1 or self.length < 1:
            what = f"density {self.density} must lie between 0 and 1, length {self.length} be at least 1"
            raise DanluError(what, where="span corruption")


def row_keys(seed: int, step: int, places: Ids) -> Keys:
    """A 64-bit key for every row of a step's global batch: `key_of(seed, step, place)`, all at once."""
    return mix(places.astype(np.uint64) + np.uint64((key_of(seed, step) + GOLDEN) & WORD))


def mask_tokens(tokens: Ids, segments: npt.NDArray[np.int32], keys: Keys, how: Masking) -> tuple[Ids, Ids]:
    """Hide some tokens of every row.

    Args:
        tokens: int64 [B, T]; segments: int32 [B, T], 0 for padding, which is never hidden.
        keys: uint64 [B], what decides for each row.

    Returns: what the model sees, int64 [B, T]; what it must say, int64 [B, T], -100 where nothing is asked.
    """
    eligible = (segments > 0) & ~np.isin(tokens, list(how.special))
    lots, fates, words = np.moveaxis(_bits(keys, 3 * tokens.shape[1]).reshape(len(tokens), 3, -1), 1, 0)
    order = np.argsort(np.where(eligible, lots, np.uint64(WORD)), axis=1, kind="stable")
    count = eligible.sum(1)
    wanted = np.minimum(np.maximum(np.rint(count * how.share), 1), count)
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(tokens.shape[1])[None], axis=1)
    chosen = eligible & (ranks < wanted[:, None])
    fate = (fates >> np.uint64(11)) * 2.0**-53
    seen = np.where(chosen & (fate < how.masked), how.mask, tokens)
    drawn = (words % np.uint64(how.vocab_size)).astype(np.int64)
    seen = np.where(chosen & (fate >= how.masked) & (fate < how.masked + how.random), drawn, seen)
    return seen, np.where(chosen, tokens, IGNORED)


def corrupt_spans(tokens: Ids, key: int, how: SpanCorruption) -> tuple[Ids, Ids]:
    """Hide spans of one document behind sentinels, anywhere in it, but never two side by side.

    Args:
        tokens: int64 [n]; an `end` that closes it is taken off first.
        key: decides where the spans are; every cut into so many spans is as likely as any other.

    Returns: what is read, with a sentinel for each span, and what is to be written, each sentinel followed by its span;
    `end` closes both. In a document of one token nothing can be hidden: nothing is to be written, not even `end`.
    Raises DanluError where more spans are needed than there are sentinels.
    """
    if len(tokens) and tokens[-1] == how.end:
        tokens = tokens[:-1]
    end = np.array([how.end], dtype=np.int64)
    if len(tokens) < 2:
        return np.concatenate((tokens, end)), tokens[:0]
    hidden = min(max(round(len(tokens) * how.density), 1), len(tokens) - 1)
    kept = len(tokens) - hidden
    spans = min(max(round(hidden / how.length), 1), hidden, kept + 1)
    if spans > how.sentinels:
        what = f"a document of {len(tokens):,} tokens needs {spans} sentinels; there are {how.sentinels}"
        raise DanluError(what, where="span corruption", fix="shorten the rows, or hide longer spans")
    lost = _parts(hidden, spans, key_of(key, 0))
    around = _parts(kept + 2, spans + 1, key_of(key, 1))
    around[[0, -1]] -= 1  # a document may begin or end with a span
    pieces = np.split(tokens, np.stack((around[:-1], lost), 1).ravel().cumsum())
    sentinels = [np.array([how.first_sentinel - number], dtype=np.int64) for number in range(spans)]
    read = [piece for pair in zip(pieces[:-1:2], sentinels, strict=True) for piece in pair]
    written = [piece for pair in zip(sentinels, pieces[1::2], strict=True) for piece in pair]
    return np.concatenate((*read, pieces[-1], end)), np.concatenate((*written, end))


class MaskedStream:
    """The rows of a stream with tokens hidden anew each time they come: inputs and targets of masked words.

    Every token that is neither padding nor special may be hidden, whether or not a causal model would learn it.

    Args:
        stream: gives this rank's rows.
        how: see `Masking`.
        seed: decides what is hidden, together with the step and a row's place in the global batch.
        rank: the stream's, so that the same tokens are hidden on any number of ranks.
    """

    def __init__(self, stream: Batches[Batch], how: Masking, seed: int, rank: int = 0) -> None:
        self.stream, self.how, self.seed, self.rank = stream, how, seed, rank

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        whole = self.stream.batch(step)
        keys = row_keys(self.seed, step, _places(self.rank, whole))
        seen, targets = mask_tokens(whole.tokens.numpy(), whole.segments.numpy(), keys, self.how)
        return Batch(tensor(seen), tensor(targets), whole.segments, whole.positions)


class SpanStream:
    """The rows of a stream with spans hidden anew each time they come; each document of a packed row by itself.

    Args: see `MaskedStream`.
    """

    def __init__(self, stream: Batches[Batch], how: SpanCorruption, seed: int, rank: int = 0) -> None:
        self.stream, self.how, self.seed, self.rank = stream, how, seed, rank

    def batch(self, step: int) -> PairBatch:
        """The batch of a step, counted from 0; documents keep their numbers on both sides."""
        whole = self.stream.batch(step)
        keys = row_keys(self.seed, step, _places(self.rank, whole))
        rows = zip(whole.tokens.numpy(), whole.segments.numpy(), keys.tolist(), strict=True)
        read, read_segments, written, segments = zip(*(self._row(*row) for row in rows), strict=True)
        all_rows = np.arange(len(read))
        return answer(
            Ragged.of(read).padded(all_rows, 0),
            Ragged.of(read_segments).padded(all_rows, 0).astype(np.int32),
            Ragged.of(written).padded(all_rows, IGNORED),
            Ragged.of(segments).padded(all_rows, 0).astype(np.int32),
            self.how.start,
        )

    def _row(self, tokens: Ids, segments: npt.NDArray[np.int32], key: int) -> tuple[Ids, Ids, Ids, Ids]:
        """What is read of a packed row, its documents' numbers, what is to be written, and its documents' numbers."""
        numbers = np.unique(segments[segments > 0])
        made = [corrupt_spans(tokens[segments == number], key_of(key, int(number)), self.how) for number in numbers]
        sides = []
        for parts in zip(*made, strict=True) if made else [[], []]:
            sides.append(np.concatenate(parts) if parts else np.empty(0, dtype=np.int64))
            sides.append(np.repeat(numbers.astype(np.int64), [len(part) for part in parts]))
        return sides[0], sides[1], sides[2], sides[3]


def _bits(keys: Keys, count: int) -> Keys:
    """So many random words for each key, uint64 [B, count]: SplitMix64's sequence."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return mix(keys[:, None] + steps)


def _parts(total: int, count: int, key: int) -> Ids:
    """`total` cut into `count` parts of at least 1, every way as likely as any other; int64 [count]."""
    lots = _bits(np.array([key], dtype=np.uint64), total - 1)[0] if total > 1 else np.empty(0, dtype=np.uint64)
    cuts = np.sort(np.argsort(lots, kind="stable")[: count - 1]) + 1
    return np.diff(np.concatenate(([0], cuts, [total]))).astype(np.int64)


def _places(rank: int, batch: Batch) -> Ids:
    """The places of a rank's rows in the global batch, int64 [B]; every rank holds equally many."""
    return rank * len(batch.tokens) + np.arange(len(batch.tokens), dtype=np.int64)
