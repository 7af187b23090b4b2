"""`danlu plan RECIPE`: a recipe of `danlu train`, and the plan it holds, beside the best one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("torch")

from danlu.cli import app

RECIPE = """
name: some
model:
  architecture: LlamaForCausalLM
  shape: {hidden_size: 512, num_hidden_layers: 8, num_attention_heads: 8, num_key_value_heads: 8,
          intermediate_size: 1344, max_position_embeddings: 1024, tie_word_embeddings: true}
data: {sources: text.txt, vocabulary: {KIND}}
batch: {rows: 64, window: 1024}
steps: 1000
recompute: full
"""


def recipe(folder: Path, kind: str, more: str = "") -> Path:
    (folder / "recipe.yaml").write_text(RECIPE.replace("KIND", kind) + more)
    return folder / "recipe.yaml"


def planned(*words: str | Path) -> dict[str, Any]:
    ended = CliRunner().invoke(app, ["plan", *map(str, words), "--json"])
    assert ended.exit_code == 0, ended.output
    return json.loads(ended.output)


def refused(*words: str | Path) -> str:
    ended = CliRunner().invoke(app, ["plan", *map(str, words)])
    assert ended.exit_code == 2
    return ended.output


def test_a_recipe_is_planned_with_its_own_plan_beside(tmp_path: Path) -> None:
    path = recipe(tmp_path, "kind: bpe, size: 8192", "plan: {tensor: 2, shard: 4}")
    answer = planned(path, "--gpus", "8xa100-80gb")
    assert answer["run"]["tokens"] == 64 * 1024 * 1000
    assert answer["written"]["plan"] == "shard=4,tensor=2"
    assert answer["written"]["recompute"] == "full"
    assert answer["written"]["fits"]
    assert answer["written"]["seconds"] >= answer["plan"]["seconds"]
    assert answer["written"]["uncounted"] == []
    assert answer["command"].startswith(f"danlu train {path} --nproc 8 --plan ")
    wrong = planned(path, "--gpus", "4xa100-80gb", "--tokens", "1B")
    assert "8 processes, but there are 4" in wrong["written"]["problem"]
    assert wrong["run"]["steps"] == 15_259  # 1e9 / 65,536, rounded up


def test_the_answer_is_told_in_words(tmp_path: Path) -> None:
    path = recipe(tmp_path, "kind: bpe, size: 8192", "plan: {shard: 8}")
    told = CliRunner().invoke(app, ["plan", str(path), "--gpus", "8xl4"]).output
    assert "65,536,000 tokens are 1,000 steps" in told
    assert "as written, shard=8 with recompute full" in told
    assert "80% of 72 W" in told
    words = ["plan", "--fit", "cluster", "--model", "llama-2-7b", "--gpus", "h100", "--seq", "2048"]
    assert "the smallest cluster has 2 h100" in CliRunner().invoke(app, words).output


def test_without_a_plan_every_process_is_a_copy(tmp_path: Path) -> None:
    path = recipe(tmp_path, "kind: characters, special: []")
    assert "model.shape.vocab_size" in refused(path, "--gpus", "8xl4")
    answer = planned(path, "--gpus", "8xl4", "--set", "model.shape.vocab_size=65", "--set", "precision=float8")
    assert answer["written"]["plan"] == "data=8"
    slower = planned(path, "--gpus", "8xl4", "--set", "model.shape.vocab_size=65", "--set", "precision=fp32")
    assert slower["written"]["seconds"] > answer["written"]["seconds"]


def test_what_no_prediction_knows_of_is_said(tmp_path: Path) -> None:
    path = recipe(tmp_path, "kind: bpe, size: 8192", "optimizer: {name: muon, ema: 0.99}")
    answer = planned(path, "--gpus", "8xl4", "--set", "offload.state=host")
    assert answer["written"]["uncounted"] == ["the time of optimizer.name=muon"]


def test_what_a_recipe_says_is_not_said_again(tmp_path: Path) -> None:
    path = recipe(tmp_path, "kind: bpe, size: 8192")
    assert "the recipe says" in refused(path, "--gpus", "8xl4", "--seq", "512")
    assert "none is named" in refused("--model", "llama-2-7b", "--gpus", "8xl4", "--set", "steps=2")
    assert "name a model or a recipe" in refused("--gpus", "8xl4")


def test_models_of_two_stacks_are_planned_for(tmp_path: Path) -> None:
    path = recipe(tmp_path, "kind: bpe, size: 8192")
    shape = "{d_model: 64, num_heads: 2, d_kv: 32, d_ff: 128, num_layers: 2}"
    words = ("--set", "model.architecture=T5ForConditionalGeneration", "--set", f"model.shape={shape}")
    answer = planned(path, "--gpus", "8xl4", *words)
    assert answer["plan"]["times"]["second stack"] > 0
    assert answer["written"]["seconds"] >= answer["plan"]["seconds"]
    assert not {"pipeline", "context"} & {part.split("=")[0] for part in answer["plan"]["plan"].split(",")}
