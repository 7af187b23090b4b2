"""A model's columns: from our own configuration, or from a public model's name."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from danlu.errors import DanluError, nearest
from danlu.model.config import Learned, ModelConfig

PLAIN: dict[str, float] = {
    "gated": 1, "causal": 1, "tied": 0, "positions": 0, "experts": 0, "chosen": 0, "expert_width": 0, "shared_width": 0,
}  # fmt: skip


def of_config(config: ModelConfig) -> dict[str, float]:
    """The columns of `Jobs` that describe one stack of blocks."""
    experts = config.experts
    return {
        "layers": config.layers, "width": config.width, "heads": config.heads, "kv_heads": config.kv_heads,
        "head_width": config.head_width, "feedforward": config.feedforward_width, "gated": float(config.gated),
        "causal": float(config.causal), "vocab": config.vocab_size, "tied": float(config.tied),
        "positions": config.context if isinstance(config.positions, Learned) else 0,
        "experts": experts.count if experts else 0, "chosen": experts.chosen if experts else 0,
        "expert_width": experts.width if experts else 0, "shared_width": experts.shared_width if experts else 0,
        "expert_layers": sum(map(config.has_experts, range(config.layers))),
    }  # fmt: skip


@cache
def shapes() -> dict[str, dict[str, float]]:
    """Public models by name and by other spelling, in lower case."""
    read = yaml.safe_load(files("danlu.plan").joinpath("shapes.yaml").read_text(encoding="utf-8"))
    known: dict[str, dict[str, float]] = {}
    for name, values in read.items():
        told: dict[str, Any] = PLAIN | {key: value for key, value in values.items() if key != "names"}
        told.setdefault("expert_layers", told["layers"] if told["experts"] else 0)
        made = {key: float(value) for key, value in told.items()}
        known |= {spelling: made for spelling in (name, *values["names"])}
    return known


def shape(name: str) -> dict[str, float]:
    """One by name. Raises DanluError with the nearest name where there is none."""
    found = shapes().get(name.lower())
    if found is None:
        meant = nearest(name.lower(), list(shapes()))
        fix = f"did you mean {meant}?" if meant else f"known: {', '.join(shapes())}"
        raise DanluError(f"no model shape is called {name}", where="--model", fix=fix)
    return found
