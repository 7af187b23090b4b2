"""Batches: a pure function of seed and step, every row once an epoch, targets that never cross a document."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.data.permutation import key_of, permute
from danlu.data.stream import IGNORED, Rows, Stream, make_batch
from danlu.errors import DanluError

WINDOW = 8


def make_rows(count: int, seed: int = 0) -> Rows:
    """Rows of random documents, the first token of each row its own number."""
    chance = np.random.default_rng(seed)
    tokens = chance.integers(1, 1000, (count, WINDOW), dtype=np.int32)
    tokens[:, 0] = np.arange(count)
    segments = np.sort(chance.integers(0, 3, (count, WINDOW), dtype=np.int32), axis=1) + 1
    segments[:, -1] = 0
    return Rows(tokens, segments, chance.random((count, WINDOW)) < 0.5)  # type: ignore[arg-type]


@given(size=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permutation_is_one(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@given(size=st.integers(1, 10**12), place=st.integers(0, 10**12), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_a_place_is_computed_alone(size: int, place: int, key: int) -> None:
    place %= size
    one = permute(np.array([place]), size, key)
    assert 0 <= one[0] < size
    assert permute(np.array([0, place, size - 1]), size, key)[1] == one[0]


def test_permutation_spreads_evenly() -> None:
    size, tries = 10, 1500
    landed = np.zeros((size, size))
    for seed in range(tries):
        landed[np.arange(size), permute(np.arange(size), size, key_of(seed))] += 1
    expected = tries / size
    chi_square = ((landed - expected) ** 2 / expected).sum()
    assert chi_square < 81 + 5 * (2 * 81) ** 0.5  # 81 degrees of freedom, five standard deviations


@given(
    rows=st.integers(1, 40),
    batch=st.integers(1, 12),
    world=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    first=st.integers(0, 200),
)
@settings(max_examples=80, deadline=None)
def test_every_row_once_an_epoch_on_any_number_of_ranks(
    rows: int, batch: int, world: int, seed: int, first: int
) -> None:
    data, batch = make_rows(rows), batch * world
    alone = Stream(data, batch, seed)
    drawn = np.concatenate([alone.indices(step) for step in range(-(-3 * rows // batch))])
    for epoch in range(3):
        assert sorted(drawn[epoch * rows : (epoch + 1) * rows].tolist()) == list(range(rows))
    shares = [Stream(data, batch, seed, rank, world).indices(first) for rank in range(world)]
    assert np.concatenate(shares).tolist() == alone.indices(first).tolist()


def test_batch_is_a_pure_function() -> None:
    data = make_rows(13)
    one, other = Stream(data, 4, seed=7), Stream(data, 4, seed=7)
    later = one.batch(20).tokens
    for step in (3, 20, 0):
        assert one.batch(step).tokens.equal(other.batch(step).tokens)
    assert one.batch(20).tokens.equal(later)
    assert not np.array_equal(one.indices(20), Stream(data, 4, seed=8).indices(20))


def test_epochs_differ_in_order() -> None:
    stream = Stream(make_rows(50), 50, seed=1)
    orders = {tuple(stream.indices(epoch).tolist()) for epoch in range(5)}
    assert len(orders) == 5


@given(seed=st.integers(0, 1000), count=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_targets_and_positions(seed: int, count: int) -> None:
    data = make_rows(count, seed)
    batch = make_batch(data, range(count))
    for row in range(count):
        for at in range(WINDOW):
            segment, follows = data.segments[row, at], at + 1 < WINDOW
            learned = follows and data.segments[row, at + 1] == segment != 0 and data.trained[row, at + 1]
            assert batch.targets[row, at] == (data.tokens[row, at + 1] if learned else IGNORED)
            starts = at == 0 or data.segments[row, at - 1] != segment
            assert batch.positions[row, at] == (0 if starts else batch.positions[row, at - 1] + 1)
    assert batch.count == sum(part.count for part in batch.split(count))
    assert Counter(str(value.dtype) for value in vars(batch).values() if hasattr(value, "dtype")) == {
        "torch.int64": 3,
        "torch.int32": 1,
    }


def test_a_batch_is_cut_along_rows() -> None:
    batch = make_batch(make_rows(5), [4, 0, 2])
    assert [part.tokens[:, 0].tolist() for part in batch.split(2)] == [[4, 0], [2]]
    assert batch.to("cpu").tokens.equal(batch.tokens)
    with pytest.raises(DanluError, match="3 rows cannot be cut into 4 parts"):
        batch.split(4)


def test_impossible_streams_are_refused(tmp_path: Path) -> None:
    data = make_rows(4)
    with pytest.raises(DanluError, match="cannot be shared by 3 processes"):
        Stream(data, 4, 0, 0, 3)
    with pytest.raises(DanluError, match="rank 2 is not one of 2"):
        Stream(data, 4, 0, 2, 2)
    with pytest.raises(DanluError, match="no rows"):
        Stream(make_rows(0), 4, 0)
    with pytest.raises(DanluError, match="cannot be read as packed rows"):
        Rows.open(tmp_path)
