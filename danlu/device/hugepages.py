"""Large pages for large buffers, where Linux gives them only to those who ask.

Decoding reads every weight once a token; on 4 KiB pages part of that time goes into looking addresses up. On a 135M
model 2 MiB pages make decoding about a tenth faster (bench/decode.py), for 0.05 s more of loading.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # linux/mman.h; the second, since Linux 6.1, moves what lies there already
PAGE = 2 * 2**20  # bytes
MAPS = Path("/proc/self/maps")


@contextmanager
def huge_pages() -> Iterator[None]:
    """Move the large buffers allocated inside onto large pages; where the system has none to give, nothing happens.

    Found is what was mapped anew. A buffer that malloc puts where something else was freed before is not found, so
    this is for processes that load a model first, as those that serve and measure do.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    before = _buffers()
    yield
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, end in _buffers() - before:
        advise(start, end - start, MADV_HUGEPAGE)
        for place in range(-(-start // PAGE) * PAGE, end - PAGE + 1, PAGE):
            advise(place, PAGE, MADV_COLLAPSE)  # one by one: the first that cannot be moved would end a longer request


def _buffers() -> set[tuple[int, int]]:
    """(start, end) of this process's private memory that belongs to no file, from 2 MiB; see proc_pid_maps(5)."""
    try:
        lines = [line.split() for line in MAPS.read_text().splitlines()]
    except OSError:
        return set()
    places = [words[0].split("-") for words in lines if words[1] == "rw-p" and words[4] == "0"]
    found = {(int(start, 16), int(end, 16)) for start, end in places}
    return {(start, end) for start, end in found if end - start >= PAGE}
