"""The base of every settings class: unknown keys are refused, values are frozen, sizes are read as one writes them."""

from __future__ import annotations

import re
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, WithJsonSchema, field_validator

BYTE_UNITS = {
    "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


class Settings(BaseModel):
    """Settings of one stage: validated, immutable, and part of the hash of what is made with them."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        """Pydantic reads `true` as 1; someone who wrote `steps: true` did not mean one step."""
        if isinstance(value, bool) and info.field_name is not None:
            wanted = leaf_types(cls.model_fields[info.field_name].annotation)
            if bool not in wanted and wanted & {int, float}:
                raise ValueError("this takes a number, not true or false")
        return value

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values, every default written out."""
        return self.model_dump(mode="json")


def leaf_types(annotation: Any) -> set[type]:
    """The types an annotation is made of: `int | None` -> {int, NoneType}."""
    parts = get_args(annotation)
    return set().union(*map(leaf_types, parts)) if parts else ({annotation} if isinstance(annotation, type) else set())


def read_bytes(value: object) -> object:
    """`"150MB"`, `"1.5 GiB"` or a number -> bytes."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?)\s*([a-zA-Z]*)\s*", value)
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


def _number_or_text(example: str) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string"}], "examples": [example]})


Bytes = Annotated[int, BeforeValidator(read_bytes), _number_or_text("150MB")]
Share = Annotated[float, BeforeValidator(read_share), _number_or_text("2%")]
