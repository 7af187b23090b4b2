"""What README.md says of learning again runs as it stands there, with one plain text, on a model small enough."""

from __future__ import annotations

import contextlib
import itertools
import json
import shlex
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from bench.small_models import Small, train_small
from danlu.artifact import CARD
from danlu.cli import app
from danlu.compress.learning.shapes import Device
from danlu.device.budget import read_size
from danlu.model.checkpoint import Checkpoint
from danlu.model.gguf import keys_bytes
from danlu.train.objectives.elastic import parts_of
from danlu.train.recipe import ElasticSettings
from tests.compress.short import TEXT

README = Path(__file__).parents[3] / "README.md"
SMALLER = {"--layer": "1", "--layers": "1", "--channels": "32", "--memory": "1MB", "--steps": "2"}
MODELS = ("pruned", "runs/python-helper")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """docs.txt, and a model of two blocks that llama.cpp can read."""
    home = tmp_path_factory.mktemp("documented")
    (home / "docs.txt").write_text(TEXT, encoding="utf-8")
    small = Small(layers=2, width=64, heads=4, kv_heads=2, channels=64, context=32)
    train_small(small, home / "docs.txt", 2, home / "base", vocabulary={"kind": "bpe", "size": 300})
    return home


def written(command: str) -> list[str]:
    """The words of the line of README.md."""
    start = f"danlu compress {command} "
    [line] = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith(start)]
    return shlex.split(line, comments=True)[1:]


def documented(command: str) -> list[str]:
    """The same, its models and numbers made small."""
    words = written(command)
    made = [SMALLER.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    return ["base/model" if word in MODELS else word for word in made]


def run(home: Path, words: list[str]) -> Result:
    with contextlib.chdir(home):
        return CliRunner().invoke(app, words, prog_name="danlu")


@pytest.mark.parametrize("command", ["distill", "exits", "shape", "elastic"])
def test_a_line_of_the_readme_runs_with_one_plain_text(home: Path, command: str) -> None:
    if command == "elastic":
        pytest.importorskip("llama_cpp", reason="the extra danlu[device] is not installed")
    words = documented(command) + ["--threads", "1"] * (command == "elastic")
    out = home / words[words.index("--out") + 1]
    text = words.index("docs.txt")

    # Settings that are wrong leave nothing behind that right ones would be held to.
    refused = run(home, [*words, "--heldout-from", "documents"])
    assert refused.exit_code == 2 and "nothing could be held out of 1 texts" in refused.stderr
    assert "--heldout-from end" in refused.stderr and not out.exists()
    (home / "short.txt").write_text(TEXT[:900], encoding="utf-8")
    refused = run(home, [*words[:text], "short.txt", *words[text + 1 :]])
    assert refused.exit_code == 2 and "--rows" in refused.stderr and not out.exists()

    ended = run(home, words)
    assert ended.exit_code == 0, ended.stderr
    assert json.loads((out / CARD).read_text())["kind"] == command


def test_the_readmes_limit_can_be_kept_to_by_the_readmes_model(smollm2: Path) -> None:
    model, words = Checkpoint.open(smollm2), written("shape")
    said = dict(itertools.pairwise(words))
    parts = parts_of(
        model.config, ElasticSettings(layers=(int(said["--layers"]),), channels=(int(said["--channels"]),))
    )
    device = Device(memory=read_size(said["--memory"]), keys=keys_bytes(model.config, model.tokenizer))
    assert [device.allows(part) for part in parts] == [True, False, False, False]
