"""How fast this machine reads its memory: the ceiling of decoding, which reads every weight once a token."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from danlu.device.cores import usable_cores

LEAST = 256 * 2**20  # bytes read in one pass, unless the caches are so large that they could hold it
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def read_bandwidth(threads: int | None = None, repeats: int = 12) -> float:
    """Bytes a second that all threads together read from memory: the best of the repeats, as noise only slows it.

    Args:
        threads: reading at once; by default every physical core this process may use.
        repeats: passes over an array at least four times as large as the last-level cache.
    """
    threads = threads or usable_cores()
    numbers = max(LEAST, 4 * _last_level_cache()) // 8 // threads
    parts = [np.ones(numbers, np.int64) for _ in range(threads)]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            started = time.perf_counter()
            list(pool.map(np.add.reduce, parts))  # a sum of integers costs less than the reading, and holds no GIL
            best = min(best, time.perf_counter() - started)
    return numbers * 8 * threads / best


def _last_level_cache() -> int:
    """Bytes of the largest cache, 0 where the system does not say."""
    try:
        sizes = [(place / "size").read_text().strip() for place in CACHES.glob("index*")]
    except OSError:
        return 0
    return max((int(size[:-1]) * 2**10 for size in sizes if size.endswith("K")), default=0)
