"""Corruption: what is hidden is exactly what is asked for, as often as asked for, and by seed and step alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.data.corrupt import (
    MaskedStream,
    Masking,
    SpanCorruption,
    SpanStream,
    corrupt_spans,
    mask_tokens,
    row_keys,
)
from danlu.data.permutation import key_of
from danlu.data.stream import IGNORED, Rows, Stream
from danlu.errors import DanluError

MASK, VOCAB = 4, 1000
SPECIAL = frozenset({0, 1, 2})
HOW = Masking(MASK, VOCAB, SPECIAL)
T5 = SpanCorruption(first_sentinel=1099, end=1, start=0)


def packed(count: int, window: int = 40, seed: int = 0) -> Rows:
    """Rows of three documents between special tokens, with padding behind."""
    chance = np.random.default_rng(seed)
    tokens = chance.integers(5, VOCAB, (count, window), dtype=np.int32)
    segments = np.sort(chance.integers(1, 4, (count, window), dtype=np.int32), axis=1)
    segments[:, -5:] = 0
    tokens[segments == 0] = 0
    tokens[:, 0] = 1
    return Rows(tokens, segments, segments > 0)  # type: ignore[arg-type]


@given(rows=st.integers(1, 5), length=st.integers(1, 40), share=st.floats(0.01, 1), seed=st.integers(0, 2**63))
@settings(max_examples=60, deadline=None)
def test_just_so_many_words_are_asked_for(rows: int, length: int, share: float, seed: int) -> None:
    chance = np.random.default_rng(seed)
    tokens = chance.integers(0, 9, (rows, length))
    segments = chance.integers(0, 2, (rows, length)).astype(np.int32)
    keys = row_keys(seed, 3, np.arange(rows))
    seen, targets = mask_tokens(tokens, segments, keys, Masking(MASK, VOCAB, SPECIAL, share))
    eligible = (segments > 0) & ~np.isin(tokens, [0, 1, 2])
    asked = targets != IGNORED
    expected = [min(max(1, np.rint(share * count)), count) for count in eligible.sum(1)]
    assert asked.sum(1).tolist() == expected
    assert not (asked & ~eligible).any()
    assert (targets[asked] == tokens[asked]).all() and (seen[~asked] == tokens[~asked]).all()
    alone = mask_tokens(tokens[-1:], segments[-1:], keys[-1:], Masking(MASK, VOCAB, SPECIAL, share))
    assert (alone[0] == seen[-1]).all() and (alone[1] == targets[-1]).all()


def test_the_shares_are_those_of_bert_and_every_place_is_as_likely() -> None:
    rows, length = 4000, 20
    tokens = np.full((rows, length), 7)
    seen, targets = mask_tokens(tokens, np.ones((rows, length), dtype=np.int32), row_keys(1, 0, np.arange(rows)), HOW)
    asked = targets != IGNORED
    total = rows * 3  # 15 % of 20
    assert asked.sum() == total
    for share, found in ((0.8, seen[asked] == MASK), (0.1, seen[asked] == 7), (0.1, ~np.isin(seen[asked], [MASK, 7]))):
        assert abs(found.sum() - share * total) < 5 * (share * (1 - share) * total) ** 0.5
    random = seen[asked & (seen != MASK) & (seen != 7)]
    assert len(np.unique(random)) > 400 and random.min() >= 0 and random.max() < VOCAB
    expected = total / length
    assert ((asked.sum(0) - expected) ** 2 / expected).sum() < 19 + 5 * 38**0.5


def test_a_key_is_the_one_of_its_numbers() -> None:
    assert row_keys(9, 4, np.array([0, 3, 70])).tolist() == [key_of(9, 4, place) for place in (0, 3, 70)]


@pytest.mark.parametrize("kind", [MaskedStream, SpanStream])
def test_any_number_of_ranks_sees_the_same_and_each_pass_hides_anew(kind: type) -> None:
    rows = packed(6)
    how = HOW if kind is MaskedStream else T5
    alone = kind(Stream(rows, 6, 0), how, 5)
    shares = [kind(Stream(rows, 6, 0, rank, 2), how, 5, rank).batch(11) for rank in range(2)]
    whole = alone.batch(11)
    learned = [part.targets[part.targets != IGNORED].tolist() for part in (whole, *shares)]
    assert learned[0] == learned[1] + learned[2] and sum(part.count for part in shares) == whole.count > 0
    read = [part.tokens[part.segments > 0].tolist() for part in (whole, *shares)]
    assert read[0] == read[1] + read[2]
    assert learned[0] == alone.batch(11).targets[whole.targets != IGNORED].tolist()
    # The same six rows a pass later: as many words are hidden, but others.
    later = alone.batch(12)
    assert sorted(later.targets[later.targets != IGNORED].tolist()) != sorted(learned[0])
    other = kind(Stream(rows, 6, 0), how, 6).batch(11)
    assert other.targets[other.targets != IGNORED].tolist() != learned[0]


def restored(read: np.ndarray, written: np.ndarray, first: int = 1099) -> list[int]:
    """The document that was cut apart: each span back in the place of its sentinel."""
    spans: dict[int, list[int]] = {}
    for token in written[:-1].tolist():
        if token > first - 100:
            spans[token] = current = []
        else:
            current.append(token)
    assert all(spans.values()) and list(spans) == [first - number for number in range(len(spans))]
    whole: list[int] = []
    for token in read[:-1].tolist():
        whole += spans.pop(token) if token in spans else [token]
    assert not spans
    return whole


@given(length=st.integers(2, 300), key=st.integers(0, 2**64 - 1), density=st.floats(0.05, 0.6), mean=st.floats(1, 10))
@settings(max_examples=100, deadline=None)
def test_spans_go_back_into_their_places(length: int, key: int, density: float, mean: float) -> None:
    tokens = np.arange(5, 5 + length)
    how = SpanCorruption(1099, 1, sentinels=300, density=density, length=mean)
    read, written = corrupt_spans(tokens, key, how)
    assert read[-1] == written[-1] == 1
    sentinels = int((written > 799).sum())
    hidden = min(max(round(length * density), 1), length - 1)
    assert len(written) == hidden + sentinels + 1 and len(read) == length - hidden + sentinels + 1
    assert sentinels == min(max(round(hidden / mean), 1), hidden, length - hidden + 1)
    back = np.concatenate((read[:-1], [0]))
    assert not ((back[1:] > 799) & (back[:-1] > 799)).any()  # between two spans something is kept
    if sentinels <= 100:
        assert restored(read, written) == tokens.tolist()


def test_the_lengths_are_those_of_the_paper() -> None:
    """568 tokens become an input of 512 and a target of 114, as T5 was trained."""
    read, written = corrupt_spans(np.arange(5, 573), 1, T5)
    assert (len(read), len(written)) == (512, 114)


def test_every_cut_is_as_likely() -> None:
    """Of six tokens three are hidden in two spans: two ways to cut them, and six places where the two can stand."""
    how = SpanCorruption(1099, 1, density=0.5, length=1.5)
    found = Counter(tuple(corrupt_spans(np.arange(5, 11), key, how)[0].tolist()) for key in range(2400))
    assert len(found) == 12 and max(abs(count - 200) for count in found.values()) < 5 * (200 * 11 / 12) ** 0.5


def test_documents_of_a_packed_row_are_hidden_apart() -> None:
    rows = packed(5, seed=3)
    batch = SpanStream(Stream(rows, 5, 0), T5, 8).batch(0)
    plain = Stream(rows, 5, 0).batch(0)
    assert batch.tokens.shape[1] % 8 == 0 and batch.targets.shape == batch.written.shape == batch.written_segments.shape
    for row in range(5):
        for number in plain.segments[row][plain.segments[row] > 0].unique().tolist():
            read = batch.tokens[row][batch.segments[row] == number].numpy()
            own = batch.written_segments[row] == number
            document = plain.tokens[row][plain.segments[row] == number].tolist()
            if len(document) < 2:
                assert not own.any()
                continue
            assert restored(read, batch.targets[row][own].numpy()) == document
            assert batch.written[row][own].tolist() == [0, *batch.targets[row][own].tolist()[:-1]]
    assert (batch.targets[batch.written_segments == 0] == IGNORED).all()
    assert batch.size == int((batch.segments > 0).sum()) + batch.count


def test_nothing_can_be_hidden_in_one_token_and_an_end_is_not_doubled() -> None:
    read, written = corrupt_spans(np.array([9]), 0, T5)
    assert read.tolist() == [9, 1] and not len(written)
    read, written = corrupt_spans(np.array([9, 8, 7, 1]), 0, T5)
    assert read.tolist().count(1) == written.tolist().count(1) == 1


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(DanluError, match="needs 10 sentinels; there are 4"):
        corrupt_spans(np.arange(5, 205), 0, SpanCorruption(1099, 1, sentinels=4))
    with pytest.raises(DanluError, match="100 sentinels cannot be counted down from id 50"):
        SpanCorruption(50, 1)
    with pytest.raises(DanluError, match="density 1"):
        SpanCorruption(1099, 1, density=1)
    with pytest.raises(DanluError, match="mask 1000 is none of the 1,000 words"):
        Masking(1000, 1000, SPECIAL)
    with pytest.raises(DanluError, match="must be shares"):
        Masking(4, 1000, SPECIAL, masked=0.9, random=0.2)
