"""Settings: short forms are understood, contradictions refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from danlu.data.settings import DataSettings, Source


def test_short_forms() -> None:
    for short in ("a.jsonl", ["a.jsonl"], {"path": "a.jsonl"}, [{"path": "a.jsonl"}], Path("a.jsonl")):
        settings = DataSettings.model_validate({"sources": short})
        assert settings.sources == (Source(path="a.jsonl"),)
    assert DataSettings.model_validate({"sources": "x", "heldout": "5%"}).heldout == 0.05
    assert DataSettings.model_validate(settings.plain()) == settings


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"sources": []},
        {"sources": ""},
        {"sources": "x", "heldout": 1},
        {"sources": "x", "window": 0},
        {"sources": "x", "similarity": 0.2},
        {"sources": "x", "deduplicate": "fuzzy"},
        {"sources": {"path": "x", "format": "excel"}},
        {"sources": {"path": "x", "limit": 0}},
        {"sources": {"path": "x", "columns": {"prompt": "a"}}},
        {"sources": {"path": "x", "columns": {"prompt": 0, "completion": 1}}},
        {"sources": {"path": "x", "columns": {"question": "a"}}},
        {"sources": "x", "minimum_characters": 9, "maximum_characters": 5},
        {"sources": "x", "shuffle": True},
    ],
)
def test_mistakes_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DataSettings.model_validate(values)


def test_relative_paths_start_beside_the_recipe(tmp_path: Path) -> None:
    paths = ["rows.jsonl", "hub:owner/name", "python-docs", "/abs/rows.jsonl"]
    moved = DataSettings.model_validate({"sources": paths}).beside(tmp_path)
    assert [source.path for source in moved.sources] == [str(tmp_path / "rows.jsonl"), *paths[1:]]
