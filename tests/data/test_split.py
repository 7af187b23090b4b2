"""Which buckets are held out: whole ones, about the share asked for, none so big that it is the whole test."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.data.split import BUCKETS, bucket, choose


@given(
    st.dictionaries(st.integers(0, BUCKETS - 1), st.integers(1, 50), max_size=60),
    st.floats(0, 0.99, exclude_max=True),
)
@settings(max_examples=60, deadline=None)
def test_a_share_of_whole_buckets_is_held_out(filled: dict[int, int], share: float) -> None:
    counts = np.zeros(BUCKETS, dtype=np.int64)
    for number, count in filled.items():
        counts[number] = count
    held = choose(counts, share)
    taken = int(counts[held].sum())
    if share == 0 or len(filled) < 2:
        assert not taken
    else:
        assert 0 < taken < counts.sum()
        assert taken <= max(share * counts.sum(), min(filled.values()))


def test_the_share_is_met_closely() -> None:
    counts = np.bincount([bucket(f"row {number}") for number in range(20_000)], minlength=BUCKETS)
    assert counts[choose(counts, 0.05)].sum() == 1000


def test_no_single_group_is_the_whole_test() -> None:
    counts = np.zeros(BUCKETS, dtype=np.int64)
    counts[0], counts[1:101] = 95, 10
    held = choose(counts, 0.1)
    assert not held[0] and counts[held].sum() == 100
    assert choose(np.array([60, 40]), 0.5).tolist() == [False, True]  # nothing smaller is there
