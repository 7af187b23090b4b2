"""Memory kept between steps, and given back after them."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told what to keep")

# In its own process: what malloc does depends on all that was allocated before.
SCRIPT = """
import resource
import torch
from danlu.train.memory import kept_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24).sum()  # 64 MB: 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1])

faults()
outside = faults()
with kept_memory():
    # glibc before 2.38 wants room for alignment too, so that a freed place is too small until it has joined another:
    # up to seven rounds fault, then none does.
    inside = sum([faults() for _ in range(40)][-10:])
    held = resident()
print(outside, inside, held - resident())
"""


def test_freed_memory_is_kept_inside_and_given_back_after() -> None:
    made = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    outside, inside, given_back = map(int, made.stdout.split())
    assert outside > 10_000, "without it the pages are touched anew each time"
    assert inside < 100
    assert given_back > 10_000
