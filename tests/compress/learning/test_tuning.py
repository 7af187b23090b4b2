"""What was cut is learned again from a teacher, and a model learns to answer early: on a model trained here."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bench.small_models import Small, train_small
from danlu.artifact import CARD
from danlu.compress.learning.distill import Teaching, distill
from danlu.compress.learning.early_exit import Guessing, _Halves, write_early
from danlu.compress.learning.exits import GUESSES, TABLE, tune_exits
from danlu.compress.learning.tuning import RECIPE, Tuning
from danlu.compress.pruning.structured import Shape, shrink
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint, save_checkpoint
from danlu.model.generate import generate
from danlu.model.transformer import Decoder
from danlu.recipe import read_recipe
from danlu.train.recipe import TrainRecipe
from danlu.train.start import start

WORDS = ("the", "furnace", "丹炉", "turns", "ore", "into", "silver", "and", "gold,", "slowly;", "nobody", "hurries")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, and a model of four blocks that learned it."""
    home = tmp_path_factory.mktemp("tuning")
    chance = random.Random(5)
    (home / "text.txt").write_text(" ".join(chance.choice(WORDS) for _ in range(8_000)), encoding="utf-8")
    small = Small(layers=4, width=32, heads=2, kv_heads=1, channels=64, context=64)
    train_small(small, home / "text.txt", 150, home / "base", batch={"rows": 16, "window": 32})
    return home


@pytest.fixture(scope="module")
def base(home: Path) -> Checkpoint:
    return Checkpoint.open(home / "base" / "model")


def tuning(home: Path, steps: int) -> Tuning:
    text = (str(home / "text.txt"),)
    return Tuning(text, steps, rows=8, window=32, learning_rate=5e-3, heldout=0.1, heldout_from="end")


@torch.no_grad()
def student(base: Checkpoint, out: Path, layers: int, width: int | None = None) -> Checkpoint:
    """The first blocks of a model or, with another width, a new one."""
    config = replace(base.config, layers=layers, width=width or base.config.width)
    torch.manual_seed(3)
    model = Decoder(config)
    if width is None:
        given = base.load().state_dict()
        model.load_state_dict({name: given[name] for name in model.state_dict()})
    save_checkpoint(model, base.tokenizer, out)
    return Checkpoint.open(out)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


# --- A teacher ------------------------------------------------------------------------------------------------------


def test_what_was_cut_is_learned_again(home: Path, base: Checkpoint, tmp_path: Path) -> None:
    cut = student(base, tmp_path / "cut", layers=2)
    made = distill(cut, base, tuning(home, 60), Teaching(states=0.1), tmp_path / "out")
    assert made.before.mean > 1.5 * made.teacher.mean
    assert made.after.mean - made.teacher.mean < 0.2 * (made.before.mean - made.teacher.mean)
    card = json.loads((tmp_path / "out" / CARD).read_text())
    assert card["inputs"] == {"student": cut.digest, "teacher": base.digest}
    change = card["figures"]["loss_change_to_teacher"]
    assert change["low"] < change["value"] < change["high"]
    assert change["value"] == pytest.approx(made.after.mean / made.teacher.mean - 1, abs=1e-6)
    config = Checkpoint.open(tmp_path / "out").config
    assert config == cut.config and not hasattr(Checkpoint.open(tmp_path / "out").load(), "projections")
    note = next((tmp_path / "out").rglob(RECIPE))
    told = yaml.safe_load(note.read_text())
    del told["offload"]["pinned"]  # as where that setting is younger than the run
    note.write_text(yaml.safe_dump(told))
    again = distill(cut, base, tuning(home, 60), Teaching(states=0.1), tmp_path / "out")
    assert again.after.mean == made.after.mean and len(losses(tmp_path / "out")) == 60
    with pytest.raises(DanluError, match=f"made with other settings: {RECIPE} says which"):
        distill(cut, base, tuning(home, 60), Teaching(states=0.2), tmp_path / "out")


def test_a_narrow_student_goes_on_exactly_where_it_was_stopped(home: Path, base: Checkpoint, tmp_path: Path) -> None:
    narrow = student(base, tmp_path / "narrow", layers=2, width=16)
    objective = {"teacher": str(base.path), **vars(Teaching(share=1.0, divergence="reverse", states=0.5, own=0.5))}
    recipe = tuning(home, 8).recipe(narrow, objective, "distill")
    recipe = recipe.model_copy(update={"precision": "fp32"})
    start(recipe, tmp_path / "whole", plan=None, steps=None)
    start(recipe, tmp_path / "parts", plan=None, steps=3)
    start(recipe, tmp_path / "parts", plan=None, steps=None)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    one, other = (Checkpoint.open(tmp_path / name).load().state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.soak  # a minute of training
def test_shakespeare_without_three_of_four_layers_is_learned_again(
    real_data: Callable[[str], Path], tmp_path: Path
) -> None:
    """On a model that has learned real text, which it had not by heart."""
    text = real_data("tinyshakespeare.txt.gz")
    small = Small(layers=4, width=96, heads=4, kv_heads=2, channels=256, context=64)
    base = train_small(
        small, text, 400, tmp_path / "base", vocabulary={"kind": "characters", "special": []},
        batch={"rows": 12, "window": 64}, optimizer={"learning_rate": 4e-3, "clip": 1.0},
        schedule={"kind": "linear", "warmup": 0.05, "final_share": 0.0},
    )  # fmt: skip
    whole, plain = Checkpoint.open(base), gzip.decompress(text.read_bytes()).decode("utf-8")
    cut = shrink(whole, Shape(layers=1), plain[:50_000], tmp_path / "cut")
    asked = Tuning((str(text),), 120, rows=12, window=64, learning_rate=2e-3, heldout=0.1)
    made = distill(Checkpoint.open(cut.path), whole, asked, Teaching(), tmp_path / "out")
    assert made.teacher is not None and made.teacher.mean < 2.2, "it has learned"
    assert made.before.mean > 1.1 * made.teacher.mean, "the layers mattered"
    assert made.before.change(made.after)["high"] < -0.08
    assert made.after.mean - made.teacher.mean < 0.5 * (made.before.mean - made.teacher.mean)


def test_what_was_not_begun_leaves_a_directory_as_it_was(home: Path, base: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DanluError, match="nothing could be held out of 1 texts") as problem:
        distill(base, base, replace(tuning(home, 1), heldout_from="documents"), Teaching(), tmp_path)
    assert "--heldout-from end" in str(problem.value)
    with pytest.raises(DanluError, match="a measurement needs 9000 rows"):
        distill(base, base, replace(tuning(home, 1), rows=9000), Teaching(), tmp_path)
    assert [place.name for place in tmp_path.iterdir()] == ["notes.txt"]
    distill(base, base, tuning(home, 1), Teaching(), tmp_path)


def test_the_recipe_beside_a_run_is_one_of_danlu_train(home: Path, base: Checkpoint, tmp_path: Path) -> None:
    made = distill(base, base, tuning(home, 1), Teaching(share=1.0), tmp_path)
    assert losses(tmp_path) == [pytest.approx(0.0, abs=1e-3)]  # a teacher that agrees leaves nothing to learn
    assert made.before.mean == made.teacher.mean
    assert read_recipe(tmp_path / RECIPE, (), TrainRecipe).recipe.objective.teacher == str(base.path.resolve())


def test_a_teacher_of_other_words_is_refused_before_any_work(base: Checkpoint, smollm2: Path, tmp_path: Path) -> None:
    with pytest.raises(DanluError, match="the student has words for 257 ids, its teacher for 49,152"):
        distill(base, Checkpoint.open(smollm2), Tuning(("absent",), 1), Teaching(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- Early exits ----------------------------------------------------------------------------------------------------


def answers(model: Decoder, prompt: list[int], guessing: Guessing, **options: Any) -> list[int]:
    return list(write_early(model, prompt, guessing, **options))


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("most", [1, 5])
@pytest.mark.parametrize("sure", [0.0, 0.6])
def test_the_text_is_the_whole_models(base: Checkpoint, layer: int, most: int, sure: float) -> None:
    model, prompt = base.load(), base.tokenizer.encode("the furnace 丹炉 tur")
    whole = list(generate(model, prompt, max_new_tokens=40))
    guessing = Guessing(layer, most, sure)
    assert answers(model, prompt, guessing, max_new_tokens=40) == whole[:40]
    assert guessing.kept + guessing.steps == len(whole) - 1  # the prompt's own step gives the first token
    assert answers(model, prompt, guessing, max_new_tokens=7) == whole[:7]
    stop = frozenset({whole[9]})
    assert answers(model, prompt, guessing, max_new_tokens=40, stop_ids=stop) == whole[: whole.index(whole[9])]
    full = answers(model, prompt, guessing, max_new_tokens=1000)
    assert full == list(generate(model, prompt, max_new_tokens=1000)) and len(prompt) + len(full) == 64


def test_wrong_guesses_cost_time_and_nothing_else(base: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = base.load(), base.tokenizer.encode("silver and")
    likeliest = _Halves._likeliest

    def wrong(halves: _Halves, stream: torch.Tensor, asked: bool = False) -> tuple[list[int], float]:
        tokens, sure = likeliest(halves, stream, asked)
        return ([200], sure) if stream.shape[1] == 1 else (tokens, sure)  # no byte of this text

    monkeypatch.setattr(_Halves, "_likeliest", wrong)
    guessing = Guessing(2, 3)
    said = answers(model, prompt, guessing, max_new_tokens=12)
    assert guessing.kept == 0 and guessing.guessed > 20
    assert said[:-1] == list(generate(model, prompt, max_new_tokens=12))[:-1]  # the last is a lone one, made wrong, too


def test_smollm2_writes_the_same_early(smollm2: Path) -> None:
    checkpoint = Checkpoint.open(smollm2)
    model, prompt = checkpoint.load(), checkpoint.tokenizer.encode("def add(a, b):\n    return")
    guessing = Guessing(28, 3)
    assert answers(model, prompt, guessing, max_new_tokens=8) == list(generate(model, prompt, max_new_tokens=8))
    assert guessing.guessed > 0


def test_exits_are_learned_and_measured(home: Path, base: Checkpoint, tmp_path: Path) -> None:
    prompt = base.tokenizer.encode("the furnace turns ore")
    before = Guessing(2, 4)
    answers(base.load(), prompt, before, max_new_tokens=32)
    made = tune_exits(base, (1, 2), tuning(home, 60), tmp_path, prompts=2, tokens=24)
    assert len(made.settings) == 2 * len(GUESSES) and {each.exit for each in made.settings} == {1, 2}
    kept = {(each.exit, each.guesses, each.sure): each.kept_share for each in made.settings}
    sure, any_way = (kept[1, 4, least] + kept[2, 4, least] for least in (0.4, 0.0))
    assert sure >= any_way  # the surer a guess, the more often it is right
    assert all(each.same == 1.0 for each in made.settings)
    after = Guessing(2, 4)
    answers(Checkpoint.open(tmp_path).load(), prompt, after, max_new_tokens=32)
    assert after.kept_share > max(0.6, before.kept_share)
    faster = [each.faster for each in made.settings]
    assert faster == sorted(faster, reverse=True)
    card = json.loads((tmp_path / CARD).read_text())
    assert card["figures"]["faster"]["value"] == faster[0] and card["inputs"] == {"model": base.digest}
    assert [each["faster"] for each in json.loads((tmp_path / TABLE).read_text())] == faster
    assert card["figures"]["loss_change"]["value"] < 0.05  # the end still answers as well
    # Every setting stands on the card, with what answering there without a check costs.
    assert set(card["figures"]["exits"]) == {"behind_1", "behind_2"}
    for each in made.settings:
        about = card["figures"]["exits"][f"behind_{each.exit}"]
        assert about["loss"]["low"] < about["loss"]["value"] == each.loss < about["loss"]["high"]
        assert about["loss_change"]["value"] == pytest.approx(each.loss / made.loss - 1, abs=1e-6)
        told = about[f"guesses_{each.guesses}_sure_{each.sure:g}"]
        assert told["faster"]["low"] <= told["faster"]["value"] == each.faster <= told["faster"]["high"]
        assert told["kept_share"]["value"] == each.kept_share
        assert told["same"]["low"] < told["same"]["value"] == told["same"]["high"] == 1.0


@pytest.mark.parametrize("layer", [4, 0])
def test_there_is_no_exit_behind_the_last_block(base: Checkpoint, layer: int, tmp_path: Path) -> None:
    with pytest.raises(DanluError, match=f"no exit behind block {layer}: the model has 4 blocks"):
        tune_exits(base, (layer,), Tuning(("absent",), 1), tmp_path / "out")
    with pytest.raises(DanluError, match=f"no exit behind block {layer}"):
        write_early(base.load(), [1], Guessing(layer, 2), max_new_tokens=1)
