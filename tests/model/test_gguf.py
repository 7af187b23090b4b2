from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from danlu.errors import DanluError
from danlu.gguf_header import read_header
from danlu.model.checkpoint import Checkpoint
from danlu.model.config import ModelConfig, RopeScaling, Rotary
from danlu.model.gguf import Type, read_config, stored_weights, write_gguf
from danlu.model.position import frequencies
from danlu.model.transformer import Decoder
from tests.model.tiny import tiny_tokenizer

CONFIG = ModelConfig(
    vocab_size=300, width=64, layers=2, heads=4, kv_heads=2, head_width=16, feedforward_width=256, context=128
)


def random_model(**changes: Any) -> Decoder:
    torch.manual_seed(3)
    model = Decoder(replace(CONFIG, **changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.5 if weight.dim() == 1 else 0.0, 0.1)
    return model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(random_model(), tiny_tokenizer(), out)
    return out


def rewrite(source: Path, out: Path, metadata: dict[str, Any], tensors: dict[str, Any] | None = None) -> Path:
    """A copy with other metadata (None drops a key) and other tensors: an array, (type, bytes), or None to drop it."""
    reader = gguf.GGUFReader(source)
    facts = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")} | metadata
    writer = gguf.GGUFWriter(out, facts.pop("general.architecture"))
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for name, value in facts.items():
        if value is not None:
            add.get(type(value), writer.add_array)(name, value)
    kept = {tensor.name: (tensor.tensor_type, tensor.data) for tensor in reader.tensors} | (tensors or {})
    for name, value in kept.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[1], raw_dtype=value[0])
        elif value is not None:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(("dtype", "kind"), [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_written_weights_come_back_rounded_once(dtype: Type, kind: torch.dtype, tmp_path: Path) -> None:
    model = random_model()
    write_gguf(model, tiny_tokenizer(), tmp_path / "m.gguf", dtype)
    loaded = Checkpoint.open(tmp_path / "m.gguf").load().state_dict()
    for name, weight in model.state_dict().items():
        expected = weight if weight.dim() == 1 else weight.to(kind).float()
        assert torch.equal(loaded[name], expected), name
    stored = {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert stored["blk.0.attn_norm.weight"] == "f32"
    assert stored["blk.0.attn_q.weight"] == stored["token_embd.weight"] == dtype


def test_the_file_carries_the_tokenizer_and_the_chat_template(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer, file = tiny_tokenizer(), tmp_path / "m.gguf"
    write_gguf(random_model(), tokenizer, file)
    model = llama_cpp.Llama(str(file), n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False)
    assert (model.token_bos(), model.token_eos(), model.n_vocab()) == (tokenizer.bos_id, tokenizer.eos_id, 300)
    assert model.metadata["tokenizer.chat_template"] == tokenizer.chat_template
    text = "<|im_start|>user\nthe 丹炉<|im_end|>"
    assert model.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode(text)
    model.close()
    again = Checkpoint.open(file).tokenizer
    assert (again.stop_ids, again.pad_id, again.adds_bos) == (tokenizer.stop_ids, 0, False)
    written = again.gguf_metadata(300)
    assert written == {**tokenizer.gguf_metadata(300)}
    assert written["ggml.token_type"][-41:] == [1] + [5] * 40


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_quantised_weights_are_dequantised_as_the_gguf_package_does(
    name: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("danlu.model.gguf.PIECE", 1000)  # several pieces a tensor, the last one smaller
    kind = gguf.GGMLQuantizationType[name]
    weight = random_model().state_dict()["blocks.1.feedforward.gate.weight"].numpy()
    packed = gguf.quantize(weight, kind)
    file = rewrite(tiny, tmp_path / "q.gguf", {}, {"blk.1.ffn_gate.weight": (kind, packed)})
    loaded = Checkpoint.open(file).load().state_dict()["blocks.1.feedforward.gate.weight"]
    assert np.array_equal(loaded.numpy(), gguf.dequantize(packed, kind))


def test_smollm2_is_dequantised_as_the_gguf_package_does(smollm2: Path) -> None:
    header = read_header(smollm2)
    weights = stored_weights(header, *read_config(header)).found
    places = {tensor.name: tensor for tensor in header.tensors}
    names = {"blocks.7.feedforward.down": "blk.7.ffn_down", "blocks.0.attention.value": "blk.0.attn_v"}
    for ours, theirs in names.items():
        place = places[f"{theirs}.weight"]
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(place.type)]
        row = place.shape[1] // block * size
        packed = np.fromfile(smollm2, np.uint8, place.shape[0] * row, offset=place.offset).reshape(-1, row)
        expected = gguf.dequantize(packed, gguf.GGMLQuantizationType.Q4_1)
        assert np.array_equal(weights[f"{ours}.weight"].read(torch.float32).numpy(), expected)


def test_numbers_beyond_fp16_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    model = random_model()
    with torch.no_grad():
        model.blocks[1].feedforward.up.weight[3, 5] = 1e6
    with pytest.raises(DanluError, match=r"blk\.1\.ffn_up\.weight holds numbers that fp16 cannot.*\n.*bf16"):
        write_gguf(model, tiny_tokenizer(), tmp_path / "m.gguf", "f16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"activation": "gelu"}, "with the activation silu, not gelu"),
        ({"qk_norm": True, "attention_bias": True, "output_bias": True}, "qwen3 has no attention biases"),
        (
            {"attention_bias": True, "positions": Rotary(scaling=RopeScaling("llama3", 8.0, 32))},
            "no llama3 rope scaling for qwen2",
        ),
        (
            {"positions": Rotary(scaling=RopeScaling("yarn", 8.0, 32, beta_fast=8.0))},
            "beta_fast 32 and beta_slow 1 only",
        ),
        ({"vocab_size": 100}, "vocabulary ends at 100"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(DanluError, match=complaint):
        write_gguf(random_model(**changes), tiny_tokenizer(), tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_sliding_window_limits_the_context_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gguf(random_model(sliding_window=32), tiny_tokenizer(), tmp_path / "m.gguf")
    assert "no sliding window for llama: the context is limited to 32" in capsys.readouterr().err
    config = Checkpoint.open(tmp_path / "m.gguf").config
    assert (config.context, config.sliding_window) == (32, 32)


def test_the_scaling_of_llama_3_is_read_from_its_factors(tiny: Path, tmp_path: Path) -> None:
    """Files of other makers hold only the table of factors."""
    positions = Rotary(500_000.0, RopeScaling("llama3", 32.0, 8192))
    factors = frequencies(replace(positions, scaling=None), 64)[0] / frequencies(positions, 64)[0]
    model = random_model(width=256, head_width=64, positions=positions)
    write_gguf(model, tiny_tokenizer(), tmp_path / "ours.gguf")
    assert torch.equal(
        torch.tensor(next(t for t in gguf.GGUFReader(tmp_path / "ours.gguf").tensors if "rope" in t.name).data), factors
    )
    theirs = rewrite(tmp_path / "ours.gguf", tmp_path / "theirs.gguf", {"danlu.llama3_scaling": None})
    assert Checkpoint.open(theirs).config == model.config
    other = {"rope_freqs.weight": (factors * 1.1).numpy()}
    with pytest.raises(DanluError, match="not those of Llama 3"):
        Checkpoint.open(rewrite(theirs, tmp_path / "other.gguf", {}, other))


@pytest.mark.parametrize(
    ("metadata", "tensors", "complaint"),
    [
        (
            {"general.architecture": "mamba"},
            {},
            "architecture mamba is not known\n.*known: gemma3, gpt2, llama, qwen2, qwen2moe, qwen3, qwen3moe",
        ),
        ({"llama.expert_group_count": 8}, {}, "llama.expert_group_count is 8, which may change the computation"),
        ({"llama.expert_count": 8}, {}, "lack llama.expert_used_count"),
        ({"llama.attention.causal": False}, {}, "computes llama as a causal decoder"),
        ({"llama.block_count": 3}, {}, r"gguf: blk\.2\.attn_norm\.weight of shape \[64\] is missing"),
        ({"llama.block_count": None}, {}, "lack llama.block_count"),
        ({"llama.embedding_length": 128}, {}, r"blk\.0\.attn_norm\.weight has shape \[64\].*\[128\]"),
        ({"llama.rope.dimension_count": 8}, {}, "different widths"),
        ({"llama.attention.head_count_kv": [2, 1]}, {}, "must be a whole number"),
        ({"llama.rope.scaling.type": "longrope"}, {}, "rope scaling longrope is not known"),
        ({"llama.block_count": 2**31}, {}, "block_count is 2,147,483,648, but the file has only 21 tensors"),
        ({"llama.embedding_length": 2**31, "llama.feed_forward_length": 2**31}, {}, "impossible size"),
        ({"split.count": 2}, {}, "is one part of several"),
        ({}, {"blk.0.ffn_gate_inp.weight": np.zeros((8, 64), np.float32)}, "ffn_gate_inp.weight is not known"),
        ({}, {"blk.0.attn_q.weight": None}, r"blk\.0\.attn_q\.weight of shape \[64, 64\] is missing"),
        ({}, {"token_embd.weight": None}, "no token_embd.weight"),
        ({}, {"blk.0.attn_k.weight": np.zeros((64, 64), np.float32)}, r"has shape \[64, 64\].*\[32, 64\]"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    metadata: dict[str, Any], tensors: dict[str, Any], complaint: str, tiny: Path, tmp_path: Path
) -> None:
    file = rewrite(tiny, tmp_path / "other.gguf", metadata, tensors)
    with pytest.raises(DanluError, match=complaint):
        Checkpoint.open(file)


def test_linear_scaling_in_its_two_spellings(tiny: Path, tmp_path: Path) -> None:
    new = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}
    for metadata in (new, {"llama.rope.scale_linear": 2.5}):
        config = Checkpoint.open(rewrite(tiny, tmp_path / "m.gguf", metadata)).config
        assert config.positions == Rotary(scaling=RopeScaling("linear", 2.5))
    none = {"llama.rope.scaling.type": "none"}
    assert Checkpoint.open(rewrite(tiny, tmp_path / "m.gguf", none)).config.positions == Rotary()


def test_a_file_cut_short_in_its_data_says_where(tiny: Path, tmp_path: Path) -> None:
    whole, cut = tiny.read_bytes(), tmp_path / "cut.gguf"
    for length in (len(whole) - 40, len(whole) // 2, read_header(tiny).tensors[0].offset + 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(DanluError, match=f"is cut short: .* ends at byte .*, but the file has {length:,}"):
            Checkpoint.open(cut)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_one_wrong_byte_never_ends_in_a_traceback(place: float, value: int, tiny: Path, tmp_path: Path) -> None:
    content = bytearray(tiny.read_bytes())
    content[int(place * read_header(tiny).tensors[0].offset)] = value
    (tmp_path / "other.gguf").write_bytes(content)
    try:
        Checkpoint.open(tmp_path / "other.gguf").load()
    except DanluError as error:
        assert "other.gguf" in str(error) or "model config" in str(error)


def test_other_numbers_of_that_scaling_are_kept_in_a_key_of_our_own(tmp_path: Path) -> None:
    model = random_model(positions=Rotary(scaling=RopeScaling("llama3", 4.0, 64, 1.5, 6.0)))
    write_gguf(model, tiny_tokenizer(), tmp_path / "m.gguf")
    assert read_header(tmp_path / "m.gguf").need_all("danlu.llama3_scaling", float) == [4.0, 64.0, 1.5, 6.0]
    assert Checkpoint.open(tmp_path / "m.gguf").config == model.config
