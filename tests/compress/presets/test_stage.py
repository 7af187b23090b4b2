"""The stage on a small recipe's artifacts: the choice among measured candidates, and targets nothing can meet."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

pytest.importorskip("llama_cpp", reason="the extra danlu[device] is not installed")

from danlu.artifact import figure
from danlu.compress.presets.possible import check_target
from danlu.compress.presets.quantize import Stored
from danlu.compress.presets.settings import CompressSettings
from danlu.compress.presets.stage import Candidate, choose, compress
from danlu.device.measure import Measurement, Request, measure
from danlu.device.settings import Target
from danlu.device.verdict import judge
from danlu.errors import DanluError
from danlu.evaluate.bootstrap import paired_change
from danlu.model.checkpoint import Checkpoint
from danlu.model.config import ModelConfig
from tests.conftest import Project

SETTINGS = CompressSettings(
    types=("q8_0", "q4_k_m", "q4_0"), context=64, threads=1, prompt_tokens=16, decode_tokens=4, repeats=2,
    heldout_tokens=256, resamples=100,
)  # fmt: skip


@pytest.fixture(scope="module")
def made_of(finished: Project) -> dict[str, Path]:
    named = json.loads((finished.run / "run.json").read_text())["stages"]
    return {name: finished.run / directory for name, directory in named.items()}


@pytest.fixture(scope="module")
def tuned(made_of: dict[str, Path]) -> Checkpoint:
    return Checkpoint.open(made_of["tune"])


@pytest.fixture(scope="module")
def out(made_of: dict[str, Path], tuned: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("compressed")
    compress(SETTINGS, Target(memory="1GB"), tuned, made_of["data"], place)
    return place


@pytest.fixture(scope="module")
def rows(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "candidates.json").read_text())


def test_every_type_is_measured_and_one_is_kept(out: Path, rows: list[dict[str, Any]]) -> None:
    assert [row["type"] for row in rows] == list(SETTINGS.types)
    [kept] = [row for row in rows if row["chosen"]]
    assert (out / "model.gguf").stat().st_size == kept["bytes"] == min(row["bytes"] for row in rows)
    assert kept["why"].startswith("the smallest that meets the target")
    assert [file.name for file in (out / "work").iterdir()] == ["f32.gguf"], "the others' files are gone"
    for row in rows:
        assert row["meets"] and row["peak_memory"]["value"] > row["bytes"]
        assert row["loss_change"]["low"] <= row["loss_change"]["value"] <= row["loss_change"]["high"]
        assert row["decode_tokens_per_second"]["value"] > 0


def test_what_a_type_could_not_do_is_said(rows: list[dict[str, Any]]) -> None:
    forced = {row["type"]: row["matrices"]["forced"] for row in rows}
    assert forced["q8_0"] == forced["q4_0"] == {}
    assert sum(forced["q4_k_m"].values()) == 15
    assert "no multiple of 256" in next(row["why"] for row in rows if row["type"] == "q4_k_m")


def test_fewer_bits_lose_more(rows: list[dict[str, Any]]) -> None:
    change = {row["type"]: abs(row["loss_change"]["value"]) for row in rows}
    assert change["q8_0"] < change["q4_0"]


@pytest.fixture(scope="module")
def measured(out: Path) -> Measurement:
    return measure(Request(str(out / "model.gguf"), 64, 1, [5, 6, 7], decode_tokens=4, repeats=1, documents=[]))


def test_the_choice_follows_the_target(measured: Measurement) -> None:
    tried = {"q8_0": (144e6, 100.0, 0.0), "q4_k_m": (105e6, 300.0, 0.01), "q4_0": (92e6, 200.0, 0.1)}

    def candidate(name: str, target: Target) -> Candidate:
        size, speed, rise = tried[name]
        costs = replace(measured, file_bytes=int(size), decode=[speed])
        change = paired_change([100.0, 200.0], [100 * (1 + rise), 200 * (1 + rise)])
        lines = judge(
            target,
            file_size=figure(size, "byte"),
            memory=figure(measured.peak_memory, "byte"),
            decode=costs.decode_figure(),
            loss_rise=figure(rise, "share", rise - 0.01, rise + 0.01),
        )
        return Candidate(name, Stored({}, {}, 32), costs, change, lines)

    def chosen(prefer: Literal["smallest", "fastest"], **target: object) -> str:
        return choose([candidate(name, Target(**target)) for name in tried], prefer).type  # type: ignore[arg-type]

    assert chosen("smallest") == "q4_0"
    assert chosen("fastest") == "q4_k_m"
    assert chosen("smallest", quality_loss="5%") == "q4_k_m"
    assert chosen("smallest", quality_loss="1%") == "q8_0", "2% at the upper end is too much for q4_k_m"
    assert chosen("smallest", quality_loss="5%", speed=250) == "q4_k_m"
    assert chosen("fastest", speed=150, quality_loss="1%") == "q8_0", "none meets both: its worst line is missed least"


def test_where_nothing_meets_the_target_the_nearest_is_kept_and_said(
    made_of: dict[str, Path], tuned: Checkpoint, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = SETTINGS.model_copy(update={"types": ("q8_0", "q4_0"), "repeats": 1})
    figures = compress(settings, Target(speed=1e9), tuned, made_of["data"], tmp_path)
    assert figures["meets_target"] is False
    assert "no candidate meets the target; the nearest" in capfd.readouterr().err
    rows = json.loads((tmp_path / "candidates.json").read_text())
    [kept] = [row for row in rows if row["chosen"]]
    assert kept["why"].startswith("nearest to the target. decoding: ") and not kept["meets"]
    assert (tmp_path / "model.gguf").stat().st_size == kept["bytes"]


# Targets that nothing can meet


@pytest.fixture(scope="module")
def smollm2_config(smollm2: Path) -> ModelConfig:
    return Checkpoint.open(smollm2).config


def test_a_file_smaller_than_its_weights_is_impossible(smollm2_config: ModelConfig) -> None:
    with pytest.raises(DanluError, match=r"target.file_size: asks for 70.0 MB, .*134.5 million .* 75.6 MB in q4_k_m"):
        check_target(SETTINGS, Target(file_size="70MB"), smollm2_config)
    with pytest.raises(DanluError, match=r"target.memory: asks for 70.0 MB"):
        check_target(SETTINGS, Target(memory="70MB"), smollm2_config)
    check_target(SETTINGS, Target(memory="80MB", file_size="76MB"), smollm2_config)
    check_target(SETTINGS.model_copy(update={"types": ("q2_k",)}), Target(file_size="70MB"), smollm2_config)


def test_a_speed_beyond_the_memorys_is_impossible(smollm2_config: ModelConfig) -> None:
    with pytest.raises(DanluError, match=r"target.speed: asks for 1,000,000 token/s, but reading the weights alone"):
        check_target(SETTINGS, Target(speed=1e6), smollm2_config)
    check_target(SETTINGS, Target(speed=20), smollm2_config)
    small = replace(smollm2_config, layers=1, vocab_size=1000)
    check_target(SETTINGS, Target(speed=1e6), small)  # such weights may stay in a cache


def test_an_impossible_target_ends_the_stage_before_any_work(
    made_of: dict[str, Path], tuned: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(DanluError, match="file_size"):
        compress(SETTINGS, Target(file_size=10), tuned, made_of["data"], tmp_path)
    assert list(tmp_path.iterdir()) == []
