"""What tests of compression share."""

from __future__ import annotations

from pathlib import Path

import pytest

from danlu.model.checkpoint import Checkpoint
from tests.compress.short import make_short


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Checkpoint:
    """A small model of a trained one's weights."""
    return make_short(smollm2, tmp_path_factory.mktemp("short"))
