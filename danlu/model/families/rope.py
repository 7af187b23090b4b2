"""Rotary positions as config.json describes them, in the spelling of transformers 4 and of 5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from danlu.errors import DanluError
from danlu.model.config import RopeScaling, Rotary
from danlu.model.families.fields import Fields

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


def read_rope(hf: Fields, base: float = DEFAULT_BASE) -> Rotary:
    """What a config.json asks for; DanluError where the kind is not known."""
    base = hf.number("rope_theta", base)
    stretch = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    hf.ignore("rope_scaling")
    if any(isinstance(value, dict) for value in stretch.values()):
        raise DanluError("rotary positions that differ between layers are not supported", where=hf.where)
    return read_parameters(stretch, base, hf.where)


def read_parameters(stretch: Mapping[str, Any], base: float, where: Path | None) -> Rotary:
    """One entry of rope_parameters (or rope_scaling); `base` where it names none."""
    base = float(stretch.get("rope_theta") or base)
    kind = stretch.get("rope_type") or stretch.get("type") or "default"
    if kind not in KINDS:
        raise DanluError(f"rope scaling {kind!r} is not known", where=where, fix=f"known: {', '.join(KINDS)}")
    if stretch.get("partial_rotary_factor", 1) != 1 or not stretch.get("truncate", True):
        raise DanluError("rotary positions of a part of each head, or untruncated yarn, are not supported", where=where)
    if kind == "default":
        return Rotary(base)
    numbers: dict[str, Any] = {"kind": kind}
    for name, key in NUMBERS[kind].items():
        if stretch.get(key) is not None:
            numbers[name] = stretch[key]
        elif name not in OPTIONAL:
            raise DanluError(f"the rope scaling {kind} lacks {key}", where=where)
    if kind == "yarn" and "attention_factor" not in numbers and stretch.get("mscale") and stretch.get("mscale_all_dim"):
        temper = [0.1 * stretch[key] * math.log(numbers["factor"]) + 1 for key in ("mscale", "mscale_all_dim")]
        numbers["attention_factor"] = temper[0] / temper[1]
    return Rotary(base, RopeScaling(**numbers))


def write_rope(rotary: Rotary) -> dict[str, Any]:
    """The keys rope_theta and rope_scaling, which transformers 4 and 5 both read."""
    return {"rope_theta": rotary.base, "rope_scaling": _scaling(rotary.scaling)}


def _scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    numbers = {key: getattr(scaling, name) for name, key in NUMBERS[scaling.kind].items()}
    return {"rope_type": scaling.kind, **{key: value for key, value in numbers.items() if value is not None}}


def write_parameters(rotary: Rotary) -> dict[str, Any]:
    """An entry of rope_parameters, as transformers 5 writes it."""
    return {"rope_theta": rotary.base, **(_scaling(rotary.scaling) or {"rope_type": "default"})}
