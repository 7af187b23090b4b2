"""One file with models of many sizes in it: trained, cut out exactly, measured, and chosen when it runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bench.small_models import Small, train_small
from danlu.artifact import Artifact
from danlu.cli import app
from danlu.compress.learning.elastic import make_elastic
from danlu.compress.learning.elastic_file import FORMS, cut_of, name_of, write_whole
from danlu.compress.learning.supernet import part_model, put_in_order
from danlu.compress.learning.tuning import Tuning, heldout_rows, row_losses
from danlu.device.budget import Setting, read_elastic, within
from danlu.device.cut import write_cut
from danlu.device.engine import Engine
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint
from danlu.model.gguf import write_gguf
from danlu.train.objectives.elastic import part_weights, parts_of
from danlu.train.recipe import ElasticSettings
from tests.compress.short import TEXT

EVERY = ElasticSettings(layers=(1, 2), heads=(2,), channels=(32, 64), width=(32,))
ASKED = ElasticSettings(layers=(1,), width=(32,))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, and a model of three blocks that learned it."""
    home = tmp_path_factory.mktemp("elastic")
    (home / "text.txt").write_text(TEXT[:1500] * 40, encoding="utf-8")  # the more weights, the more of it is known
    small = Small(layers=3, width=64, heads=4, kv_heads=2, channels=96, context=64)
    words = {"kind": "bpe", "size": 300}
    settings = {"batch": {"rows": 8, "window": 32}, "optimizer": {"learning_rate": 3e-3}}
    path = train_small(small, home / "text.txt", 120, home / "base", vocabulary=words, **settings)
    (path / "chat_template.jinja").write_text("{% for each in messages %}{{ each.content }}{% endfor %}")
    return home


@pytest.fixture(scope="module")
def base(home: Path) -> Checkpoint:
    return Checkpoint.open(home / "base" / "model")


def tuning(home: Path, steps: int) -> Tuning:
    text = (str(home / "text.txt"),)
    return Tuning(text, steps, rows=8, window=32, learning_rate=3e-3, heldout_from="end")


@dataclass(frozen=True)
class Many:
    """A directory of `danlu compress elastic`, its settings, and what the command said."""

    path: Path
    settings: tuple[Setting, ...]
    told: dict[str, Any]


@pytest.fixture(scope="module")
def made(home: Path, base: Checkpoint) -> Many:
    """By one thread, so that other work on the machine does not make the engine's threads wait for each other."""
    sizes = ["--layers", 1, "--width", 32, "--rows", 8, "--window", 32, "--threads", 1]
    learned = ["--text", home / "text.txt", "--heldout-from", "end", "--steps", 120, "--learning-rate", 3e-3]
    words = ["compress", "elastic", base.path, *sizes, *learned, "--out", home / "many"]
    ended = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert ended.exit_code == 0, ended.stderr
    return Many(home / "many", read_elastic(home / "many").settings, json.loads(ended.stdout)["figures"]["settings"])


@pytest.mark.parametrize("type", ["q8_0", "q4_0"])
def test_a_part_of_the_file_is_the_part_of_the_model(base: Checkpoint, type: str, tmp_path: Path) -> None:
    write_whole(base, FORMS[type], tmp_path / "whole.gguf")
    whole, parts = Checkpoint.open(tmp_path / "whole.gguf"), parts_of(base.config, EVERY)
    rounded = whole.load().state_dict()
    assert len(parts) == 3 * 2 * 3 * 2 and cut_of(base.config, parts[-1], FORMS[type]) is None
    for part in parts[:-1]:
        cut = cut_of(base.config, part, FORMS[type])
        assert cut is not None
        file = tmp_path / f"{name_of(part)}.gguf"
        write_cut(whole.path, cut, file)
        found = Checkpoint.open(file)
        assert found.config == part
        wanted = part_weights(rounded, base.config, part)
        weights = found.load().state_dict()
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def test_the_engine_says_of_a_part_what_the_model_says(base: Checkpoint, tmp_path: Path) -> None:
    write_gguf(base.load(), base.tokenizer, tmp_path / "whole.gguf")
    ids = base.tokenizer.encode("the furnace 丹炉 turns ore into silver")
    for part in parts_of(base.config, EVERY)[:-1:7]:
        cut = cut_of(base.config, part, FORMS["q8_0"])
        assert cut is not None
        write_cut(tmp_path / "whole.gguf", cut, tmp_path / "part.gguf")
        small = part_model(base.load(), part)
        said = small.logits(small(torch.tensor([ids])))[0].numpy()
        with Engine(tmp_path / "part.gguf", context=64, exact=True) as engine:
            pieces = list(engine.scored(np.array(ids, np.int32), np.ones(len(ids), bool)))
            got = np.concatenate([logits.copy() for _, logits in pieces])
        assert np.abs(got - said).max() < 1e-3 * np.abs(said).max()


def test_parts_are_trained_measured_and_ordered(made: Many, home: Path, base: Checkpoint) -> None:
    names = [each.name for each in made.settings]
    assert names[0] == "l3-h4-c96-w64" and names[-1] == "l1-h4-c96-w32" and len(names) == 4
    card = Artifact.load(made.path).card
    assert card["figures"]["settings"] == made.told
    Artifact.load(made.path).verify()
    assert card["inputs"] == {"model": base.digest} and list(card["figures"]["settings"]) == names
    for each in made.settings:
        told = card["figures"]["settings"][each.name]
        assert told["loss"]["low"] < told["loss"]["value"] < told["loss"]["high"]
        assert told["file_size"]["value"] == each.file_bytes and told["processor"]["value"] > 0
        assert told["memory"]["value"] == each.file_bytes + 64 * each.token_bytes
    whole, smallest = made.settings[0], made.settings[-1]
    assert whole.loss_change is None and (made.path / "model.gguf").stat().st_size == whole.file_bytes
    assert whole.token_bytes == 2 * 3 * 2 * 16 * 2 and smallest.token_bytes * 3 == whole.token_bytes
    assert smallest.file_bytes < min(each.file_bytes for each in made.settings[:-1])
    losses = [each.loss.value for each in made.settings]
    assert min(losses) == whole.loss.value and max(losses) == smallest.loss.value
    assert smallest.loss_change is not None and smallest.loss_change.low is not None and smallest.loss_change.low > 0
    # Cut out of a model that was not trained to have parts, the same settings are far worse.
    recipe = tuning(home, 120).recipe(Checkpoint.open(made.path / "ordered"), {"elastic": ASKED.plain()}, "elastic")
    rows, plain = heldout_rows(recipe, made.path / "run"), base.load()
    put_in_order(plain)
    for part, each in zip(parts_of(base.config, ASKED)[-2::-1], made.settings[1:], strict=True):
        assert name_of(part) == each.name and each.loss.value < 0.8 * row_losses(part_model(plain, part), rows).mean
    # What the engine measured of the rounded file is what the trained model's part says.
    net = Checkpoint.open(made.path / "run" / "model").load()
    torch_loss = row_losses(part_model(net, parts_of(base.config, ASKED)[0]), rows).mean
    assert smallest.loss.value == pytest.approx(torch_loss, rel=0.02)


def test_a_budget_is_kept_to_at_run_time(made: Many, capsys: pytest.CaptureFixture[str]) -> None:
    elastic = read_elastic(made.path)
    assert elastic.settings == made.settings
    smallest = min(made.settings, key=lambda each: each.memory(64))
    file = within(made.path, f"{smallest.memory(64)}B", None, 2048)  # the model was trained for 64 tokens
    assert Path(file).stem == smallest.name and Path(file).stat().st_size == smallest.file_bytes
    assert "cut out of" in capsys.readouterr().err
    with Engine(Path(file), context=64) as engine:
        assert len(list(engine.generate(engine.tokenize("the "), max_new_tokens=4))) == 4
    assert within(made.path, f"{smallest.memory(64)}B", None, 64) == file and "cut out" not in capsys.readouterr().err
    best = min(made.settings, key=lambda each: each.loss.value)
    assert best.name == "l3-h4-c96-w64" and within(made.path, "1GB", "100%", 64) == made.path / "model.gguf"
    assert Path(within(made.path, None, "3%", 64)).stem == min(made.settings, key=lambda each: each.cost.value).name
    with pytest.raises(DanluError, match=f"no setting keeps to 1.0 kB: the nearest, {smallest.name}"):
        within(made.path, "1kB", None, 64)


def test_a_cut_that_was_cut_short_is_made_again(made: Many) -> None:
    smallest = min(made.settings, key=lambda each: each.memory(64))
    limit = f"{smallest.memory(64)}B"
    file = Path(within(made.path, limit, None, 64))
    whole = file.read_bytes()
    file.write_bytes(whole[:-32])
    assert Path(within(made.path, limit, None, 64)).read_bytes() == whole


def test_a_directory_that_cannot_be_written_is_only_read(
    made: Many, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    smallest = min(made.settings, key=lambda each: each.memory(64))
    file = Path(within(made.path, f"{smallest.memory(64)}B", None, 64))
    assert file.is_relative_to(tmp_path) and file.stat().st_size == smallest.file_bytes


def test_the_same_command_goes_on_and_another_is_refused(made: Many, home: Path, base: Checkpoint) -> None:
    digest = json.loads((made.path / "elastic.json").read_text())["sha256"]
    again = make_elastic(base, ASKED, "q8_0", tuning(home, 120), made.path, threads=1)
    assert json.loads((made.path / "elastic.json").read_text())["sha256"] == digest
    assert again.settings == made.settings  # not measured again
    with pytest.raises(DanluError, match=r"made with other settings: asked.json says which"):
        make_elastic(base, ASKED, "q4_0", tuning(home, 120), made.path)


@pytest.mark.parametrize(
    ("asked", "type", "told"),
    [
        (ElasticSettings(width=(48,)), "q8_0", "48 width cannot be cut off: Q8_0 shares a step over 32 columns"),
        (ElasticSettings(channels=(40,)), "q4_0", "40 channels cannot be cut off: Q4_0 shares"),
        (ElasticSettings(layers=(2,)), "q4_k", "q4_k has blocks of 256 columns"),
        (ElasticSettings(layers=(4,)), "q8_0", "layers 4 cannot be had"),
        (ElasticSettings(layers=(2,)), "q9", "weights cannot be rounded to q9"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_any_work(
    base: Checkpoint, asked: ElasticSettings, type: str, told: str, tmp_path: Path
) -> None:
    with pytest.raises(DanluError, match=told):
        make_elastic(base, asked, type, Tuning(("absent",), 1), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_it_is_chosen_where_one_talks(made: Many) -> None:
    def chat(*words: str) -> Any:
        asked = ["chat", str(made.path), "--prompt", "What is it?", "--max-tokens", "3", "--threads", "1", "--json"]
        return CliRunner().invoke(app, [*asked, *words])

    smallest = min(made.settings, key=lambda each: each.memory(64))
    ended = chat("--memory", f"{smallest.memory(64)}B")
    assert ended.exit_code == 0, ended.stderr
    assert f"{smallest.name}, " in ended.stderr and json.loads(ended.stdout)["completion_tokens"] == 3
    ended = chat("--memory", "1kB")
    assert ended.exit_code == 2 and f"the nearest, {smallest.name}, takes" in ended.stderr and not ended.stdout
    ended = chat("--battery", "4%")
    assert ended.exit_code == 0 and "battery at 4% (as told): the loss may be any" in ended.stderr
    ended = CliRunner().invoke(app, ["serve", str(made.path), "--memory", "1kB"])
    assert ended.exit_code == 2 and "no setting keeps to" in ended.stderr
