"""GGUF, out and in, for the families that are more than Llama; llama.cpp computes the same."""

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
from danlu.model.families.bert import BERT
from danlu.model.families.family import Family
from danlu.model.families.gemma import GEMMA3
from danlu.model.families.gpt2 import GPT2
from danlu.model.families.known import FAMILIES, family_for
from danlu.model.families.llama import QWEN2
from danlu.model.families.metadata import ARCHITECTURES, write_metadata
from danlu.model.families.mixtral import MIXTRAL, QWEN2_MOE, QWEN3_MOE
from danlu.model.gguf import write_gguf
from danlu.model.transformer import Decoder
from tests.model.test_gguf import rewrite
from tests.model.tiny import llama_cpp_logits, tiny_tokenizer, tokens

LLAMA = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GEMMA = {**LLAMA, "num_hidden_layers": 7, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
MOE = {**LLAMA, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "router_aux_loss_coef": 0.0}
GPT: dict[str, Any] = {"vocab_size": 320, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
GPT |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
PATTERN = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
STRETCHED = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
QWEN2_SHARED = {**MOE, "shared_expert_intermediate_size": 80}
QWEN3_EXPERTS = {**MOE, "head_dim": 32, "norm_topk_prob": True}
# Name -> (family, config.json): one case for each thing that can differ. Settings of training are not in GGUF: off.
CASES: dict[str, tuple[Family, dict[str, Any]]] = {
    "gemma3": (GEMMA3, {**GEMMA, "rope_parameters": STRETCHED}),
    "gemma3 pattern": (GEMMA3, {**GEMMA, "num_hidden_layers": 4, "layer_types": PATTERN, "rope_local_base_freq": 5e2}),
    "gemma3 no window": (GEMMA3, {**GEMMA, "sliding_window": None, "tie_word_embeddings": False}),
    "gemma3 27b": (GEMMA3, {**GEMMA, "num_hidden_layers": 62, "query_pre_attn_scalar": 16}),
    "gpt2": (GPT2, GPT),
    "gpt2 untied": (GPT2, {**GPT, "n_inner": 96, "tie_word_embeddings": False}),
    "mixtral": (MIXTRAL, {**LLAMA, "num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}),
    "qwen2moe": (QWEN2_MOE, QWEN2_SHARED),
    "qwen2moe no biases": (QWEN2_MOE, {**QWEN2_SHARED, "qkv_bias": False}),
    "qwen3moe": (QWEN3_MOE, QWEN3_EXPERTS),
    "qwen3moe tied": (QWEN3_MOE, {**QWEN3_EXPERTS, "tie_word_embeddings": True, "num_key_value_heads": 1}),
}


def config_of(case: str, **changes: Any) -> ModelConfig:
    family, hf = CASES[case]
    config = family.config(hf)
    assert isinstance(config, ModelConfig)
    return replace(config, **changes)


def random_model(config: ModelConfig, feedforward: float = 1.0) -> Decoder:
    """A model of random weights. `feedforward`: what the feed-forwards' updates are multiplied by."""
    torch.manual_seed(0)
    model = Decoder(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            gain = "norm" in name and name.endswith("weight") and not config.norm_plus_one
            weight.normal_(1.0 if gain else 0.0, 0.2 if weight.dim() == 1 else 0.08)
            if "feedforward_norm_after" in name:
                weight.copy_((1 + weight) * feedforward - 1)
            elif ".down." in name and config.norm_place == "pre":
                weight.mul_(feedforward)
    return model


def logits(model: Decoder) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model.logits(model(tokens()[:1]))[0])


def written(config: ModelConfig, out: Path) -> Path:
    write_gguf(random_model(config), tiny_tokenizer(), out)
    return out


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each architecture."""
    out = tmp_path_factory.mktemp("gguf")
    names = ("gemma3", "gemma3 pattern", "gpt2", "mixtral", "qwen2moe", "qwen3moe")
    return {name: written(config_of(name), out / f"{name}.gguf") for name in names}


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same_and_the_file_holds_the_same_model(case: str, tmp_path: Path) -> None:
    """48 tokens, three times the window.

    llama.cpp looks GELU up in a table of fp16 numbers. Where that is the activation, the feed-forwards' updates are
    made small, so that the table's error of 2^-11 stays below what is asserted; they still move the logits far more.
    """
    pytest.importorskip("llama_cpp")
    family, config = CASES[case][0], config_of(case)
    quiet = 0.02 if config.activation == "gelu_tanh" else 1.0
    model, file = random_model(config, quiet), tmp_path / "m.gguf"
    write_gguf(model, tiny_tokenizer(), file)
    ours, theirs = logits(model), llama_cpp_logits(file, tokens()[0].tolist())
    assert np.abs(ours - theirs).max() <= 1e-4
    assert np.abs(ours - logits(random_model(config, 0.0))).max() > 1e-2

    again = Checkpoint.open(file)
    assert again.config == config
    assert again.model.family is family_for(again.config) is family
    loaded = again.load().state_dict()
    for name, weight in model.state_dict().items():
        if config.norm_plus_one and "norm" in name:
            # These are stored with 1 added, so that the last bits are rounded away.
            assert torch.allclose(loaded[name], weight, atol=1e-7, rtol=0), name
        else:
            assert torch.equal(loaded[name], weight), name


@pytest.mark.parametrize("case", ["gemma3", "gpt2"])
def test_gelu_at_full_strength_is_as_exact_as_the_table_of_llama_cpp(case: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    model, file = random_model(config_of(case)), tmp_path / "m.gguf"
    write_gguf(model, tiny_tokenizer(), file)
    theirs = llama_cpp_logits(file, tokens()[0].tolist())
    assert np.abs(logits(model) - theirs).max() < 5e-3 * theirs.std()


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("gemma3", {"sliding_window": 17}),
        ("gemma3", {"global_layers": (4,)}),
        ("gemma3", {"positions": Rotary(1e6)}),
        ("gemma3 pattern", {"local_positions": Rotary()}),
        ("gemma3 27b", {"attention_scale": 32**-0.5}),
        ("gemma3 no window", {"embedding_scale": 1.0}),
        ("qwen2moe", {"experts": replace(config_of("qwen2moe").experts, normalised=True)}),  # type: ignore[type-var]
        ("qwen3moe", {"experts": replace(config_of("qwen3moe").experts, normalised=False)}),  # type: ignore[type-var]
        ("gpt2", {"norm_epsilon": 1e-2}),
    ],
)
def test_every_setting_of_the_cases_above_counts(case: str, changes: dict[str, Any]) -> None:
    model = random_model(config_of(case), 0.02 if case.startswith("g") else 1.0)
    other = Decoder(config_of(case, **changes)).eval()
    other.load_state_dict(model.state_dict())
    assert np.abs(logits(model) - logits(other)).max() > 1e-3


def test_every_architecture_has_a_family_and_every_family_an_architecture() -> None:
    assert {family.gguf for family in FAMILIES if family.gguf is not None} == set(ARCHITECTURES)


def test_routers_and_learned_positions_stay_exact(tmp_path: Path) -> None:
    for case in ("gpt2", "qwen2moe"):
        write_gguf(random_model(config_of(case)), tiny_tokenizer(), tmp_path / "m.gguf", "f16")
        types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
        for name, kind in types.items():
            exact = "norm" in name or "bias" in name or "gate_inp" in name or "position_embd" in name
            assert kind == ("F32" if exact else "F16"), name
        assert np.abs(llama_cpp_logits(tmp_path / "m.gguf", [5, 6, 7])).max() > 0


def test_no_weight_keeps_the_memory_of_the_tensor_it_was_cut_from(files: dict[str, Path]) -> None:
    for name, weight in Checkpoint.open(files["gpt2"]).load().state_dict().items():
        assert weight.untyped_storage().nbytes() == weight.numel() * weight.element_size(), name


def test_quantised_parts_and_banks_are_dequantised_as_the_gguf_package_does(
    files: dict[str, Path], tmp_path: Path
) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    ours = {
        "gpt2": [f"blocks.1.attention.{part}.weight" for part in ("query", "key", "value")],
        "qwen3moe": ["blocks.1.feedforward.experts.gate.weight"],
    }
    for case, theirs in (("gpt2", "blk.1.attn_qkv.weight"), ("qwen3moe", "blk.1.ffn_gate_exps.weight")):
        tensor = next(tensor for tensor in gguf.GGUFReader(files[case]).tensors if tensor.name == theirs)
        packed = gguf.quantize(np.array(tensor.data), kind)
        file = rewrite(files[case], tmp_path / f"{case}.gguf", {}, {theirs: (kind, packed)})
        weights = Checkpoint.open(file).load().state_dict()
        assert np.array_equal(np.concatenate([weights[name] for name in ours[case]]), gguf.dequantize(packed, kind))


def test_a_window_of_experts_limits_the_context_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of("mixtral", sliding_window=32)
    again = Checkpoint.open(written(config, tmp_path / "m.gguf"))
    assert "no sliding window for llama: the context is limited to 32" in capsys.readouterr().err
    assert again.config == replace(config, context=32)
    assert again.family == "mixtral"


def test_the_window_of_gemma_limits_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Checkpoint.open(written(config_of("gemma3"), tmp_path / "m.gguf")).config.context == 128
    assert capsys.readouterr().err == ""


def scaled(kind: Any, **numbers: Any) -> Rotary:
    return Rotary(scaling=RopeScaling(kind, 4.0, 32, **numbers))


@pytest.mark.parametrize(
    ("case", "changes", "complaint"),
    [
        ("gemma3", {"activation": "gelu"}, "gemma3 with the activation gelu_tanh, not gelu"),
        ("gemma3", {"attention_scale": 0.1}, "scales gemma3's scores by 0.176777 at this shape, not by 0.1"),
        ("gemma3 27b", {"attention_scale": 32**-0.5}, "scales gemma3's scores by 0.25 at this shape, not by 0.176777"),
        ("gemma3", {"positions": scaled("yarn")}, "no yarn rope scaling for gemma3"),
        ("gemma3", {"positions": scaled("llama3")}, "no llama3 rope scaling for gemma3"),
        ("gemma3", {"local_positions": scaled("yarn")}, "no rope scaling for gemma3's layers with a window"),
        ("gemma3", {"attention_bias": True, "output_bias": True}, "gemma3 has no attention biases"),
        ("gpt2", {"activation": "relu"}, "gpt2 with the activation gelu_tanh, not relu"),
        ("mixtral", {"activation": "gelu"}, "llama with the activation silu, not gelu"),
        ("qwen2moe", {"tied": True}, "qwen2moe has a head of its own"),
        ("qwen2moe", {"head_width": 32}, "qwen2moe divides the width among the heads; here are 4 heads of 32 features"),
        ("qwen2moe", {"experts.normalised": True}, "qwen2moe does not scale the weights of a token's experts"),
        ("qwen2moe", {"experts.shared_width": 0}, "qwen2moe has an expert that every token takes; here is none"),
        ("qwen3moe", {"experts.normalised": False}, "qwen3moe scales the weights of a token's experts to sum to 1"),
        ("qwen3moe", {"experts.layers": (0, 2)}, r"qwen3moe has a mixture in every layer; .* only layers \[0, 2\]"),
        ("qwen3moe", {"attention_bias": True, "output_bias": True}, "qwen3moe has no attention biases"),
        ("mixtral", {"experts.normalised": False}, "no known architecture computes this"),
        ("mixtral", {"experts.capacity": 4}, "no known architecture computes this"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(case: str, changes: dict[str, Any], complaint: str) -> None:
    config = config_of(case, **{name: value for name, value in changes.items() if "." not in name})
    inner = {name.partition(".")[2]: value for name, value in changes.items() if "." in name}
    if inner:
        assert config.experts is not None
        config = replace(config, experts=replace(config.experts, **inner))
    with pytest.raises(DanluError, match=complaint):
        write_metadata(config)


def test_models_without_an_architecture_in_gguf_are_refused_with_the_known_ones() -> None:
    hf = {**LLAMA, "type_vocab_size": 2}
    del hf["num_key_value_heads"]
    with pytest.raises(DanluError, match=r"GGUF has no BertForMaskedLM.*\n.*gemma3, gpt2, llama"):
        write_metadata(BERT[0].config(hf))  # type: ignore[arg-type]
    qwen2 = replace(config_of("mixtral"), experts=None, attention_bias=True, head_width=32)
    assert family_for(qwen2) is QWEN2
    with pytest.raises(DanluError, match="qwen2 divides the width among the heads"):
        write_metadata(qwen2)


BIAS = {f"blk.{layer}.attn_{part}.bias": np.ones(size, np.float32) for layer in range(3) for part, size in [("q", 64)]}


@pytest.mark.parametrize(
    ("case", "metadata", "tensors", "complaint"),
    [
        ("gemma3", {"gemma3.final_logit_softcapping": 30.0}, {}, "softcapping is 30.0, which may change"),
        ("gemma3", {"gemma3.attention.sliding_window_pattern": [True] * 6}, {}, "lists 6 layers, but the model has 7"),
        ("gemma3", {"gemma3.attention.sliding_window_pattern": "even"}, {}, "must be a whole number"),
        ("gemma3", {"gemma3.rope.scaling.type": "yarn", "gemma3.rope.scaling.original_context_length": 32}, {}, "yarn"),
        ("gemma3", {"gemma3.attention.causal": False}, {}, "computes gemma3 as a causal decoder"),
        (
            "gemma3",
            {},
            {"blk.0.post_ffw_norm.weight": None},
            r"blk\.0\.post_ffw_norm\.weight of shape \[64\] is missing",
        ),
        ("gpt2", {"gpt2.attention.sliding_window": 16}, {}, "sliding_window is 16, which may change"),
        ("gpt2", {"gpt2.context_length": 64}, {}, r"position_embd\.weight has shape \[128, 64\].*\[64, 64\]"),
        (
            "gpt2",
            {"gpt2.attention.key_length": 8, "gpt2.attention.value_length": 8},
            {},
            "names the architecture gpt2, but holds .* another",
        ),
        ("gpt2", {"gpt2.attention.layer_norm_epsilon": None}, {}, "lack gpt2.attention.layer_norm_epsilon"),
        ("gpt2", {}, {"blk.0.attn_qkv.weight": np.zeros((190, 64), np.float32)}, r"has shape \[190, 64\].*\[64, 64\]"),
        ("mixtral", {"llama.expert_used_count": None}, {}, "lack llama.expert_used_count"),
        ("mixtral", {"llama.expert_used_count": 9}, {}, "9 of 8 experts cannot be chosen"),
        ("mixtral", {"llama.expert_count": 7}, {}, r"has shape \[8, 64\].*\[7, 64\]"),
        ("mixtral", {"llama.expert_count": 0}, {}, r"ffn_gate_inp\.weight is not known"),
        ("mixtral", {}, BIAS, "names the architecture llama, but holds tensors or keys of another one"),
        ("qwen2moe", {"qwen2moe.expert_weights_scale": 2.5}, {}, "expert_weights_scale is 2.5, which may change"),
        ("qwen2moe", {"qwen2moe.expert_feed_forward_length": 40}, {}, r"has shape \[8, 48, 64\].*\[8, 40, 64\]"),
        ("qwen3moe", {"qwen3moe.expert_gating_func": 2}, {}, "expert_gating_func is 2, which may change"),
        ("qwen3moe", {"qwen3moe.block_count": 2**31}, {}, "block_count is 2,147,483,648, but the file has only"),
        ("qwen3moe", {}, {"blk.0.exp_probs_b.bias": np.zeros(8, np.float32)}, "exp_probs_b.bias is not known"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    case: str,
    metadata: dict[str, Any],
    tensors: dict[str, Any],
    complaint: str,
    files: dict[str, Path],
    tmp_path: Path,
) -> None:
    file = rewrite(files[case], tmp_path / "other.gguf", metadata, tensors)
    with pytest.raises(DanluError, match=complaint):
        Checkpoint.open(file)


def test_gemma_files_of_other_makers_name_neither_pattern_nor_local_base(
    files: dict[str, Path], tmp_path: Path
) -> None:
    assert "gemma3.attention.sliding_window_pattern" not in read_header(files["gemma3"]).metadata
    bare = {"gemma3.rope.freq_base_swa": None, "gemma3.vocab_size": None}
    assert Checkpoint.open(rewrite(files["gemma3"], tmp_path / "bare.gguf", bare)).config == config_of("gemma3")
    third = {**bare, "gemma3.attention.sliding_window_pattern": 3}
    config = Checkpoint.open(rewrite(files["gemma3"], tmp_path / "third.gguf", third)).config
    assert config.global_layers == (2, 5)
    everywhere = {**bare, "gemma3.attention.sliding_window": None}
    config = Checkpoint.open(rewrite(files["gemma3"], tmp_path / "everywhere.gguf", everywhere)).config
    assert (config.sliding_window, config.global_layers) == (None, ())


def test_qwen2_files_of_other_makers_leave_out_the_experts_widths_and_a_dimension(
    files: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of("qwen2moe", feedforward_width=144)
    experts = replace(config.experts, shared_width=144)  # type: ignore[type-var]
    config = replace(config, experts=experts)  # 48 = 144 / 3 chosen
    file = written(config, tmp_path / "ours.gguf")
    old = {"qwen2moe.expert_feed_forward_length": None, "qwen2moe.expert_shared_feed_forward_length": None}
    gate = next(tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == "blk.1.ffn_gate_inp_shexp.weight")
    assert gate.data.shape == (64,)
    matrix = {gate.name: np.array(gate.data)[None]}
    ours, theirs = Checkpoint.open(file), Checkpoint.open(rewrite(file, tmp_path / "old.gguf", old, matrix))
    assert theirs.config == config
    weights = theirs.load().state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in ours.load().state_dict().items())


@pytest.mark.parametrize("case", ["gemma3 pattern", "gpt2", "qwen2moe"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_one_wrong_byte_never_ends_in_a_traceback(
    case: str, place: float, value: int, files: dict[str, Path], tmp_path: Path
) -> None:
    content = bytearray(files[case].read_bytes())
    content[int(place * read_header(files[case]).tensors[0].offset)] = value
    (tmp_path / "other.gguf").write_bytes(content)
    try:
        Checkpoint.open(tmp_path / "other.gguf").load()
    except DanluError as error:
        assert "other.gguf" in str(error) or "model config" in str(error)
