"""Models in the forms of other programs: each is loaded there and gives what the original gives, or is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from pydoc_data import topics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from danlu.artifact import Artifact
from danlu.compress.exports import onnx
from danlu.compress.exports.compressed_tensors import scheme_of, write
from danlu.compress.exports.export import Request, export_model
from danlu.compress.exports.graph import graph_of
from danlu.compress.exports.inputs import by_token
from danlu.compress.exports.quality import quality
from danlu.compress.exports.running import compare_run
from danlu.compress.quantizing.formats.grouped import FLOAT8, Grouped
from danlu.compress.quantizing.rounding import round_plainly
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint, StoredModel, save_checkpoint
from danlu.model.compressed import pack, unpack
from danlu.model.config import ModelConfig, Rotary
from danlu.model.generate import generate
from danlu.model.transformer import Decoder
from danlu.tokenizer import Tokenizer

WHOLE = "\n\n".join(topics.topics[topic] for topic in sorted(topics.topics))  # of Python's language reference
TEXT, OTHER = WHOLE[:60_000], WHOLE[200_000:203_000]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """SmolLM2's first two layers, as a Hugging Face directory."""
    whole = Checkpoint.open(smollm2)
    cut = Decoder(replace(whole.config, layers=2, context=512))
    makers = whole.model.makers(torch.float32)
    cut.load_state_dict({name: makers[name]() for name in cut.state_dict()}, assign=True)
    out = tmp_path_factory.mktemp("cut") / "model"
    save_checkpoint(cut.eval(), whole.tokenizer, out, torch.bfloat16)
    return out


def few_bits(model: Path, kind: str, out: Path) -> dict[str, dict]:
    pytest.importorskip("compressed_tensors", reason="the extra danlu[few-bits] is not installed")
    pytest.importorskip("transformers")
    made = export_model(Request(model, "compressed-tensors", kind, out, TEXT, OTHER, tokens=1024))
    assert Artifact.load(out).figures == made.figures
    return made.figures


def test_four_bits_load_in_transformers_and_in_danlu(model: Path, tmp_path: Path) -> None:
    figures = few_bits(model, "w4a16-g32", tmp_path / "out")
    assert figures["difference"]["value"] <= 1e-4, "what transformers computes of the directory is what Danlu does"
    assert figures["divergence"]["value"] < 0.1
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said["format"] == "pack-quantized" and said["ignore"] == ["lm_head"]
    small, original = Checkpoint.open(tmp_path / "out"), Checkpoint.open(model)
    name = "blocks.1.feedforward.down.weight"
    made, before = (checkpoint.model.makers()[name]() for checkpoint in (small, original))
    stem = tmp_path / "out" / "model.safetensors"
    steps = load_file(stem)["model.layers.1.mlp.down_proj.weight_scale"].float()
    codes = made.view(len(made), -1, 32) / steps[..., None]
    assert torch.equal(codes, codes.round()) and codes.abs().max() <= 8
    assert 0.02 < float((made - before).norm() / before.norm()) < 0.25
    assert len(list(generate(small.load(), [5, 6, 7], max_new_tokens=3))) == 3, "the next command takes it"


@pytest.mark.soak  # its like with whole numbers stays
def test_floats_of_eight_bits_load_in_transformers(model: Path, tmp_path: Path) -> None:
    figures = few_bits(model, "fp8", tmp_path / "out")
    assert figures["difference"]["value"] <= 1e-4 and figures["divergence"]["value"] < 0.05


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["w8a16", "w8a8", "w4a16"])
def test_other_types_load_in_transformers(model: Path, tmp_path: Path, kind: str) -> None:
    figures = few_bits(model, kind, tmp_path / "out")
    assert figures["difference"]["value"] <= 1e-4
    assert figures["divergence"]["value"] < {"w8a16": 0.01, "w8a8": 0.05, "w4a16": 0.1}[kind]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(1, 70), st.integers(0, 2**31))
def test_what_is_packed_is_unpacked(bits: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (3, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    words = pack(codes, bits)
    assert words.shape == (3, -(-columns * bits // 32))
    assert torch.equal(unpack(words, bits, columns), codes)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_words_are_those_of_compressed_tensors(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(0, 2**bits, (5, 96), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    theirs = helpers.pack_to_int32((codes.int() - 2 ** (bits - 1)).to(torch.int8), bits)
    assert torch.equal(pack(codes, bits), theirs)


def test_floats_are_rounded_as_torch_rounds_them() -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    form = Grouped(8, None, torch.float32, floating=True).for_matrix(weight, torch.ones(40))
    rounded = round_plainly(weight, form)
    steps = weight.abs().amax(1, keepdim=True) / torch.finfo(FLOAT8).max
    assert torch.equal(rounded.values, (weight / steps).to(FLOAT8).float() * steps)


@pytest.mark.parametrize("floating", [False, True])
def test_inputs_are_rounded_as_compressed_tensors_rounds_them(floating: bool) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    x[0, 1] *= 1e3
    x[1, 2] = 0
    kind = "float" if floating else "int"
    said = QuantizationArgs(num_bits=8, type=kind, symmetric=True, strategy="token", dynamic=True)
    scale, zero = compute_dynamic_scales_and_zp(x, said, torch.nn.Linear(64, 1))
    theirs = fake_quantize(x, scale, zero, said)
    torch.testing.assert_close(by_token(x, Grouped(8, None, floating=floating)), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("inputs", [Grouped(8, None), Grouped(8, None, floating=True)])
def test_inputs_of_few_bits_count_in_what_is_measured(model: Path, inputs: Grouped) -> None:
    """The weights are the original's, so that without them nothing would be lost."""
    stored, tokenizer = StoredModel.open(model), Tokenizer.load(model)
    found = quality(stored, stored, tokenizer, OTHER, inputs)["divergence"]
    assert 1e-4 < found["value"] < 0.1 and found["by"].endswith("inputs in few bits too")
    assert abs(quality(stored, stored, tokenizer, OTHER)["divergence"]["value"]) < 1e-6


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A tiny model of four bits."""
    out = tmp_path_factory.mktemp("small")
    write(StoredModel.open(tiny_model), Tokenizer.load(tiny_model), scheme_of("w4a16-g32"), TEXT, out, tokens=512)
    return out


@pytest.mark.parametrize(
    "fault, complaint",
    [
        ("steps gone", "up_proj.weight_.* is not known"),
        ("steps of another matrix", "do not divide"),
        ("another method", "quantization_config is of the method gptq"),
    ],
)
def test_a_damaged_directory_is_refused(tmp_path: Path, small: Path, fault: str, complaint: str) -> None:
    out = shutil.copytree(small, tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    tensors = load_file(out / "model.safetensors")
    if fault == "steps gone":
        del tensors[name]
    elif fault == "steps of another matrix":
        tensors[name] = tensors[name][:-1].clone()
    else:
        config = json.loads((out / "config.json").read_text())
        config["quantization_config"]["quant_method"] = "gptq"
        (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(DanluError, match=complaint):
        Checkpoint.open(out).load()


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"calibration": None}, "needs a text"),
        ({"heldout": TEXT}, "100% of the held-out text is in the calibration text"),
        ({"heldout": TEXT[10_000:20_000]}, "100% of the held-out text is in the calibration text"),
        ({"calibration": "too short"}, "4,096 are needed"),
        ({"type": "w2a2"}, "is no type of compressed-tensors"),
        ({"kind": "onnx", "type": "f32"}, "has no effect"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(
    tiny_model: Path, tmp_path: Path, change: dict[str, object], complaint: str
) -> None:
    request = Request(tiny_model, "compressed-tensors", "w4a16-g32", tmp_path / "out", TEXT, OTHER)
    with pytest.raises(DanluError, match=complaint):
        export_model(replace(request, **change))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_an_engine_that_is_not_there_is_named(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    with pytest.raises(DanluError, match=r"danlu\[onnx\]"):
        export_model(Request(tiny_model, "onnx", None, tmp_path / "out"))


def windowed(tmp_path: Path) -> Decoder:
    """Two layers, one with a window that the compared rows are longer than, whose weights differ enough to matter."""
    torch.manual_seed(0)
    shape = {"width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 16, "feedforward_width": 96}
    config = ModelConfig(
        vocab_size=200, context=128, tied=True, sliding_window=9, global_layers=(1,), positions=Rotary(5e3), **shape
    )
    made = Decoder(config).eval()
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.2)
    return made


def test_onnxruntime_computes_what_the_model_does_and_a_fault_is_found(tmp_path: Path) -> None:
    for package in onnx.NEEDED:
        pytest.importorskip(package, reason="the extra danlu[onnx] is not installed")
    model = windowed(tmp_path)
    graph = graph_of(model, None, "model")
    file = onnx.write(graph, tmp_path, "model")
    run = onnx.runner(file)
    figures = compare_run(graph, model, None, run, exact=True)
    assert figures["difference"]["value"] < 1e-5 and figures["same_greedy_tokens"]["value"] == 24
    with torch.no_grad():
        model.blocks[1].attention.query.weight[0] *= 1.5
    with pytest.raises(DanluError, match="apart from the original's"):
        compare_run(graph, model, None, run, exact=True)
    whole = file.stat().st_size
    onnx.quantize(file)
    assert file.stat().st_size < whole - 0.7 * sum(weight.nbytes for weight in model.blocks.parameters())
    with torch.no_grad():
        model.blocks[1].attention.query.weight[0] /= 1.5
    assert compare_run(graph, model, None, onnx.runner(file), exact=False)["difference"]["value"] < 0.25


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["onnx", "openvino", "executorch"])
def test_a_directory_is_run_by_its_engine(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("onnxruntime" if kind == "onnx" else kind, reason=f"the extra danlu[{kind}] is not installed")
    made = export_model(Request(tiny_model, kind, "f32", tmp_path / "out"))  # type: ignore[arg-type]
    assert made.figures["difference"]["value"] < 1e-5 and made.figures["same_greedy_tokens"]["value"] == 24
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(
    "kind", ["int4", "int8-inputs", *(pytest.param(kind, marks=pytest.mark.soak) for kind in ("int8", "fp8"))]
)
def test_torch_computes_in_few_bits(model: Path, kind: str) -> None:
    pytest.importorskip("torchao", reason="the extra danlu[float8] is not installed")
    from danlu.compress.quantizing.torch_types import measure

    figures = measure(Checkpoint.open(model), kind, OTHER)  # type: ignore[arg-type]
    bounds = {"int8": (0.005, 2), "int8-inputs": (0.05, 2), "int4": (0.2, 2), "fp8": (0.05, 2)}
    assert 0 < figures["divergence"]["value"] < bounds[kind][0]
