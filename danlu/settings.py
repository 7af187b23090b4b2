"""The base of every settings class: unknown keys are refused, values are frozen, units are read as people write them."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

BYTE_UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


class Settings(BaseModel):
    """Settings of one stage: validated, immutable, and part of the hash of what is made with them."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values, every default written out."""
        return self.model_dump(mode="json")


def read_bytes(value: object) -> object:
    """`"150MB"`, `"1.5 GiB"` or a number -> bytes."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*([a-zA-Z]*)\s*", value)
    unit = BYTE_UNITS.get(found.group(2).lower() or "b") if found else None
    if found is None or unit is None:
        raise ValueError(f"{value!r} is no size; write it as 150MB, 1.5GB or 900MiB")
    return round(float(found.group(1)) * unit)


def read_share(value: object) -> object:
    """`"2%"` or `0.02` -> 0.02."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            raise ValueError(f"{value!r} is no share; write it as 2% or 0.02") from None
    return value


Bytes = Annotated[int, BeforeValidator(read_bytes)]
Share = Annotated[float, BeforeValidator(read_share)]
