"""The Llama family and its close kin: Llama 1 to 3, SmolLM, Mistral, Qwen2 and Qwen3 (dense).

Sources: the models' own config.json and safetensors headers; transformers' modeling_{llama,mistral,qwen2,qwen3}.py;
GGUF's names as in gguf.constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from danlu.errors import DanluError, nearest
from danlu.model.config import ModelConfig
from danlu.model.families.family import Family

COMMON: dict[str, object] = {"rms_norm_eps": 1e-6, "hidden_act": "silu"}

LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    gguf="llama",
    flags={"attention_bias": ("attention_bias", "output_bias"), "mlp_bias": ("feedforward_bias",)},
    defaults=COMMON,
    neighbours=True,
)
MISTRAL = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    gguf="llama",
    defaults={**COMMON, "sliding_window": 4096},
    window="all",
    neighbours=True,
)
QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    gguf="qwen2",
    fixed={"attention_bias": True},
    defaults={**COMMON, "sliding_window": 4096, "max_window_layers": 28},
    window="listed",
)
QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    gguf="qwen3",
    flags={"attention_bias": ("attention_bias", "output_bias")},
    fixed={"qk_norm": True},
    defaults={**COMMON, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    window="listed",
)
FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3)

# Our weights' names -> Hugging Face's and GGUF's; the same in all these families.
WEIGHTS = {
    "embedding": "model.embed_tokens",
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
    "embedding": "token_embd",
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


def family_of(hf: Mapping[str, Any], where: Path | None = None) -> Family:
    """The family a config.json belongs to; DanluError naming the known ones where it is none of them."""
    stated = hf.get("architectures") or []
    for family in FAMILIES:
        if family.architecture in stated or (not stated and family.model_type == hf.get("model_type")):
            return family
    asked = ", ".join(stated) or hf.get("model_type") or "none named"
    known = [family.architecture for family in FAMILIES]
    close = nearest(asked, known)
    hint = f"the nearest is {close}; " if close else ""
    raise DanluError(f"the architecture {asked} is not known", where=where, fix=f"{hint}known: {', '.join(known)}")


def family_for(config: ModelConfig) -> Family:
    """The first family in which a configuration can be written without loss."""
    for family in FAMILIES:
        if family.expresses(config):
            return family
    names = ", ".join(family.architecture for family in FAMILIES)
    raise DanluError(f"no known architecture computes this: {config}", fix=f"known: {names}")
