"""The Llama family and its close kin: Llama 1 to 3, SmolLM, Mistral, Qwen2 and Qwen3 (dense).

Sources: the models' own config.json and safetensors headers; transformers' modeling_{llama,mistral,qwen2,qwen3}.py;
GGUF's names as in gguf.constants.
"""

from __future__ import annotations

from typing import Any

from danlu.model.config import ModelConfig, Rotary
from danlu.model.families.family import Family
from danlu.model.families.fields import ACTIVATIONS, Fields
from danlu.model.families.rope import read_rope, write_rope

WEIGHTS = {
    "embedding.tokens": "model.embed_tokens",
    "blocks.{i}.attention_norm": "model.layers.{i}.input_layernorm",
    "blocks.{i}.attention.query": "model.layers.{i}.self_attn.q_proj",
    "blocks.{i}.attention.key": "model.layers.{i}.self_attn.k_proj",
    "blocks.{i}.attention.value": "model.layers.{i}.self_attn.v_proj",
    "blocks.{i}.attention.output": "model.layers.{i}.self_attn.o_proj",
    "blocks.{i}.attention.query_norm": "model.layers.{i}.self_attn.q_norm",
    "blocks.{i}.attention.key_norm": "model.layers.{i}.self_attn.k_norm",
    "blocks.{i}.feedforward_norm": "model.layers.{i}.post_attention_layernorm",
    "blocks.{i}.feedforward.gate": "model.layers.{i}.mlp.gate_proj",
    "blocks.{i}.feedforward.up": "model.layers.{i}.mlp.up_proj",
    "blocks.{i}.feedforward.down": "model.layers.{i}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
GGUF_WEIGHTS = {
    "embedding.tokens": "token_embd",
    "blocks.{i}.attention_norm": "blk.{i}.attn_norm",
    "blocks.{i}.attention.query": "blk.{i}.attn_q",
    "blocks.{i}.attention.key": "blk.{i}.attn_k",
    "blocks.{i}.attention.value": "blk.{i}.attn_v",
    "blocks.{i}.attention.output": "blk.{i}.attn_output",
    "blocks.{i}.attention.query_norm": "blk.{i}.attn_q_norm",
    "blocks.{i}.attention.key_norm": "blk.{i}.attn_k_norm",
    "blocks.{i}.feedforward_norm": "blk.{i}.ffn_norm",
    "blocks.{i}.feedforward.gate": "blk.{i}.ffn_gate",
    "blocks.{i}.feedforward.up": "blk.{i}.ffn_up",
    "blocks.{i}.feedforward.down": "blk.{i}.ffn_down",
    "norm": "output_norm",
    "head": "output",
}
# Weights that some old checkpoints carry and nobody reads: they can be computed.
COMPUTED = ("rotary_emb.inv_freq",)
# config.json's keys that are plain fields of ModelConfig, in this family and its kin.
SHAPE = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "feedforward_width": "intermediate_size",
    "context": "max_position_embeddings",
}


def read_decoder(hf: Fields, base: float = 10_000.0, **changes: Any) -> ModelConfig:
    """What all kin of Llama share. `changes`: fields of ModelConfig that differ in a family."""
    heads = hf.integer("num_attention_heads")
    facts: dict[str, Any] = {name: hf.integer(key) for name, key in SHAPE.items()}
    facts["kv_heads"] = hf.integer("num_key_value_heads", heads)
    facts["head_width"] = hf.integer("head_dim", hf.integer("hidden_size") // max(heads, 1))
    facts["norm_epsilon"] = hf.number("rms_norm_eps", 1e-6)
    facts["tied"] = hf.flag("tie_word_embeddings")
    facts["attention_dropout"] = hf.number("attention_dropout", 0.0)
    if "activation" not in changes:
        facts["activation"] = hf.activation("hidden_act", "silu")
    if "positions" not in changes:
        facts["positions"] = read_rope(hf, base)
    return ModelConfig(**facts | changes)


def write_decoder(config: ModelConfig) -> dict[str, Any]:
    """The way back, without what differs."""
    hf = {key: getattr(config, name) for name, key in SHAPE.items()}
    hf |= {"num_key_value_heads": config.kv_heads, "head_dim": config.head_width}
    hf |= {"rms_norm_eps": config.norm_epsilon, "tie_word_embeddings": config.tied}
    hf |= {"attention_dropout": config.attention_dropout, "hidden_act": ACTIVATIONS[config.activation]}
    assert isinstance(config.positions, Rotary)
    return hf | write_rope(config.positions)


def read_window(hf: Fields, on: bool, first: int | None = None) -> dict[str, Any]:
    """sliding_window and global_layers, where layer_types, or `first` and later layers, have a window."""
    window = hf.get("sliding_window")
    listed = hf.get("layer_types")
    layers = hf.integer("num_hidden_layers")
    if not on or not window:
        return {}
    if listed is None and first is not None:
        listed = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    everywhere = tuple(layer for layer, kind in enumerate(listed or []) if kind == "full_attention")
    for kind in set(listed or []) - {"full_attention", "sliding_attention"}:
        hf.only("layer_types", f"without {kind}")
    if len(everywhere) == layers:
        return {}
    return {"sliding_window": hf.integer("sliding_window"), "global_layers": everywhere}


def layer_types(config: ModelConfig) -> list[str]:
    """What transformers calls each layer's attention."""
    return ["full_attention" if config.window(layer) is None else "sliding_attention" for layer in range(config.layers)]


def _read_llama(hf: Fields) -> ModelConfig:
    biases = hf.flag("attention_bias")
    hf.ignore("sliding_window", "use_sliding_window", "max_window_layers")  # Llama has none, whatever they say
    return read_decoder(hf, attention_bias=biases, output_bias=biases, feedforward_bias=hf.flag("mlp_bias", False))


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    return write_decoder(config) | {
        "attention_bias": config.attention_bias,
        "mlp_bias": config.feedforward_bias,
    }


def _read_mistral(hf: Fields) -> ModelConfig:
    return read_decoder(hf, **read_window(hf, on=True))


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    return write_decoder(config) | {"sliding_window": config.sliding_window}


def read_listed_window(hf: Fields) -> dict[str, Any]:
    """Qwen's: switched by use_sliding_window, for max_window_layers and later layers."""
    first = hf.integer("max_window_layers", 28)
    return read_window(hf, hf.flag("use_sliding_window"), first)


def write_listed_window(config: ModelConfig) -> dict[str, Any]:
    """The way back."""
    on = config.sliding_window is not None
    kept = {"use_sliding_window": on, "sliding_window": config.sliding_window}
    return kept | ({"layer_types": layer_types(config), "max_window_layers": len(config.global_layers)} if on else {})


def _read_qwen2(hf: Fields) -> ModelConfig:
    return read_decoder(hf, attention_bias=True, **read_listed_window(hf))


def _write_qwen2(config: ModelConfig) -> dict[str, Any]:
    return write_decoder(config) | write_listed_window(config)


def _read_qwen3(hf: Fields) -> ModelConfig:
    biases = hf.flag("attention_bias")
    hf.hf.setdefault("head_dim", 128)
    return read_decoder(hf, attention_bias=biases, output_bias=biases, qk_norm=True, **read_listed_window(hf))


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return write_decoder(config) | write_listed_window(config) | {"attention_bias": config.attention_bias}


def _kin(architecture: str, model_type: str, gguf: str, read: Any, write: Any) -> Family:
    return Family(
        architecture,
        model_type,
        read,
        write,
        WEIGHTS,
        unread=COMPUTED,
        gguf=gguf,
        gguf_weights=GGUF_WEIGHTS,
        neighbours=gguf == "llama",
    )


LLAMA = _kin("LlamaForCausalLM", "llama", "llama", _read_llama, _write_llama)
MISTRAL = _kin("MistralForCausalLM", "mistral", "llama", _read_mistral, _write_mistral)
QWEN2 = _kin("Qwen2ForCausalLM", "qwen2", "qwen2", _read_qwen2, _write_qwen2)
QWEN3 = _kin("Qwen3ForCausalLM", "qwen3", "qwen3", _read_qwen3, _write_qwen3)
