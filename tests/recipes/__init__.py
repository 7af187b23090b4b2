"""Tests of the recipes that are scripts; these import one another as scripts do, from their own folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
