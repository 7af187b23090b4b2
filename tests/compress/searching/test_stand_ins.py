"""What stands in for formats that rows and heads do not fill is said, and models with such rows are searched too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("llama_cpp", reason="the extra danlu[device] is not installed")

from danlu.compress.quantizing.mixes import matrices
from danlu.compress.quantizing.quantizer import calibration_rows
from danlu.compress.searching.asked import Asked
from danlu.compress.searching.search import search
from danlu.compress.searching.sensitivity import formats, sensitivities
from danlu.compress.searching.settings import SearchSettings
from danlu.compress.searching.stand_ins import of_matrices
from danlu.compress.searching.starts import WHOLE
from danlu.compress.searching.wishes import read_target
from danlu.device.engine import Engine
from danlu.device.profile import CacheRate, DeviceProfile, Rate
from danlu.errors import DanluError
from danlu.frontier_page import render
from danlu.model.checkpoint import Checkpoint
from danlu.model.config import ModelConfig
from danlu.model.gguf import write_gguf
from danlu.model.transformer import Decoder
from tests.compress.short import OTHER, TEXT
from tests.device.test_clock import profile

NARROW = {"width": 48, "heads": 3, "kv_heads": 1, "head_width": 16, "feedforward_width": 100}
MIXED = {"width": 64, "heads": 2, "kv_heads": 1, "head_width": 32, "feedforward_width": 100}
TINY = {
    "types": ("q8_0", "q4_0"), "context": 128, "threads": 1, "candidates": 1, "gradient_tokens": 512,
    "calibration_tokens": 4096, "chosen_tokens": 512, "heldout_tokens": 512, "repeats": 1, "answers": 0,
    "resamples": 100,
}  # fmt: skip


def config(**shape: int) -> ModelConfig:
    return ModelConfig(vocab_size=1000, layers=2, context=256, tied=True, **shape)


def device(*types: str) -> DeviceProfile:
    rates = tuple(Rate(type=type, columns=64, batch=1, seconds=1e-9) for type in types)
    return profile(matrices=rates, caches=(CacheRate(type="f16", batch=1, seconds=1e-9),))


def model(short: Checkpoint, out: Path, **shape: int) -> Checkpoint:
    torch.manual_seed(0)
    made = Decoder(replace(config(**shape), vocab_size=short.config.vocab_size))
    write_gguf(made, short.tokenizer, out)
    return Checkpoint.open(out)


def test_each_stand_in_is_named_with_its_reason() -> None:
    wide = config(width=576, heads=9, kv_heads=3, head_width=64, feedforward_width=1536)
    [line] = of_matrices(("q8_0", "q6_k", "q4_k"), {WHOLE: wide})
    assert line.startswith("13 matrices have rows of 576 numbers: ")
    assert line.endswith(": q8_0 stands in for q6_k (blocks of 256), q5_0 stands in for q4_k (blocks of 256)")
    assert list(of_matrices(("q8_0", "q4_0"), {WHOLE: wide})) == []


def test_rows_that_no_format_fills_are_said_to_stay_as_they_are() -> None:
    lines = list(of_matrices(("q8_0", "q4_k"), {WHOLE: config(**MIXED), "channels=50": config(**MIXED | {"heads": 2})}))
    assert lines == [
        "13 matrices have rows of 64 numbers: q5_0 stands in for q4_k (blocks of 256)",
        "2 matrices have rows of 100 numbers: blocks of 32 are the smallest, and do not divide that, so they stay "
        "unrounded, in f32",
    ]
    assert formats(("q8_0", "q2_k"), 100) == {"f32": None}
    smaller = {WHOLE: config(**MIXED), "channels=50": config(**MIXED | {"feedforward_width": 50})}
    assert "2 matrices of channels=50 have rows of 50 numbers" in list(of_matrices(("q8_0",), smaller))[-1]


@pytest.mark.parametrize(("shape", "kept"), [(MIXED, 2), (NARROW, 15)])
def test_a_model_with_such_rows_is_searched(
    shape: dict[str, int], kept: int, short: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the extra danlu[report] is not installed")
    made = model(short, tmp_path / "f32.gguf", **shape)
    asked = Asked(
        made, read_target(memory="1GB"), SearchSettings(**TINY), TEXT, OTHER, None, device("q8_0", "q4_0", "f32")
    )
    if shape["head_width"] == 32:
        asked = replace(asked, settings=SearchSettings(**TINY, caches=("f16",)))
    found = search(asked, tmp_path / "out")
    said = capsys.readouterr().err
    assert said.count("so they stay unrounded, in f32") == (1 if kept == 2 else 2)
    assert ("heads of 16 numbers do not fill blocks of q8_0: keys and values stay f16" in said) == (kept == 15)
    chosen = found["measured"][found["chosen"]]
    assert chosen["formats"] == {"f32": kept} | ({} if kept == 15 else {"q8_0": 13})
    assert "meets the target" in render(found, "narrow"), "also where nothing diverges"
    with Engine(tmp_path / "out" / "model.gguf", context=64, threads=1) as engine:
        assert len(list(engine.generate([1, 2, 3], max_new_tokens=4))) == 4


def test_a_profile_that_does_not_know_a_stand_in_is_refused_before_the_work(short: Checkpoint, tmp_path: Path) -> None:
    made = model(short, tmp_path / "f32.gguf", **MIXED)
    asked = Asked(made, read_target(memory="1GB"), SearchSettings(**TINY), TEXT, OTHER, None, device("q8_0", "q4_0"))
    with pytest.raises(DanluError, match="says nothing of f32"):
        search(asked, tmp_path / "out")
    known = replace(asked, settings=SearchSettings(**TINY, caches=("q4_0",)), profile=device("q8_0", "q4_0", "f32"))
    with pytest.raises(DanluError, match="a cache of q4_0"):
        search(known, tmp_path / "out")
    narrow = replace(known, checkpoint=model(short, tmp_path / "narrow.gguf", **NARROW))
    with pytest.raises(DanluError, match="heads of 16 numbers do not fill blocks of q4_0") as raised:
        search(narrow, tmp_path / "out")
    assert raised.value.where == "--caches" and raised.value.fix == "name f16"
    assert not (tmp_path / "out").exists()


def test_inputs_of_binary_weights_are_told(small: Checkpoint) -> None:
    rows = calibration_rows(small, TEXT, 4096)[:2]
    found = sensitivities(small, rows, ("q8_0", "q1_0"))
    wide = "blocks.0.feedforward.down.weight"
    assert matrices(small)[wide][1] % 128 == 0
    assert found.inputs[wide]["q1_0"] == found.inputs[wide]["q8_0"] > 0, "llama.cpp rounds the same for both"
    assert found.rounding[wide]["q1_0"] > found.rounding[wide]["q8_0"]
