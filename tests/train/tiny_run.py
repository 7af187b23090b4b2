"""A run so small that it ends in a second, by the command that people give."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from danlu.cli import app

RECIPE = """
name: tiny
model:
  architecture: LlamaForCausalLM
  shape: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2,
          intermediate_size: 48, max_position_embeddings: 32}
data: {sources: text.txt, vocabulary: bytes, heldout: 10%, heldout_from: end}
batch: {rows: 8, window: 32}
steps: 12
optimizer: {learning_rate: 3e-3}
precision: fp32
checkpoints: {every: 5}
validation: {every: 6, rows: 16}
"""


def write_recipe(home: Path) -> Path:
    """The recipe, beside its text."""
    chance = random.Random(5)
    words = ("the", "furnace", "丹炉", "turns", "ore", "into", "silver", "and", "gold,", "slowly;", "nobody", "hurries")
    (home / "text.txt").write_text(" ".join(chance.choice(words) for _ in range(20_000)), encoding="utf-8")
    (home / "tiny.yaml").write_text(RECIPE, encoding="utf-8")
    return home / "tiny.yaml"


def command(recipe: Path, out: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "danlu", "train", str(recipe), "--out", str(out), *words]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(recipe: Path, out: Path, *words: str, code: int = 0, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    line = command(recipe, out, *words)
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=timeout)
    assert done.returncode == code, done.stderr[-4000:]
    return done


def here(recipe: Path, out: Path, *words: str, code: int = 0) -> str:
    """What the command says in this process, for what ends before it trains."""
    ended = CliRunner().invoke(app, command(recipe, out, *words)[3:], prog_name="danlu")
    assert ended.exit_code == code, ended.output
    return ended.output


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_curve(mine: Path, expected: Path) -> None:
    """Two runs have seen the same batches, and their losses agree within 1e-5."""
    for ours, theirs in zip(metrics(mine), metrics(expected), strict=True):
        assert ours["batch"] == theirs["batch"] and abs(ours["loss"] - theirs["loss"]) < 1e-5


def curve(out: Path) -> list[tuple[Any, ...]]:
    names = ("step", "loss", "gradient_norm", "learning_rate", "batch", "validation")
    return [tuple(line.get(name) for name in names) for line in metrics(out)]


def newest(out: Path) -> int:
    return max((int(folder.name.split("-")[1]) for folder in (out / "checkpoints").glob("step-*")), default=0)
