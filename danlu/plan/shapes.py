"""A model's columns: from our own configuration, of one stack or two, or from a public model's name."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from danlu.errors import DanluError, one_of
from danlu.model.config import AnyConfig, EncoderDecoderConfig, Learned, ModelConfig, PairConfig, Relative
from danlu.plan.jobs import KINDS
from danlu.plan.layers import OWN

Shape = dict[str, float]  # columns of `Jobs`

MIXTURE = ("experts", "chosen", "expert_width", "shared_width")
PLAIN: Shape = {"gated": 1, "causal": 1, "tied": 0, "positions": 0, **dict.fromkeys(MIXTURE, 0), **KINDS}


def of_config(config: AnyConfig) -> Shape:
    """The columns of `Jobs` that describe a model. Raises DanluError where its two stacks hold unlike mixtures."""
    if isinstance(config, EncoderDecoderConfig):
        return _both(_stack(config.decoder) | {"cross": 1.0}, _stack(config.encoder))
    if isinstance(config, PairConfig):
        return _both(_stack(config.text), _image(config.image), ends=1)  # what similarities are multiplied by
    return _stack(config)


def _both(first: Shape, second: Shape, ends: int = 0) -> Shape:
    """Two stacks as one model: the embedding and the head of the first, what is left of the second's among its ends."""
    mixtures = [tuple(each[name] for name in MIXTURE) for each in (first, second) if each["experts"]]
    if len(set(mixtures)) > 1:
        fix = "give both the same experts"
        raise DanluError("mixtures of two stacks that differ are not planned for", where="model", fix=fix)
    made = {f"second_{name}": second[name] for name in ("layers", *OWN)}
    made |= dict(zip(MIXTURE, mixtures[0], strict=True)) if mixtures else {}
    length = second["positions"] if not second["vocab"] else 0  # an image has as many tokens as it has squares
    return first | made | {"second_length": length, "ends": first["ends"] + second["ends"] + ends}


def _image(config: ModelConfig) -> Shape:
    """A stack that reads images beside one that reads texts: the vectors of its places are no rows of the first's."""
    shape = _stack(config)
    return shape | {"ends": shape["ends"] + shape["positions"] * shape["width"]}


def _stack(config: ModelConfig) -> Shape:
    experts, head, learned = config.experts, config.head, config.positions
    words, labels = head is not None and head.task == "words", head.outputs if head and head.pool is None else 0
    windows = sum(config.window(layer) is not None for layer in range(config.layers))
    mixtures = [layer for layer in range(config.layers) if config.has_experts(layer)]
    return PLAIN | {
        "layers": config.layers, "width": config.width, "heads": config.heads, "kv_heads": config.kv_heads,
        "head_width": config.head_width, "feedforward": config.feedforward_width, "gated": float(config.gated),
        "causal": float(config.causal), "vocab": config.vocab_size, "tied": float(config.tied or not words),
        "outputs": config.vocab_size if words else max(labels, 1),
        "positions": config.context + learned.first if isinstance(learned, Learned) else 0,
        "window": config.sliding_window or 0, "window_layers": windows,
        "vectors": sum(_layer_vectors(config, layer) for layer in range(config.layers)) / config.layers,
        "ends": _ends(config),
        "experts": experts.count if experts else 0, "chosen": experts.chosen if experts else 0,
        "expert_width": experts.width if experts else 0, "shared_width": experts.shared_width if experts else 0,
        "expert_layers": len(mixtures), "leading": mixtures[0] if mixtures else 0,
    }  # fmt: skip


def _norm(config: ModelConfig) -> int:
    return config.width * (1 if config.norm == "rms" else 2)


def _layer_vectors(config: ModelConfig, layer: int) -> int:
    """Weights of norms, biases and gates."""
    count = _norm(config) * ((2 + config.cross) * (2 if config.norm_place == "both" else 1))
    biases = (config.heads + 2 * config.kv_heads) * config.head_width * config.attention_bias
    count += (biases + config.width * config.output_bias) * (1 + config.cross) + 2 * config.head_width * config.qk_norm

    def inner_biases(inner: int) -> int:
        return ((1 + config.gated) * inner + config.width) * config.feedforward_bias

    if config.experts is None or not config.has_experts(layer):
        return count + inner_biases(config.feedforward_width)
    shared = inner_biases(config.experts.shared_width) if config.experts.shared_width else 0
    gate = config.width * (config.experts.shared_gate and config.experts.shared_width > 0)
    return count + config.experts.count * inner_biases(config.experts.width) + shared + gate


def _ends(config: ModelConfig) -> int:
    """Weights before and after the layers, the words' vectors and places left out."""
    count = _norm(config) * (config.final_norm + config.embedding_norm) + config.types * config.width
    if isinstance(config.positions, Relative):
        count += config.positions.buckets * config.heads
    if config.patches is not None:
        height, breadth = config.patches.patch
        squares = config.patches.channels * height * breadth
        count += config.width * (squares + config.patches.bias + config.patches.class_token)
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


def reaches(model: Shape, length: int) -> bool:
    """Whether rows may have so many tokens: no more places than are learned, and of an image exactly those it has."""
    if not model["vocab"]:
        return length == model["positions"]
    return not model["positions"] or length <= model["positions"]


def shape(name: str) -> Shape:
    """One by name. Raises DanluError with the nearest name where there is none."""
    found = shapes().get(name.lower())
    if found is None:
        fix = one_of(name.lower(), list(shapes()))
        raise DanluError(f"no model shape is called {name}", where="--model", fix=fix)
    return found


def shape_for(name: str, length: int) -> Shape:
    """The same, for rows of so many tokens. Raises DanluError where it cannot read such rows, too."""
    found = shape(name)
    if not reaches(found, length):
        places, most = f"{found['positions']:g}", "at most " if found["vocab"] else ""
        what = f"rows of {name} have {most}{places} tokens, not {length}"
        raise DanluError(what, where="--seq", fix=f"say --seq {places}")
    return found
