"""The same command on a directory that holds a checkpoint: what may differ, and what is said where it must not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from danlu.cli import app
from danlu.train.guard import Guard
from tests.train.test_train_command import ROWS
from tests.train.tiny_run import here, metrics, write_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def begun(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps."""
    home = tmp_path_factory.mktemp("begun") / "run"
    here(recipe, home, "--steps", "5")
    return home


@pytest.fixture
def run_dir(begun: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(begun, tmp_path / "run")


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("model.shape.num_attention_heads=8", ["model.head_width 8, and this run has 4", "model.heads 4"]),
        ("model.shape.rope_theta=500", ["model.positions.base 10000.0, and this run has 500"]),
        ("dropout=0.5", ["model.dropout 0.0, and this run has 0.5"]),
        ("optimizer.learning_rate=1e-2", ["made with optimizer.learning_rate 0.003, and this run has 0.01\n"]),
        ("steps=20", ["made with steps 12, and this run has 20\n"]),
        ("precision=bf16", ["precision is bf16, and the run's checkpoints were made with fp32", "decisions.json"]),
        ("compile=on", ["compile is on, and the run's checkpoints were made with off", "set compile to auto or off"]),
    ],
)
def test_other_settings_are_refused_by_what_differs(word: str, told: list[str], recipe: Path, run_dir: Path) -> None:
    before = {file.name: file.read_bytes() for file in run_dir.glob("*.json*") if file.name != "plan.json"}
    said = here(recipe, run_dir, "--set", word, code=2)
    plain = " ".join(said.split())
    assert all(" ".join(one.split()) in plain for one in told), said
    assert len(said) < 600
    assert {name: (run_dir / name).read_bytes() for name in before} == before, "a start that is refused notes nothing"


@pytest.mark.parametrize("name", ["decisions.json", "plan.json", "skipped.json", "recipe.json"])
@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_note_is_named(name: str, text: str, recipe: Path, run_dir: Path) -> None:
    (run_dir / name).write_text(text)
    said = here(recipe, run_dir, code=2)
    assert name in said and "is damaged" in said and "delete it" in said and "Traceback" not in said
    if name == "recipe.json":
        ended = CliRunner().invoke(app, ["checkpoint", "export", str(run_dir)], prog_name="danlu")
        assert ended.exit_code == 2 and name in ended.output and "is damaged" in ended.output


def test_batches_that_were_left_out_are_read_again(tmp_path: Path) -> None:
    Guard(home=tmp_path).leave_out(3, write=True)
    assert Guard(home=tmp_path).left_out == {3}


def test_a_decision_can_be_changed_before_there_is_a_checkpoint(recipe: Path, run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    here(recipe, run_dir, "--set", "precision=bf16", "--steps", "1")
    decided = json.loads((run_dir / "decisions.json").read_text())
    assert decided["dtype"] == "bfloat16" and decided["compile"] is False
    assert [line["step"] for line in metrics(run_dir)] == [1]


def test_what_may_change_is_noted_where_a_run_goes_on(tmp_path: Path) -> None:
    """What is measured at the end is what the last recipe asks for."""
    (tmp_path / "rows.txt").write_text("".join(f"{word} the {word}\n" for word in ("warm", "cold") * 8))
    (tmp_path / "rows.yaml").write_text(ROWS)
    words = ("--set", "compile=off", "--set", "steps=3")
    here(tmp_path / "rows.yaml", tmp_path / "run", *words)
    here(tmp_path / "rows.yaml", tmp_path / "run", *words, "--set", "test.rows=5")
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["test"]["rows"] == 5


def test_the_best_are_kept_wherever_they_are_measured(recipe: Path, tmp_path: Path) -> None:
    words = (
        "checkpoints={every: 100, last: 1, best: 2}",
        "validation.every=2",
        "schedule.warmup=0.99",
        "optimizer.learning_rate=3",
    )
    here(recipe, tmp_path, *(word for setting in words for word in ("--set", setting)))
    measured = sorted((line["validation"], line["step"]) for line in metrics(tmp_path) if "validation" in line)
    assert {step for _, step in measured[:2]} != {10, 12}, "the last are not the best"
    kept = {int(folder.name.split("-")[1]) for folder in (tmp_path / "checkpoints").glob("step-*")}
    assert kept == {12, *(step for _, step in measured[:2])}
