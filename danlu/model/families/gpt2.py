"""GPT-2 (Radford et al. 2019): learned positions, and one tensor for query, key and value.

Source: transformers' modeling_gpt2.py; its matrices are stored as [in, out].
"""

from __future__ import annotations

from typing import Any

from danlu.model.config import Learned, ModelConfig
from danlu.model.families.family import Family
from danlu.model.families.fields import ACTIVATIONS, Fields
from danlu.model.names import Place, Table

LAYER = "transformer.h.{i}."
WEIGHTS: Table = {
    "embedding.tokens": "transformer.wte",
    "embedding.positions": "transformer.wpe",
    "blocks.{i}.attention_norm": LAYER + "ln_1",
    "blocks.{i}.attention.query": Place(LAYER + "attn.c_attn", part=0, parts=3, transposed=True),
    "blocks.{i}.attention.key": Place(LAYER + "attn.c_attn", part=1, parts=3, transposed=True),
    "blocks.{i}.attention.value": Place(LAYER + "attn.c_attn", part=2, parts=3, transposed=True),
    "blocks.{i}.attention.output": Place(LAYER + "attn.c_proj", transposed=True),
    "blocks.{i}.feedforward_norm": LAYER + "ln_2",
    "blocks.{i}.feedforward.up": Place(LAYER + "mlp.c_fc", transposed=True),
    "blocks.{i}.feedforward.down": Place(LAYER + "mlp.c_proj", transposed=True),
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
GGUF_WEIGHTS: Table = {
    "embedding.tokens": "token_embd",
    "embedding.positions": "position_embd",
    "blocks.{i}.attention_norm": "blk.{i}.attn_norm",
    "blocks.{i}.attention.query": Place("blk.{i}.attn_qkv", part=0, parts=3),
    "blocks.{i}.attention.key": Place("blk.{i}.attn_qkv", part=1, parts=3),
    "blocks.{i}.attention.value": Place("blk.{i}.attn_qkv", part=2, parts=3),
    "blocks.{i}.attention.output": "blk.{i}.attn_output",
    "blocks.{i}.feedforward_norm": "blk.{i}.ffn_norm",
    "blocks.{i}.feedforward.up": "blk.{i}.ffn_up",
    "blocks.{i}.feedforward.down": "blk.{i}.ffn_down",
    "norm": "output_norm",
    "head": "output",
}


def _read(hf: Fields) -> ModelConfig:
    width, heads = hf.integer("n_embd"), hf.integer("n_head")
    hf.only("scale_attn_weights", True)
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention", "reorder_and_upcast_attn"):
        hf.only(key, False)
    dropout = hf.number("resid_pdrop", 0.1)
    hf.only("embd_pdrop", dropout)
    return ModelConfig(
        vocab_size=hf.integer("vocab_size"),
        width=width,
        layers=hf.integer("n_layer"),
        heads=heads,
        kv_heads=heads,
        head_width=width // max(heads, 1),
        feedforward_width=hf.integer("n_inner", 4 * width),
        context=hf.integer("n_positions", 1024),
        positions=Learned(),
        norm="layer",
        norm_epsilon=hf.number("layer_norm_epsilon", 1e-5),
        tied=hf.flag("tie_word_embeddings", True),
        attention_bias=True,
        output_bias=True,
        feedforward_bias=True,
        activation=hf.activation("activation_function", "gelu_new"),
        gated=False,
        dropout=dropout,
        attention_dropout=hf.number("attn_pdrop", 0.1),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.feedforward_width,
        "n_positions": config.context,
        "layer_norm_epsilon": config.norm_epsilon,
        # "gelu_new" is the same function as "gelu_pytorch_tanh", and what GPT-2's own configuration says.
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else ACTIVATIONS[config.activation],
        "tie_word_embeddings": config.tied,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
    }


GPT2 = Family(
    "GPT2LMHeadModel",
    "gpt2",
    _read,
    _write,
    WEIGHTS,
    prefix="transformer.",
    unread=("attn.bias", "attn.masked_bias"),  # the causal mask, in old files
    gguf="gpt2",
    gguf_weights=GGUF_WEIGHTS,
)
