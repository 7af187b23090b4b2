"""Decoders with a mixture of experts: Mixtral (arXiv:2401.04088), Qwen2-MoE and Qwen3-MoE (arXiv:2505.09388).

Source: transformers' modeling_{mixtral,qwen2_moe,qwen3_moe}.py; files keep each expert's matrices apart.
"""

from __future__ import annotations

from typing import Any

from danlu.model.config import Experts, ModelConfig
from danlu.model.families.family import Family
from danlu.model.families.fields import Fields
from danlu.model.families.llama import (
    COMPUTED,
    GGUF_WEIGHTS,
    WEIGHTS,
    read_decoder,
    read_listed_window,
    read_window,
    write_decoder,
    write_listed_window,
)

MIXTRAL_EXPERTS = {
    "blocks.{i}.feedforward.router": "model.layers.{i}.block_sparse_moe.gate",
    "blocks.{i}.feedforward.experts.gate": "model.layers.{i}.block_sparse_moe.experts.{e}.w1",
    "blocks.{i}.feedforward.experts.up": "model.layers.{i}.block_sparse_moe.experts.{e}.w3",
    "blocks.{i}.feedforward.experts.down": "model.layers.{i}.block_sparse_moe.experts.{e}.w2",
}
QWEN_EXPERTS = {
    "blocks.{i}.feedforward.router": "model.layers.{i}.mlp.gate",
    "blocks.{i}.feedforward.experts.gate": "model.layers.{i}.mlp.experts.{e}.gate_proj",
    "blocks.{i}.feedforward.experts.up": "model.layers.{i}.mlp.experts.{e}.up_proj",
    "blocks.{i}.feedforward.experts.down": "model.layers.{i}.mlp.experts.{e}.down_proj",
    "blocks.{i}.feedforward.shared.gate": "model.layers.{i}.mlp.shared_expert.gate_proj",
    "blocks.{i}.feedforward.shared.up": "model.layers.{i}.mlp.shared_expert.up_proj",
    "blocks.{i}.feedforward.shared.down": "model.layers.{i}.mlp.shared_expert.down_proj",
    "blocks.{i}.feedforward.shared_gate": "model.layers.{i}.mlp.shared_expert_gate",
}
GGUF_EXPERTS = {
    "blocks.{i}.feedforward.router": "blk.{i}.ffn_gate_inp",
    "blocks.{i}.feedforward.experts.gate": "blk.{i}.ffn_gate_exps",
    "blocks.{i}.feedforward.experts.up": "blk.{i}.ffn_up_exps",
    "blocks.{i}.feedforward.experts.down": "blk.{i}.ffn_down_exps",
    "blocks.{i}.feedforward.shared.gate": "blk.{i}.ffn_gate_shexp",
    "blocks.{i}.feedforward.shared.up": "blk.{i}.ffn_up_shexp",
    "blocks.{i}.feedforward.shared.down": "blk.{i}.ffn_down_shexp",
    "blocks.{i}.feedforward.shared_gate": "blk.{i}.ffn_gate_inp_shexp",
}


def _read_mixtral(hf: Fields) -> ModelConfig:
    experts = Experts(
        count=hf.integer("num_local_experts", 8),
        chosen=hf.integer("num_experts_per_tok", 2),
        width=hf.integer("intermediate_size"),
        normalised=True,
        jitter=hf.number("router_jitter_noise", 0.0),
        balance=hf.number("router_aux_loss_coef", 0.001),
    )
    return read_decoder(hf, 1_000_000.0, experts=experts, **read_window(hf, on=True))


def _write_mixtral(config: ModelConfig) -> dict[str, Any]:
    experts = config.experts
    assert experts is not None
    return write_decoder(config) | {
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.chosen,
        "intermediate_size": experts.width,
        "router_jitter_noise": experts.jitter,
        "router_aux_loss_coef": experts.balance,
        "sliding_window": config.sliding_window,
    }


def _read_experts(hf: Fields, count: int, **changes: Any) -> Experts:
    layers, step = hf.integer("num_hidden_layers"), hf.integer("decoder_sparse_step", 1)
    dense = hf.get("mlp_only_layers", [])
    sparse = tuple(layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0)
    hf.ignore("num_local_experts", "num_experts")  # the same number, by its old and its new name
    return Experts(
        count=hf.integer("num_experts", hf.integer("num_local_experts", count)),
        width=hf.integer("moe_intermediate_size"),
        normalised=hf.flag("norm_topk_prob"),
        layers=None if len(sparse) == layers else sparse,
        balance=hf.number("router_aux_loss_coef", 0.001),
        **changes,
    )


def _write_experts(config: ModelConfig) -> dict[str, Any]:
    experts = config.experts
    assert experts is not None
    return {
        "num_experts": experts.count,
        "num_experts_per_tok": experts.chosen,
        "moe_intermediate_size": experts.width,
        "norm_topk_prob": experts.normalised,
        "router_aux_loss_coef": experts.balance,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(config.layers) if not config.has_experts(layer)],
    }


def _read_qwen2_moe(hf: Fields) -> ModelConfig:
    experts = _read_experts(
        hf,
        60,
        chosen=hf.integer("num_experts_per_tok", 4),
        shared_width=hf.integer("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    return read_decoder(hf, attention_bias=hf.flag("qkv_bias", True), experts=experts, **read_listed_window(hf))


def _write_qwen2_moe(config: ModelConfig) -> dict[str, Any]:
    assert config.experts is not None
    shared = {"qkv_bias": config.attention_bias, "shared_expert_intermediate_size": config.experts.shared_width}
    return write_decoder(config) | write_listed_window(config) | _write_experts(config) | shared


def _read_qwen3_moe(hf: Fields) -> ModelConfig:
    experts = _read_experts(hf, 128, chosen=hf.integer("num_experts_per_tok", 8))
    biases = hf.flag("attention_bias")
    window = read_listed_window(hf)
    return read_decoder(hf, attention_bias=biases, output_bias=biases, qk_norm=True, experts=experts, **window)


def _write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    written = write_decoder(config) | write_listed_window(config) | _write_experts(config)
    return written | {"attention_bias": config.attention_bias}


MIXTRAL = Family(
    "MixtralForCausalLM",
    "mixtral",
    _read_mixtral,
    _write_mixtral,
    {**WEIGHTS, **MIXTRAL_EXPERTS},
    unread=COMPUTED,
    gguf="llama",
    gguf_weights={**GGUF_WEIGHTS, **GGUF_EXPERTS},
    neighbours=True,
)
QWEN2_MOE = Family(
    "Qwen2MoeForCausalLM",
    "qwen2_moe",
    _read_qwen2_moe,
    _write_qwen2_moe,
    {**WEIGHTS, **QWEN_EXPERTS},
    gguf="qwen2moe",
    gguf_weights={**GGUF_WEIGHTS, **GGUF_EXPERTS},
)
QWEN3_MOE = Family(
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    _read_qwen3_moe,
    _write_qwen3_moe,
    {**WEIGHTS, **QWEN_EXPERTS},
    gguf="qwen3moe",
    gguf_weights={**GGUF_WEIGHTS, **GGUF_EXPERTS},
)
