"""What the C library does with memory that training frees."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# The names of mallopt(3), glibc's.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
KEEP = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2**26}
DEFAULT = {M_MMAP_MAX: 65536, M_TRIM_THRESHOLD: 2**17, M_TOP_PAD: 2**17}


@contextmanager
def kept_memory() -> Iterator[None]:
    """Inside, freed memory stays with the process; afterwards it goes back to the system.

    Every step allocates and frees the same tensors. By default glibc returns the large ones to the system at once, and
    the next step's first touch of each page is a fault: a tenth of a step of full tuning. Elsewhere nothing changes.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    _set(libc, KEEP)
    try:
        yield
    finally:
        _set(libc, DEFAULT)
        give_back()


def give_back() -> None:
    """Return to the system what was freed between what is still held: glibc keeps it, and does not always find it."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _set(libc: ctypes.CDLL, options: dict[int, int]) -> None:
    for option, value in options.items():
        libc.mallopt(option, value)
