"""The guide to the device says nothing that does not work."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from danlu.compress.presets.settings import CompressSettings
from danlu.device.settings import CertifySettings, Target

GUIDE = (Path(__file__).parents[2] / "docs" / "device.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    [found] = re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    return str(found)


def test_its_recipe_is_valid() -> None:
    shown = yaml.safe_load(block("yaml"))
    target = Target.model_validate(shown.pop("target"))
    assert (target.memory, target.quality_loss, target.file_size) == (300_000_000, 0.05, 110_000_000)
    CompressSettings.model_validate(shown.pop("compress"))
    CertifySettings.model_validate(shown.pop("certify"))
    assert not shown


def test_its_code_runs(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copyfile(smollm2, tmp_path / "helper.gguf")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(block("python"), names)
    assert capsys.readouterr().out.strip()
    assert len(names["loss"]) == len(names["prompt"]) - 1  # type: ignore[arg-type]
