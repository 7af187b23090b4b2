"""Gemma 3, text only (arXiv:2503.19786): norms around every half of a block, windows in five layers of six.

Source: transformers' modeling_gemma3.py and the published config.json.
"""

from __future__ import annotations

from typing import Any

from danlu.model.config import ModelConfig, Rotary
from danlu.model.families.family import Family
from danlu.model.families.fields import ACTIVATIONS, Fields
from danlu.model.families.llama import GGUF_WEIGHTS, WEIGHTS, layer_types, read_decoder, read_window, write_decoder
from danlu.model.families.rope import read_parameters, write_parameters
from danlu.model.names import Place

PATTERN = 6  # where nothing else is said, every sixth layer sees everything


def _read(hf: Fields) -> ModelConfig:
    biases, layers = hf.flag("attention_bias"), hf.integer("num_hidden_layers")
    hf.only("use_bidirectional_attention", False)
    for capped in ("attn_logit_softcapping", "final_logit_softcapping"):
        hf.only(capped)
    every = hf.integer("sliding_window_pattern", hf.integer("_sliding_window_pattern", PATTERN))
    if hf.get("layer_types") is None:
        full = [(layer + 1) % every == 0 for layer in range(layers)]
        hf.hf["layer_types"] = ["full_attention" if whole else "sliding_attention" for whole in full]
    hf.hf.setdefault("tie_word_embeddings", True)
    positions, local = _read_rope(hf)
    return read_decoder(
        hf,
        positions=positions,
        local_positions=local,
        attention_bias=biases,
        output_bias=biases,
        attention_scale=hf.number("query_pre_attn_scalar", 256) ** -0.5,
        embedding_scale=hf.integer("hidden_size") ** 0.5,
        norm_place="both",
        norm_plus_one=True,
        qk_norm=True,
        activation=hf.activation("hidden_activation", "gelu_pytorch_tanh"),
        **read_window(hf, on=True),
    )


def _read_rope(hf: Fields) -> tuple[Rotary, Rotary | None]:
    """Positions of the layers that see everything, and of those with a window."""
    kinds = hf.get("rope_parameters", {})
    whole = kinds.get("full_attention") or hf.get("rope_scaling") or {}
    local = kinds.get("sliding_attention") or {}
    hf.ignore("rope_scaling")
    base, local_base = hf.number("rope_theta", 1_000_000.0), hf.number("rope_local_base_freq", 10_000.0)
    return read_parameters(whole, base, hf.where), read_parameters(local, local_base, hf.where)


def _write(config: ModelConfig) -> dict[str, Any]:
    hf = write_decoder(config)
    assert isinstance(config.positions, Rotary) and config.local_positions is not None
    for key in ("rope_theta", "rope_scaling", "hidden_act"):
        del hf[key]
    return hf | {
        "hidden_activation": ACTIVATIONS[config.activation],
        "attention_bias": config.attention_bias,
        "query_pre_attn_scalar": _whole((config.attention_scale or 0.0625) ** -2),
        "sliding_window": config.sliding_window,
        "layer_types": layer_types(config),
        "rope_parameters": {
            "full_attention": write_parameters(config.positions),
            "sliding_attention": write_parameters(config.local_positions),
        },
    }


def _whole(number: float) -> float | int:
    """Squares of roots are a little off."""
    return round(number) if abs(number - round(number)) < 1e-6 else number


# Its names say "post attention" where Llama's mean "before the feed-forward".
NORMS = {
    "blocks.{i}.attention_norm_after": "model.layers.{i}.post_attention_layernorm",
    "blocks.{i}.feedforward_norm": "model.layers.{i}.pre_feedforward_layernorm",
    "blocks.{i}.feedforward_norm_after": "model.layers.{i}.post_feedforward_layernorm",
}
# llama.cpp's norms multiply by the weight itself, so a file holds it with the 1 added.
GGUF_NORMS = {
    ours: Place(theirs, plus=1.0)
    for ours, theirs in {
        "blocks.{i}.attention_norm": "blk.{i}.attn_norm",
        "blocks.{i}.attention_norm_after": "blk.{i}.post_attention_norm",
        "blocks.{i}.feedforward_norm": "blk.{i}.ffn_norm",
        "blocks.{i}.feedforward_norm_after": "blk.{i}.post_ffw_norm",
        "blocks.{i}.attention.query_norm": "blk.{i}.attn_q_norm",
        "blocks.{i}.attention.key_norm": "blk.{i}.attn_k_norm",
        "norm": "output_norm",
    }.items()
}

GEMMA3 = Family(
    "Gemma3ForCausalLM",
    "gemma3_text",
    _read,
    _write,
    {**WEIGHTS, **NORMS},
    gguf="gemma3",
    gguf_weights={**GGUF_WEIGHTS, **GGUF_NORMS},
)
