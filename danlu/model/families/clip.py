"""CLIP (arXiv:2103.00020): a text's and an image's encoder side by side.

Source: transformers' modeling_clip.py.
"""

from __future__ import annotations

from typing import Any

from danlu.model.config import Head, Learned, ModelConfig, PairConfig
from danlu.model.families.family import Family
from danlu.model.families.fields import ACTIVATIONS, Fields
from danlu.model.families.vit import places, read_patches, write_patches
from danlu.model.names import Place, prefixed, under

LAYER = {
    "attention_norm": "layer_norm1",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.out_proj",
    "feedforward_norm": "layer_norm2",
    "feedforward.up": "mlp.fc1",
    "feedforward.down": "mlp.fc2",
}
WEIGHTS = {
    **under("text.blocks.{i}.", prefixed("text_model.encoder.layers.{i}.", LAYER)),
    "text.embedding.tokens": "text_model.embeddings.token_embedding",
    "text.embedding.positions": "text_model.embeddings.position_embedding",
    "text.norm": "text_model.final_layer_norm",
    "text.head.output": "text_projection",
    **under("image.blocks.{i}.", prefixed("vision_model.encoder.layers.{i}.", LAYER)),
    "image.embedding.class_token": Place("vision_model.embeddings.class_embedding", bare=True),
    "image.embedding.patches": "vision_model.embeddings.patch_embedding",
    "image.embedding.positions": "vision_model.embeddings.position_embedding",
    "image.embedding.norm": "vision_model.pre_layrnorm",
    "image.norm": "vision_model.post_layernorm",
    "image.head.output": "visual_projection",
    "logit_scale": Place("logit_scale", bare=True),
}
TEXT = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048}
IMAGE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
OLD_END = 2  # what the first published configurations give for the end, whose id is in truth the largest


def _tower(hf: Fields, **changes: Any) -> ModelConfig:
    heads, width = hf.integer("num_attention_heads"), hf.integer("hidden_size")
    hf.ignore("projection_dim")  # the whole model's counts
    hf.only("dropout", 0.0)
    return ModelConfig(
        width=width,
        layers=hf.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_width=width // max(heads, 1),
        feedforward_width=hf.integer("intermediate_size"),
        positions=Learned(),
        norm="layer",
        norm_epsilon=hf.number("layer_norm_eps", 1e-5),
        attention_bias=True,
        output_bias=True,
        feedforward_bias=True,
        activation=hf.activation("hidden_act", "quick_gelu"),
        gated=False,
        attention_dropout=hf.number("attention_dropout", 0.0),
        **changes,
    )


def _read(hf: Fields) -> PairConfig:
    features = hf.integer("projection_dim", 512)
    hf.ignore("text_config_dict", "vision_config_dict")  # the same once more, in old files
    words, pixels = hf.part("text_config", **TEXT), hf.part("vision_config", **IMAGE)
    end = words.integer("eos_token_id", 49407)
    text = _tower(
        words,
        vocab_size=words.integer("vocab_size", 49408),
        context=words.integer("max_position_embeddings", 77),
        head=Head("embedding", features, pool="end", end=-1 if end == OLD_END else end),
    )
    patches = read_patches(pixels, bias=False)
    image = _tower(
        pixels,
        vocab_size=0,
        context=places(patches),
        causal=False,
        patches=patches,
        embedding_norm=True,
        head=Head("embedding", features, pool="first"),
    )
    for part in (words, pixels):
        part.finish()
    return PairConfig(text, image, hf.number("logit_scale_init_value", 2.6592))


def _write(config: PairConfig) -> dict[str, Any]:
    text, image = config.text, config.image
    assert text.head is not None and image.patches is not None
    end = text.head.end
    words = {
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context,
        "eos_token_id": OLD_END if end == -1 else end,
    }
    return {
        "projection_dim": text.head.outputs,
        "logit_scale_init_value": config.logit_scale,
        "text_config": _write_tower(text, "clip_text_model") | words,
        "vision_config": _write_tower(image, "clip_vision_model") | write_patches(image.patches),
    }


def _write_tower(config: ModelConfig, model_type: str) -> dict[str, Any]:
    assert config.head is not None
    return {
        "model_type": model_type,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.feedforward_width,
        "layer_norm_eps": config.norm_epsilon,
        "hidden_act": ACTIVATIONS[config.activation],
        "attention_dropout": config.attention_dropout,
        "projection_dim": config.head.outputs,
    }


CLIP = Family("CLIPModel", "clip", _read, _write, WEIGHTS, unread=("position_ids",))
