"""The recipes' commands: what they print, leave behind and refuse, and how they stop and go on."""

from __future__ import annotations

import json
import os
import signal
from importlib import import_module
from pathlib import Path
from typing import Any

import gan
import pytest
from typer.testing import CliRunner, Result

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = ("resnet", "vae", "gan", "dqn")


def call(name: str, *words: object) -> Result:
    """`python recipes/NAME.py WORDS` in this process."""
    return CliRunner().invoke(import_module(name).app, [str(word) for word in words])


@pytest.mark.parametrize("name", NAMES)
def test_each_is_a_short_script_with_a_command(name: str) -> None:
    text = (RECIPES / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    said = call(name, "--help")
    assert said.exit_code == 0 and all(word in said.output for word in ("--out", "--steps", "--seed", "--json"))


def test_figures_are_printed_and_kept(tmp_path: Path) -> None:
    said = call("gan", "--out", tmp_path, "--steps", 4, "--json")
    assert said.exit_code == 0, said.output
    figures = json.loads(said.stdout)
    assert figures["steps"]["value"] == 4 and {"modes", "near", "seconds"} < figures.keys()
    assert json.loads((tmp_path / "figures.json").read_text(encoding="utf-8")) == figures
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and all(len(line["turns"]) == 1 for line in lines)


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = gan.Ring.batch

    def ending(self: Any, step: int) -> gan.Points:
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(gan.Ring, "batch", ending)
        said = call("gan", "--out", tmp_path, "--steps", 30, "--json")
    assert said.exit_code == 0 and json.loads(said.stdout)["steps"]["value"] == 7
    said = call("gan", "--out", tmp_path, "--steps", 30, "--json")
    assert "goes on after step 7" in said.stderr and json.loads(said.stdout)["steps"]["value"] == 30


def test_a_run_of_another_seed_is_not_resumed(tmp_path: Path) -> None:
    assert call("gan", "--out", tmp_path, "--steps", 2).exit_code == 0
    said = call("gan", "--out", tmp_path, "--steps", 4, "--seed", 1)
    assert said.exit_code == 2 and "made with seed 0, and this run has 1" in said.stderr


def test_pictures_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DANLU_DATA", str(tmp_path))
    said = call("resnet", "--out", tmp_path / "out", "--pictures", "cifar10")
    assert said.exit_code == 2 and "cifar10_jpg_10k_2k.tar.xz: is not there" in said.stderr
    assert "name the folder that holds it in DANLU_DATA" in said.stderr
    assert not (tmp_path / "out").exists()
