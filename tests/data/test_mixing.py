"""Mixtures and curricula: exact shares, each row once an epoch, the same rows on any number of ranks, any stop."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.data.mixing import Curriculum, MixtureStream, Packed, Turns, growing, shortest_first
from danlu.data.stream import Batch, Rows, Stream
from danlu.errors import DanluError
from tests.data.test_stream import make_rows

WEIGHTS = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=7)


def numbered(count: int, first: int, window: int = 4) -> Rows:
    """Rows that hold their own number, counted from `first`."""
    tokens = np.repeat(np.arange(first, first + count, dtype=np.int32)[:, None], window, axis=1)
    return Rows(tokens, np.ones_like(tokens), np.ones(tokens.shape, dtype=bool))  # type: ignore[arg-type]


def names(batch: Batch) -> list[int]:
    return batch.tokens[:, 0].tolist()


def same(one: Batch, other: Batch) -> bool:
    pairs = zip(columns(one), columns(other), strict=True)
    return all(mine.dtype == theirs.dtype and torch.equal(mine, theirs) for mine, theirs in pairs)


def columns(batch: Batch) -> list[torch.Tensor]:
    return [batch.tokens, batch.targets, batch.segments, batch.positions]


@given(WEIGHTS)
@settings(max_examples=60, deadline=None)
def test_turns_are_counted_right_and_shares_are_exact(weights: list[float]) -> None:
    turns = Turns(weights)
    assert sum(turns.shares) == 1
    counts = [0] * len(weights)
    bound = 1 if len(weights) <= 3 else 2
    for draw in range(120):
        assert turns.before(draw) == counts
        assert all(abs(count - draw * share) < bound for count, share in zip(counts, turns.shares, strict=True))
        source, number = turns.of(draw)
        assert number == counts[source]
        counts[source] += 1


@given(WEIGHTS, st.integers(0, 10**15))
@settings(max_examples=60, deadline=None)
def test_any_turn_is_known_at_once(weights: list[float], draw: int) -> None:
    turns = Turns(weights)
    before, after = turns.before(draw), turns.before(draw + 1)
    source, number = turns.of(draw)
    assert sum(before) == draw and before[source] == number
    assert [two - one for one, two in zip(before, after, strict=True)] == [n == source for n in range(len(weights))]
    assert all(abs(count - draw * share) < 2 for count, share in zip(before, turns.shares, strict=True))


@given(
    sizes=st.lists(st.integers(8, 40), min_size=1, max_size=4),
    world=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    weighed=st.booleans(),
    step=st.integers(0, 10_000),
)
@settings(max_examples=50, deadline=None)
def test_any_world_any_stop(sizes: list[int], world: int, seed: int, weighed: bool, step: int) -> None:
    def make(rank: int, ranks: int) -> MixtureStream:
        sources = {f"set {n}": Packed(numbered(size, 1000 * n), seed + n) for n, size in enumerate(sizes)}
        weights = {f"set {n}": 1.0 + n for n in range(len(sizes))} if weighed else None
        return MixtureStream(sources, batch_rows, weights, rank, ranks)

    batch_rows = 2 * world
    whole = make(0, 1)
    batch = whole.batch(step)
    assert names(batch) == [name for rank in range(world) for name in names(make(rank, world).batch(step))]
    whole.batch(step + 3)
    assert same(batch, make(0, 1).batch(step)) and same(batch, whole.batch(step))


@given(st.lists(st.integers(12, 30), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_each_data_set_goes_through_its_rows_without_repetition(sizes: list[int], seed: int) -> None:
    sources = {f"{n}": Packed(numbered(size, 1000 * n), seed) for n, size in enumerate(sizes)}
    stream = MixtureStream(sources, 12, {f"{n}": 2.0**-n for n in range(len(sizes))})
    drawn = [name for step in range(20) for name in names(stream.batch(step))]
    for number, size in enumerate(sizes):
        mine = [name - 1000 * number for name in drawn if name // 1000 == number]
        for epoch in range(len(mine) // size):
            assert sorted(mine[epoch * size : (epoch + 1) * size]) == list(range(size))
        rest = mine[len(mine) // size * size :]
        assert len(set(rest)) == len(rest)
        assert stream.epochs(20)[f"{number}"] == len(mine) / size


def test_without_weights_all_are_gone_through_equally_often() -> None:
    stream = MixtureStream({"small": Packed(numbered(10, 0), 0), "large": Packed(numbered(90, 1000), 0)}, 10)
    drawn = Counter(name for step in range(30) for name in names(stream.batch(step)))
    assert len(drawn) == 100 and set(drawn.values()) == {3}
    assert stream.epochs(30) == {"small": 3.0, "large": 3.0}


class Weighed(Packed):
    """Rows whose targets count differently."""

    def batch(self, draws: npt.NDArray[np.int64]) -> Batch:
        drawn = super().batch(draws)
        return replace(drawn, weights=drawn.tokens / 2000)


def test_weights_of_targets_stay_with_their_rows() -> None:
    plain, weighed = Packed(numbered(30, 0), 0), Weighed(numbered(30, 1000), 0)
    batch = MixtureStream({"plain": plain, "weighed": weighed}, 12, {"plain": 1.0, "weighed": 2.0}).batch(1)
    assert batch.weights is not None and set(names(batch)) & {*range(30)} and set(names(batch)) - {*range(30)}
    assert batch.weights.equal(torch.where(batch.tokens < 1000, 1.0, batch.tokens / 2000))
    assert MixtureStream({"plain": plain}, 4).batch(0).weights is None


def test_one_packed_data_set_is_drawn_as_a_stream_draws_it() -> None:
    rows = make_rows(37)
    mine, theirs = MixtureStream({"rows": Packed(rows, seed=5)}, 8), Stream(rows, 8, seed=5)
    assert all(same(mine.batch(step), theirs.batch(step)) for step in (0, 4, 5, 90))


def test_the_first_epoch_goes_from_short_to_long() -> None:
    rows = make_rows(50, seed=3)
    order = shortest_first(rows)
    lengths = [max(Counter(row[row > 0].tolist()).values(), default=0) for row in np.asarray(rows.segments)[order]]
    assert sorted(order.tolist()) == list(range(50)) and lengths == sorted(lengths) and lengths[0] < lengths[-1]
    stream = MixtureStream({"rows": Packed(rows, 0, first=order)}, 10)
    drawn = [name for step in range(10) for name in names(stream.batch(step))]
    assert drawn[:50] == order.tolist() != drawn[50:] and sorted(drawn[50:]) == list(range(50))
    with pytest.raises(DanluError, match="does not hold each of 50 rows once"):
        Packed(rows, 0, first=order[:-1])


def test_windows_grow_and_steps_stay_equally_large() -> None:
    def make(window: int, batch_rows: int) -> MixtureStream:
        return MixtureStream({"rows": Packed(numbered(60, 100 * window, window), 0)}, batch_rows)

    stream = growing([(0, 4), (10, 8), (12, 16)], 64, make)
    shapes = [tuple(stream.batch(step).tokens.shape) for step in (0, 9, 10, 11, 12, 99)]
    assert shapes == [(16, 4), (16, 4), (8, 8), (8, 8), (4, 16), (4, 16)]
    assert all(stream.batch(step).size == 64 for step in (0, 9, 10, 99))
    assert same(stream.batch(11), make(8, 8).batch(1))
    with pytest.raises(DanluError, match="64 tokens a step cannot be cut into windows of 24"):
        growing([(0, 24)], 64, make)
    for wrong in ([], [(1, make(4, 1))], [(0, make(4, 1)), (0, make(8, 1))]):
        with pytest.raises(DanluError, match="begin at steps"):
            Curriculum(wrong)


def test_impossible_mixtures_are_refused() -> None:
    one, other = Packed(numbered(8, 0), 0), Packed(numbered(8, 0, window=8), 0)
    with pytest.raises(DanluError, match="4 rows a step cannot be shared by 3"):
        MixtureStream({"a": one}, 4, rank=0, world=3)
    with pytest.raises(DanluError, match="rank 2 is not one of 2"):
        MixtureStream({"a": one}, 4, rank=2, world=2)
    with pytest.raises(DanluError, match="no data sets"):
        MixtureStream({}, 4)
    with pytest.raises(DanluError, match="weights for b, and data sets a"):
        MixtureStream({"a": one}, 4, {"b": 1.0})
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(DanluError, match="a: the weight"):
            MixtureStream({"a": one}, 4, {"a": weight})
    with pytest.raises(DanluError, match="different lengths cannot be mixed: a 4, b 8"):
        MixtureStream({"a": one, "b": other}, 4)
    with pytest.raises(DanluError, match="a: 8 rows are fewer than the 9 that a batch of 12 takes"):
        MixtureStream({"a": one, "b": one}, 12, {"a": 3.0, "b": 1.0})
    with pytest.raises(DanluError, match="no rows"):
        Packed(numbered(0, 0), 0)
