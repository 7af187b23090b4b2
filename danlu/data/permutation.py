"""A shuffle that needs no memory: each place of a permutation of any size can be computed on its own."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

ROUNDS = 6
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: the increment of SplitMix64
WORD = 2**64 - 1


def mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finisher (Steele et al., OOPSLA 2014): spreads each value over all 64 bits; a bijection."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def key_of(*numbers: int) -> int:
    """One 64-bit key from several numbers, say a seed and an epoch; their order matters."""
    key = 0
    for number in numbers:
        key = int(mix(np.array([(key + GOLDEN + number) & WORD], dtype=np.uint64))[0])
    return key


def permute(places: npt.NDArray[np.int64], size: int, key: int) -> npt.NDArray[np.int64]:
    """Where a keyed permutation of 0 .. size - 1 sends the given places. The same on every machine and numpy.

    A Feistel network shuffles the next power of four; what falls outside is sent through again until it falls inside
    (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002).
    """
    half = np.uint64(max(3, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    keys = mix(np.array([(key + GOLDEN * number) & WORD for number in range(ROUNDS)], dtype=np.uint64))
    found = places.astype(np.uint64)
    walking = np.arange(len(found))
    while len(walking):
        left, right = found[walking] >> half, found[walking] & low
        for round_key in keys:
            left, right = right, left ^ (mix(right + round_key) & low)
        found[walking] = (left << half) | right
        walking = walking[found[walking] >= size]
    return found.astype(np.int64)


def shuffled(
    draws: npt.NDArray[np.int64], size: int, seed: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Draws, counted from 0 over all epochs -> the epoch of each and which of `size` rows it takes; both int64 [B].

    Each epoch has every row once, in an order of its own; without a seed all have them as they stand.
    """
    epochs, places = np.divmod(draws, size)
    if seed is None:
        return epochs, places
    rows = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = permute(places[here], size, key_of(seed, int(epoch)))
    return epochs, rows
