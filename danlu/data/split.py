"""Which examples are held out: decided by a hash of their group or content, never by their order or the seed."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

BUCKETS = 2**16  # examples are held out or trained on by the bucket, so counting them takes constant memory


def digest(text: str) -> int:
    """64 bits of BLAKE2b: the identity of a text, whatever row or file it stands in."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def bucket(text: str) -> int:
    """The bucket of a group's name or, without groups, of an example's wording."""
    return digest(text) % BUCKETS


def choose(counts: npt.NDArray[np.int64], share: float) -> npt.NDArray[np.bool_]:
    """The buckets to hold out.

    Args:
        counts: [BUCKETS] examples in each bucket.
        share: of all examples; it is never passed, unless even the smallest bucket passes it.

    Returns: bool [BUCKETS]. Buckets are taken in their own order, which is that of a hash. Those larger than a quarter
    of what is wanted only come if the others do not suffice, so that no single big group becomes the whole test. At
    least one bucket stays on each side; where there is only one, none is held out.
    """
    filled = np.flatnonzero(counts)
    held = np.zeros(len(counts), dtype=bool)
    if share == 0 or len(filled) < 2:
        return held
    room = wanted = share * int(counts.sum())
    for largest in (wanted / 4, wanted):
        for number in filled:
            if not held[number] and counts[number] <= min(largest, room):
                held[number] = True
                room -= counts[number]
    if not held.any():
        held[filled[np.argmin(counts[filled])]] = True
    if held[filled].all():
        held[filled[np.argmax(counts[filled])]] = False
    return held
