"""The stage on real parts: two small models, real packed data, and figures that can be made again from its files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from danlu.data.build import build_data
from danlu.data.settings import DataSettings
from danlu.errors import DanluError
from danlu.evaluate.bootstrap import interval, paired_change
from danlu.evaluate.groups import pooled
from danlu.evaluate.settings import EvaluateSettings
from danlu.evaluate.stage import evaluate
from danlu.model.checkpoint import Checkpoint, save_checkpoint
from tests.conftest import write_rows

SETTINGS = EvaluateSettings(answers=5, max_new_tokens=6, batch=2, resamples=200, precision="fp32")


@pytest.fixture(scope="module")
def base(tiny_model) -> Checkpoint:
    return Checkpoint.open(tiny_model)


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory) -> Checkpoint:
    """The base with every weight a little smaller: another model of the same shape."""
    model = base.load()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.8)
    out = tmp_path_factory.mktemp("tuned") / "model"
    save_checkpoint(model, base.tokenizer, out)
    return Checkpoint.open(out)


@pytest.fixture(scope="module")
def data(base, tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("data")
    write_rows(home / "rows.jsonl", 60)
    out = home / "out"
    out.mkdir()
    settings = DataSettings(sources=[str(home / "rows.jsonl")], heldout=0.3, window=128, deduplicate="exact")
    build_data(settings, base.tokenizer, out, seed=0)
    return out


@pytest.fixture(scope="module")
def made(base, tuned, data, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("evaluate")
    return out, evaluate(SETTINGS, base, tuned, data, out, seed=3)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_estimate_has_its_interval(made):
    _, figures = made
    for name in ("heldout_loss", "perplexity", "token_accuracy", "rouge_l", "exact_match"):
        for when in ("before", "after"):
            about = figures[f"{name}_{when}"]
            assert about["low"] <= about["value"] <= about["high"], name
            assert "seed 3" in about["by"] and "fp32" in about["by"]
    for name in ("heldout_loss_change", "heldout_loss_change_relative", "perplexity_change_relative"):
        assert figures[name]["low"] < figures[name]["value"] < figures[name]["high"]


def test_held_out_figures_can_be_made_again_from_the_documents(made):
    out, figures = made
    documents = read(out / "documents.jsonl")
    groups = [row["group"] for row in documents]
    names = ("tokens", "loss_before", "loss_after", "correct_after")
    tokens, before, after, right = pooled(groups, *(np.array([row[name] for row in documents]) for name in names))
    assert figures["heldout_documents"]["value"] == len(documents) > 10
    assert figures["heldout_groups"]["value"] == len(set(groups))
    assert figures["heldout_tokens"]["value"] == tokens.sum()
    again = interval(after, tokens, seed=3, samples=200)
    assert figures["heldout_loss_after"]["value"] == pytest.approx(again.value, abs=1e-4)
    assert figures["heldout_loss_after"]["high"] == pytest.approx(again.high, abs=1e-3)
    assert figures["token_accuracy_after"]["value"] == pytest.approx(right.sum() / tokens.sum())
    change = paired_change(before, after, tokens, seed=3, samples=200).absolute
    assert figures["heldout_loss_change"]["low"] == pytest.approx(change.low, abs=1e-3)
    assert figures["perplexity_change_relative"]["value"] == pytest.approx(np.expm1(change.value), abs=1e-4)


def test_answers_stand_beside_their_references(made, data):
    out, figures = made
    answers = read(out / "answers.jsonl")
    held_out = {row["messages"][-1]["content"]: row for row in read(data / "heldout.jsonl")}
    assert len(answers) == figures["answers"]["value"] == 5
    for row in answers:
        example = held_out[row["reference"]]
        assert row["messages"] == example["messages"][:-1]
        assert row["prompt"] == row["messages"][-1]["content"]
        assert row["origin"] == example["origin"]
        assert {"before", "after", "rouge_before", "rouge_after", "exact_before", "exact_after", "cut_after"} <= set(
            row
        )
    mean = sum(row["rouge_after"] for row in answers) / 5
    assert figures["rouge_l_after"]["value"] == pytest.approx(mean, abs=1e-6)
    assert figures["answers_cut_after"]["value"] == sum(row["cut_after"] for row in answers)


def test_the_same_seed_gives_the_same_files_and_figures(made, base, tuned, data, tmp_path):
    out, figures = made
    assert evaluate(SETTINGS, base, tuned, data, tmp_path, seed=3) == figures
    for name in ("documents.jsonl", "answers.jsonl"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()


def test_a_model_against_itself_changes_nothing(base, data, tmp_path):
    settings = SETTINGS.model_copy(update={"answers": 0})
    figures = evaluate(settings, base, base, data, tmp_path, seed=0)
    assert {figures["heldout_loss_change"][key] for key in ("low", "value", "high")} == {0.0}
    assert "rouge_l_before" not in figures and read(tmp_path / "answers.jsonl") == []


def test_one_group_gives_no_interval_and_that_is_said(base, tmp_path, capfd):
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}.", "module": "one"} for n in range(6)]
    for name, part in (("held.jsonl", rows), ("train.jsonl", [{**rows[0], "module": "two", "prompt": "else?"}])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    columns = {"prompt": "prompt", "completion": "completion", "group": "module"}
    sides = {"held.jsonl": "heldout", "train.jsonl": "train"}
    sources = [{"path": str(tmp_path / name), "split": side, "columns": columns} for name, side in sides.items()]
    (tmp_path / "data").mkdir()
    build_data(DataSettings(sources=sources, window=64, deduplicate="none"), base.tokenizer, tmp_path / "data", seed=0)
    settings = SETTINGS.model_copy(update={"answers": 0})
    figures = evaluate(settings, base, base, tmp_path / "data", tmp_path, seed=0)
    assert "low" not in figures["heldout_loss_after"]
    assert "one group" in capfd.readouterr().err


def test_another_tokenizer_is_refused(base, data, tmp_path):
    class Other:
        tokenizer = type("T", (), {"fingerprint": "other"})
        path = Path("elsewhere")

    with pytest.raises(DanluError, match="another tokenizer"):
        evaluate(SETTINGS, base, Other(), data, tmp_path, seed=0)
    assert list(tmp_path.iterdir()) == []
