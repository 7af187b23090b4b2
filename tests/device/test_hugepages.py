"""Moving buffers onto large pages keeps their content, and does happen where Linux allows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from danlu.device import hugepages
from danlu.device.hugepages import PAGE, huge_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def on_large_pages() -> int:
    """Bytes of this process on large pages."""
    return int(Path("/proc/self/smaps_rollup").read_text().split("AnonHugePages:")[1].split()[0]) * 1024


def test_the_content_stays() -> None:
    with huge_pages():
        filled = np.arange(3 * PAGE // 8 + 5)
    assert (filled == np.arange(filled.size)).all()


@pytest.mark.skipif(
    not SETTING.is_file() or "[never]" in SETTING.read_text(), reason="this system has no transparent large pages"
)
def test_large_buffers_move() -> None:
    before = on_large_pages()
    with huge_pages():
        filled = np.ones(16 * PAGE, np.uint8)
    assert on_large_pages() - before > 8 * PAGE
    assert filled.sum() == filled.size


def test_a_system_that_does_not_say_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hugepages, "MAPS", tmp_path / "absent")
    with huge_pages():
        filled = np.ones(2 * PAGE, np.uint8)
    assert filled.all()
