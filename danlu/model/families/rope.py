"""Rotary positions as config.json describes them, in the spelling of transformers 4 and of 5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from danlu.errors import DanluError
from danlu.model.config import ModelConfig, RopeScaling

DEFAULT_BASE = 10_000.0
KINDS = ("default", "linear", "llama3", "yarn")
# Field of RopeScaling -> key in config.json, for each kind.
NUMBERS: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_context": "original_max_position_embeddings",
        "low_frequency": "low_freq_factor",
        "high_frequency": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_context": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
}
OPTIONAL = {"beta_fast", "beta_slow", "attention_factor"}


def read_rope(hf: Mapping[str, Any], where: Path | None) -> tuple[float, RopeScaling | None]:
    """The base and the scaling that a config.json asks for; DanluError where the kind is not known."""
    stated = hf.get("rope_parameters") or {}
    stretch = stated or hf.get("rope_scaling") or {}
    if any(isinstance(value, dict) for value in stretch.values()):
        raise DanluError("rotary positions that differ between layers are not supported", where=where)
    base = float(stated.get("rope_theta") or hf.get("rope_theta") or DEFAULT_BASE)
    kind = stretch.get("rope_type") or stretch.get("type") or "default"
    if kind not in KINDS:
        raise DanluError(f"rope scaling {kind!r} is not known", where=where, fix=f"known: {', '.join(KINDS)}")
    if stretch.get("partial_rotary_factor", 1) != 1 or not stretch.get("truncate", True):
        raise DanluError("rotary positions of a part of each head, or untruncated yarn, are not supported", where=where)
    if kind == "default":
        return base, None
    numbers: dict[str, Any] = {"kind": kind}
    for name, key in NUMBERS[kind].items():
        if stretch.get(key) is not None:
            numbers[name] = stretch[key]
        elif name not in OPTIONAL:
            raise DanluError(f"the rope scaling {kind} lacks {key}", where=where)
    if kind == "yarn" and "attention_factor" not in numbers and stretch.get("mscale") and stretch.get("mscale_all_dim"):
        temper = [0.1 * stretch[key] * math.log(numbers["factor"]) + 1 for key in ("mscale", "mscale_all_dim")]
        numbers["attention_factor"] = temper[0] / temper[1]
    return base, RopeScaling(**numbers)


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """The keys rope_theta and rope_scaling, which transformers 4 and 5 both read."""
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_theta": config.rope_base, "rope_scaling": None}
    numbers = {key: getattr(scaling, name) for name, key in NUMBERS[scaling.kind].items()}
    kept = {key: value for key, value in numbers.items() if value is not None}
    return {"rope_theta": config.rope_base, "rope_scaling": {"rope_type": scaling.kind, **kept}}
