"""Where tables of measured runs lie, for tests that read them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

TABLES = Path(os.environ.get("DANLU_PLANNER", "../shared/planner"))
needs_tables = pytest.mark.skipif(not TABLES.is_dir(), reason=f"{TABLES} with measured runs is absent")
