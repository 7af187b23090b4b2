"""Moving buffers onto large pages keeps their content, and does happen where Linux allows it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from danlu.device import hugepages
from danlu.device.hugepages import PAGE, huge_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


FRESH = """
import numpy as np
from pathlib import Path
from danlu.device.hugepages import PAGE, huge_pages
with huge_pages():
    filled = np.ones(16 * PAGE, np.uint8)
assert filled.all()
print(Path("/proc/self/smaps_rollup").read_text().split("AnonHugePages:")[1].split()[0])
"""


def test_the_content_stays() -> None:
    with huge_pages():
        filled = np.arange(3 * PAGE // 8 + 5)
    assert (filled == np.arange(filled.size)).all()


@pytest.mark.skipif(
    not SETTING.is_file() or "[never]" in SETTING.read_text(), reason="this system has no transparent large pages"
)
def test_large_buffers_move() -> None:
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 >= PAGE, "how many depends on how scattered the machine's free memory is"


def test_a_system_that_does_not_say_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hugepages, "MAPS", tmp_path / "absent")
    with huge_pages():
        filled = np.ones(2 * PAGE, np.uint8)
    assert filled.all()
