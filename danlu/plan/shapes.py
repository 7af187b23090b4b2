"""A model's columns: from our own configuration, or from a public model's name."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from danlu.errors import DanluError, nearest
from danlu.model.config import AnyConfig, Learned, ModelConfig, Relative

Shape = dict[str, float]  # columns of `Jobs`

PLAIN: Shape = {
    "gated": 1, "causal": 1, "tied": 0, "positions": 0, "experts": 0, "chosen": 0, "expert_width": 0, "shared_width": 0,
}  # fmt: skip


def of_config(config: AnyConfig) -> Shape:
    """The columns of `Jobs` that describe one stack of blocks over text. Raises DanluError for other models."""
    if not isinstance(config, ModelConfig) or config.cross or config.patches is not None:
        fix = "plans are found for one stack of blocks that reads text"
        raise DanluError("models of two stacks, or of images, are not planned for yet", where="model", fix=fix)
    experts, head, learned = config.experts, config.head, config.positions
    words = head is not None and head.task == "words"
    return {
        "layers": config.layers, "width": config.width, "heads": config.heads, "kv_heads": config.kv_heads,
        "head_width": config.head_width, "feedforward": config.feedforward_width, "gated": float(config.gated),
        "causal": float(config.causal), "vocab": config.vocab_size, "tied": float(config.tied or not words),
        "outputs": config.vocab_size if words else max(head.outputs if head else 0, 1),
        "positions": config.context + learned.first if isinstance(learned, Learned) else 0,
        "vectors": sum(_layer_vectors(config, layer) for layer in range(config.layers)) / config.layers,
        "ends": _ends(config),
        "experts": experts.count if experts else 0, "chosen": experts.chosen if experts else 0,
        "expert_width": experts.width if experts else 0, "shared_width": experts.shared_width if experts else 0,
        "expert_layers": sum(map(config.has_experts, range(config.layers))),
    }  # fmt: skip


def _norm(config: ModelConfig) -> int:
    return config.width * (1 if config.norm == "rms" else 2)


def _layer_vectors(config: ModelConfig, layer: int) -> int:
    """Weights of norms, biases and gates."""
    count = _norm(config) * (4 if config.norm_place == "both" else 2)
    count += (config.heads + 2 * config.kv_heads) * config.head_width * config.attention_bias
    count += config.width * config.output_bias + 2 * config.head_width * config.qk_norm

    def biases(inner: int) -> int:
        return ((1 + config.gated) * inner + config.width) * config.feedforward_bias

    if config.experts is None or not config.has_experts(layer):
        return count + biases(config.feedforward_width)
    shared = biases(config.experts.shared_width) if config.experts.shared_width else 0
    gate = config.width * (config.experts.shared_gate and config.experts.shared_width > 0)
    return count + config.experts.count * biases(config.experts.width) + shared + gate


def _ends(config: ModelConfig) -> int:
    """Weights before and after the layers, the words' vectors and places left out."""
    count = _norm(config) * (config.final_norm + config.embedding_norm) + config.types * config.width
    if isinstance(config.positions, Relative):
        count += config.positions.buckets * config.heads
    head = config.head
    if head is None:
        return count
    count += (config.width**2 + config.width) * (head.dense is not None) + 2 * config.width * head.norm
    if head.task == "words":
        return count + config.vocab_size * head.bias
    return count + head.outputs * (config.width + head.bias)


@cache
def shapes() -> dict[str, Shape]:
    """Public models by name and by other spelling, in lower case."""
    read = yaml.safe_load(files("danlu.plan").joinpath("shapes.yaml").read_text(encoding="utf-8"))
    known: dict[str, Shape] = {}
    for name, values in read.items():
        told: dict[str, Any] = PLAIN | {key: value for key, value in values.items() if key != "names"}
        told.setdefault("expert_layers", told["layers"] if told["experts"] else 0)
        told = {"outputs": told["vocab"], "vectors": 2 * told["width"], "ends": told["width"]} | told
        made = {key: float(value) for key, value in told.items()}
        known |= {spelling: made for spelling in (name, *values["names"])}
    return known


def shape(name: str) -> Shape:
    """One by name. Raises DanluError with the nearest name where there is none."""
    found = shapes().get(name.lower())
    if found is None:
        meant = nearest(name.lower(), list(shapes()))
        fix = f"did you mean {meant}?" if meant else f"known: {', '.join(shapes())}"
        raise DanluError(f"no model shape is called {name}", where="--model", fix=fix)
    return found
