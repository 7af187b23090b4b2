"""Smaller models as starts of a search: which are looked at, when they are chosen, and what is said of the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

pytest.importorskip("llama_cpp", reason="the extra danlu[device] is not installed")

from danlu.compress.pruning.structured import Shape
from danlu.compress.quantizing.formats.known import FORMATS
from danlu.compress.quantizing.held import holds
from danlu.compress.quantizing.mixes import matrices
from danlu.compress.quantizing.quantizer import calibration_rows, quantize_model
from danlu.compress.quantizing.rounding import round_plainly
from danlu.compress.searching.asked import Asked
from danlu.compress.searching.search import search
from danlu.compress.searching.sensitivity import input_errors, sensitivities
from danlu.compress.searching.settings import SearchSettings
from danlu.compress.searching.starts import name_of, read_shape, smaller_config, smaller_shapes
from danlu.compress.searching.wishes import read_target
from danlu.device.divergence import score_divergence
from danlu.device.profile import CacheRate, DeviceProfile
from danlu.device.texts import documents_of
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint
from danlu.model.config import ModelConfig
from danlu.model.gguf import write_gguf
from danlu.model.stored import without_memory
from tests.compress.short import OTHER, TEXT
from tests.device.test_clock import profile

TINY = SearchSettings(
    types=("q8_0", "q4_0"), caches=("f16",), context=128, threads=1, candidates=2, gradient_tokens=512,
    calibration_tokens=4096, chosen_tokens=512, heldout_tokens=512, repeats=1, answers=0, resamples=100,
)  # fmt: skip


def device() -> DeviceProfile:
    return profile(caches=(CacheRate(type="f16", batch=1, seconds=1e-9),))


def asked(model: Checkpoint, pruning: str, **limits: str) -> Asked:
    settings = TINY.model_copy(update={"pruning": (pruning,)})
    return Asked(model, read_target(**limits), settings, TEXT, OTHER, None, device())


def config(**changes: int) -> ModelConfig:
    """SmolLM2's shape."""
    made = {"width": 576, "layers": 30, "heads": 9, "kv_heads": 3, "head_width": 64, "feedforward_width": 1536}
    return ModelConfig(vocab_size=1000, context=256, tied=True, **(made | changes))


def smallest_file(model: Checkpoint) -> float:
    """Bytes of a file all in q4_0."""
    plain = sum(4 * rows * columns for rows, columns in matrices(model).values())
    return model.path.stat().st_size - plain * (1 - 4.5 / 32)


def test_few_layers_and_channels_go_by_default_and_formats_stay_possible() -> None:
    assert list(smaller_shapes(config(), ("auto",))) == ["layers=29", "layers=28", "channels=1408"]
    assert list(smaller_shapes(config(layers=8, feedforward_width=8192), ("auto",))) == ["channels=7424"]
    assert smaller_shapes(config(layers=8, feedforward_width=256), ("auto",)) == {}
    assert smaller_shapes(config(), ("none",)) == {}


def test_shapes_are_read_as_they_are_written() -> None:
    shape = read_shape("layers=28, channels = 1408")
    assert shape == Shape(layers=28, channels=1408) and name_of(shape) == "layers=28,channels=1408"
    smaller = smaller_config(config(), Shape(layers=28, heads=6, channels=1408))
    found = {name: tuple(weight.shape) for name, weight in without_memory(smaller).state_dict().items()}
    assert found["blocks.27.attention.output.weight"] == (576, 384)
    assert found["blocks.27.feedforward.down.weight"] == (576, 1408) and "blocks.28.norm" not in str(found)


@pytest.mark.parametrize("text", ["depth=3", "layers", "layers=", "layers=-1", ""])
def test_what_names_no_smaller_model_is_refused(text: str) -> None:
    with pytest.raises(DanluError, match="names no smaller model"):
        read_shape(text)


def test_a_shape_that_cannot_be_had_is_refused_with_the_nearest() -> None:
    with pytest.raises(DanluError, match="heads=4: ") as raised:
        smaller_shapes(config(), ("heads=4",))
    assert raised.value.where == "--pruning" and "name 3 or 6" in str(raised.value.fix)


def test_a_smaller_model_is_made_where_the_whole_one_is_too_large(small: Checkpoint, tmp_path: Path) -> None:
    limit = smallest_file(small) * 0.97
    with pytest.raises(DanluError, match="no mix of these formats"):
        search(asked(small, "none", file_size=f"{limit:.0f}"), tmp_path / "none")
    found = search(asked(small, "channels=192", file_size=f"{limit:.0f}"), tmp_path / "out")
    [smaller] = found["smaller"]
    assert all(each["start"] == "channels=192" and each["missed"] == "" for each in found["measured"])
    assert smaller["divergence"] > 0 and smaller["why"].endswith("; made")
    first = found["measured"][0]
    assert first["told"]["divergence"] > smaller["divergence"], "what pruning brings is part of what is told"
    assert 0.5 < first["told"]["divergence"] / first["figures"]["divergence"]["value"] < 2
    assert Checkpoint.open(tmp_path / "out" / "model.gguf").config.feedforward_width == 192
    assert {point["start"] for point in found["told"]} == {"whole", "channels=192"}
    assert not list((tmp_path / "out" / "work").rglob("*.gguf"))


@pytest.mark.parametrize(
    ("factor", "start"), [(1.02, "whole"), pytest.param(1.17, "channels=128", marks=pytest.mark.soak)]
)  # the clock's word is doubted by 1.15
def test_the_whole_one_is_made_first_where_it_is_too_slow_by_no_more_than_the_clock_may_be_off(
    factor: float, start: str, small: Checkpoint, tmp_path: Path
) -> None:
    told = search(asked(small, "none", speed="1"), tmp_path / "any")["told"]
    fastest = max(point["tokens_per_second"] for point in told)
    request = asked(small, "channels=128", speed=f"{fastest * factor:.9f}")
    request = replace(request, settings=request.settings.model_copy(update={"candidates": 1}))
    found = search(request, tmp_path / start)
    assert [each["start"] for each in found["measured"]] == [start]
    looked_at = found["smaller"][0]["divergence"] is not None
    assert looked_at == (start != "whole")


def test_a_smaller_model_that_a_limit_on_the_loss_forbids_is_not_gone_on_with(
    small: Checkpoint, tmp_path: Path
) -> None:
    limit = f"{smallest_file(small) * 0.97:.0f}"
    found = search(asked(small, "channels=192", file_size=limit, quality_loss="0.01%"), tmp_path / "out")
    [smaller] = found["smaller"]
    assert "not gone on with" in smaller["why"] and found["measured"][0]["start"] == "whole"


def test_a_smaller_model_that_alone_is_further_off_is_not_gone_on_with(small: Checkpoint, tmp_path: Path) -> None:
    found = search(asked(small, "layers=1", file_size=f"{smallest_file(small) * 1.4:.0f}"), tmp_path / "out")
    [smaller] = found["smaller"]
    best = next(each for each in found["measured"] if each["chosen"])
    assert best["start"] == "whole" and best["figures"]["divergence"]["value"] < smaller["divergence"]
    assert smaller["told"] is None and "not gone on with" in smaller["why"]


def on_grid(model: Checkpoint, kind: str, out: Path) -> Checkpoint:
    """The same model, its matrices' numbers those of a format."""
    made = model.load()
    with torch.no_grad():
        for name in matrices(model):
            weight = made.get_parameter(name)
            weight.copy_(round_plainly(weight.data, FORMATS[kind]).values)
    write_gguf(made, model.tokenizer, out)
    return Checkpoint.open(out)


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_a_format_holds_what_was_rounded_to_it_and_nothing_else(kind: str) -> None:
    torch.manual_seed(0)
    weight, form = torch.randn(40, 128), FORMATS[kind]
    assert not holds(form, weight)
    assert holds(form, round_plainly(weight, form).values)


def test_weights_that_a_format_holds_stay_as_they_are_among_others(small: Checkpoint, tmp_path: Path) -> None:
    model = on_grid(small, "q4_0", tmp_path / "grid.gguf")
    forms = {name: "q4_0" if "feedforward" in name else "q8_0" for name in matrices(model)}
    quantize_model(model, forms | {"blocks.0.attention.query.weight": "iq4_nl"}, TEXT, tmp_path / "made.gguf", 4096)
    before, after = (Checkpoint.open(tmp_path / f"{name}.gguf").load() for name in ("grid", "made"))
    name = "blocks.1.feedforward.up.weight"
    assert torch.equal(before.get_parameter(name), after.get_parameter(name))


def test_formats_of_the_models_own_file_are_tried_unless_some_are_named(small: Checkpoint, tmp_path: Path) -> None:
    quantize_model(small, "q4_1", TEXT, tmp_path / "own.gguf", 4096)
    model = Checkpoint.open(tmp_path / "own.gguf")
    usual = Asked(model, read_target(file_size="1GB"), SearchSettings(), TEXT, OTHER, None, device())
    assert set(usual.types) == {*SearchSettings().types, "q4_1"}
    named = replace(usual, settings=SearchSettings(types=("q4_0",)))
    assert named.types == ("q4_0",)


def test_inputs_are_rounded_as_the_engine_does() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 512) * torch.logspace(0, 1, 512)
    x[:, ::64] *= 100  # what is small beside the largest of its block becomes 0
    theirs = gguf.dequantize(gguf.quantize(x.numpy(), gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0)
    ours = x + input_errors(x, 32)
    np.testing.assert_allclose(ours, theirs, atol=1e-3 * float(x.abs().max()), rtol=0)  # their steps are fp16
    assert (ours == 0).float().mean() > 0.1
    coarse = (x + input_errors(x, 256)).unflatten(1, (-1, 256))
    codes = coarse / coarse.abs().amax(-1, keepdim=True) * 127
    np.testing.assert_allclose(codes, codes.round(), atol=1e-3)


def test_the_engines_own_rounding_is_told(small: Checkpoint, tmp_path: Path) -> None:
    """A file whose weights are the original's to the bit still differs, by what llama.cpp rounds as it computes."""
    model = on_grid(small, "q8_0", tmp_path / "grid.gguf")
    quantize_model(model, dict.fromkeys(matrices(model), "q8_0"), TEXT, tmp_path / "same.gguf", 4096)
    told = sensitivities(model, calibration_rows(model, TEXT, 2048), ("q8_0",))
    assert sum(each["q8_0"] for each in told.rounding.values()) < 1e-6
    documents = documents_of(OTHER, model.tokenizer, 1024, "text", 128)
    found = score_divergence(model.path, tmp_path / "same.gguf", documents, context=128, threads=1)
    measured = found.divergence.sum() / found.counts.sum()
    assert 0.5 < sum(each["q8_0"] for each in told.inputs.values()) / measured < 2
