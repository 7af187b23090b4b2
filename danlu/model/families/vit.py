"""ViT (arXiv:2010.11929): an image as a row of squares, read by an encoder.

Source: transformers' modeling_vit.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from danlu.errors import DanluError
from danlu.model.config import Head, Learned, ModelConfig, Patches
from danlu.model.families.family import Family
from danlu.model.families.fields import ACTIVATIONS, Fields, write_labels
from danlu.model.names import Place, Table, prefixed

LAYER = "encoder.layer.{i}."
BODY: Table = {
    "embedding.class_token": Place("embeddings.cls_token", bare=True, ones=2),
    "embedding.positions.weight": Place("embeddings.position_embeddings", bare=True, ones=1),
    "embedding.patches": "embeddings.patch_embeddings.projection",
    "blocks.{i}.attention_norm": LAYER + "layernorm_before",
    "blocks.{i}.attention.query": LAYER + "attention.attention.query",
    "blocks.{i}.attention.key": LAYER + "attention.attention.key",
    "blocks.{i}.attention.value": LAYER + "attention.attention.value",
    "blocks.{i}.attention.output": LAYER + "attention.output.dense",
    "blocks.{i}.feedforward_norm": LAYER + "layernorm_after",
    "blocks.{i}.feedforward.up": LAYER + "intermediate.dense",
    "blocks.{i}.feedforward.down": LAYER + "output.dense",
    "norm": "layernorm",
}
SHAPE = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "feedforward_width": "intermediate_size",
}


def read_patches(hf: Fields, **changes: Any) -> Patches:
    """Image and squares, of one number or of two."""
    sides = []
    for key, default in (("image_size", 224), ("patch_size", 16)):
        value = hf.get(key, default)
        pair = tuple(value) if isinstance(value, list) else (value, value)
        if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
            raise DanluError(f"{key} is {value!r}; it must be one or two whole numbers", where=hf.where)
        sides.append(pair)
    return Patches(sides[0], sides[1], hf.integer("num_channels", 3), **changes)


def write_patches(patches: Patches) -> dict[str, Any]:
    """The way back."""

    def short(pair: tuple[int, int]) -> int | list[int]:
        return pair[0] if pair[0] == pair[1] else list(pair)

    return {
        "image_size": short(patches.image),
        "patch_size": short(patches.patch),
        "num_channels": patches.channels,
    }


def places(patches: Patches) -> int:
    """Places of the sequence: the squares, and the class token before them."""
    rows, columns = patches.grid
    return rows * columns + patches.class_token


def _read(hf: Fields, head: Callable[[Fields], Head]) -> ModelConfig:
    patches = read_patches(hf)
    facts: dict[str, Any] = {name: hf.integer(key) for name, key in SHAPE.items()}
    hf.only("pooler_act", "tanh")
    hf.only("pooler_output_size", facts["width"])
    hf.ignore("encoder_stride")  # of a decoder of masked images that the classifier has not
    return ModelConfig(
        **facts,
        vocab_size=0,
        kv_heads=facts["heads"],
        head_width=facts["width"] // max(facts["heads"], 1),
        context=places(patches),
        causal=False,
        positions=Learned(),
        patches=patches,
        norm="layer",
        norm_epsilon=hf.number("layer_norm_eps", 1e-12),
        head=head(hf),
        attention_bias=hf.flag("qkv_bias", True),
        output_bias=True,
        feedforward_bias=True,
        activation=hf.activation("hidden_act", "gelu"),
        gated=False,
        dropout=hf.number("hidden_dropout_prob", 0.0),
        attention_dropout=hf.number("attention_probs_dropout_prob", 0.0),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    hf = {key: getattr(config, name) for name, key in SHAPE.items()}
    assert config.patches is not None and config.head is not None
    return (
        hf
        | write_labels(config.head)
        | write_patches(config.patches)
        | {
            "layer_norm_eps": config.norm_epsilon,
            "qkv_bias": config.attention_bias,
            "hidden_act": ACTIVATIONS[config.activation],
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": config.attention_dropout,
        }
    )


def _labels(hf: Fields) -> Head:
    labels = hf.labels()
    return Head("sequence", len(labels), pool="first", bias=True, labels=labels)


def _vector(hf: Fields) -> Head:
    return Head("embedding", pool="first", dense="tanh")


VIT = (
    Family(
        "ViTForImageClassification",
        "vit",
        partial(_read, head=_labels),
        _write,
        {**prefixed("vit.", BODY), "head.output": "classifier"},
        prefix="vit.",
        others=("vit.pooler.", "pooler."),
    ),
    Family(
        "ViTModel",
        "vit",
        partial(_read, head=_vector),
        _write,
        {**BODY, "head.dense": "pooler.dense"},
        prefix="vit.",
        others=("classifier.",),
    ),
)
