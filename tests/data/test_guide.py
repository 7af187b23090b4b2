"""The guide to data says nothing that does not work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from danlu.data.build import build_data
from danlu.data.duplicates import PERMUTATIONS
from danlu.data.formats import LOOKED_AT, NAMES
from danlu.data.settings import DataSettings
from danlu.data.sources import READERS
from danlu.tokenizer import Tokenizer

GUIDE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


def test_its_recipes_are_valid() -> None:
    found = [DataSettings.model_validate(yaml.safe_load(block)["data"]) for block in blocks("yaml")]
    assert len(found) == 2 and found[1].sources[0].columns["group"] == "部门"


def test_its_code_runs(
    smollm: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(f'{{"prompt": "number {n}", "completion": "answer {n * n}"}}\n' for n in range(200))
    (tmp_path / "rows.jsonl").write_text(rows)
    out = tmp_path / "runs/my-run/data"
    out.mkdir(parents=True)
    build_data(DataSettings.model_validate({"sources": str(tmp_path / "rows.jsonl")}), smollm, out, seed=0)
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(code, {})
    assert re.fullmatch(r"torch\.Size\(\[4, 512\]\) \d+ tokens to learn\n", capsys.readouterr().out)


def test_it_names_everything() -> None:
    assert all(suffix in GUIDE for suffix in READERS)
    assert all(f"`{name}`" in GUIDE for name in NAMES)
    assert f"first {LOOKED_AT} readable rows" in GUIDE and f"{PERMUTATIONS} hashes" in GUIDE
