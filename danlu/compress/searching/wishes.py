"""What a user asks of a search, as written on a command line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from danlu.compress.quantizing.formats.known import FORMATS, format_of
from danlu.compress.searching.settings import BEST, FAST, SearchSettings
from danlu.compress.searching.starts import AUTO, NONE, read_shape
from danlu.device.engine import CACHES
from danlu.device.settings import Target
from danlu.errors import DanluError

SPEED = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?)\s*(?:tok(?:en)?s?/s)?\s*", re.IGNORECASE)
OPTIONS = {"memory": "--memory", "speed": "--speed", "quality_loss": "--loss", "file_size": "--size"}


def read_target(**written: str | None) -> Target:
    """Limits as 100MB, 250tok/s and 1%. Raises DanluError where one is none, or there is none at all."""
    given: dict[str, Any] = {name: text for name, text in written.items() if text is not None}
    if not given:
        fix = "name one of --memory 100MB, --speed 250tok/s, --loss 1%, --size 85MB"
        raise DanluError("nothing is asked of the file", where="danlu compress", fix=fix)
    if "speed" in given:
        found = SPEED.fullmatch(given["speed"])
        if found is None:
            raise DanluError(f"{given['speed']!r} is no speed", where="--speed", fix="write it as 250tok/s")
        given["speed"] = float(found.group(1))
    try:
        return Target.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = OPTIONS[str(first["loc"][0])]
        raise DanluError(first["msg"].removeprefix("Value error, "), where=where) from None


def read_settings(fast: bool, best: bool, wishes: Mapping[str, Any]) -> SearchSettings:
    """Settings from what was wished for. Raises DanluError where wishes exclude each other, or one is not known."""
    if fast and best:
        raise DanluError("--fast and --best exclude each other", where="danlu compress")
    chosen: dict[str, Any] = dict(FAST if fast else BEST if best else {})
    chosen |= {name: value for name, value in wishes.items() if value is not None}
    for name, known in (("types", tuple(FORMATS)), ("caches", CACHES)):
        if name in chosen:
            chosen[name] = _listed(chosen[name], f"--{name}", known)
    for type in chosen.get("types", ()):
        format_of(type, "--types")
    for text in chosen.get("pruning", ()):
        if text not in (AUTO, NONE):
            read_shape(text)
    try:
        return SearchSettings.model_validate(chosen)
    except ValidationError as error:
        first = error.errors()[0]
        raise DanluError(first["msg"], where=f"--{str(first['loc'][0]).replace('_', '-')}") from None


def _listed(text: str, where: str, known: Sequence[str]) -> tuple[str, ...]:
    """Names between commas. Raises DanluError where there is none."""
    names = tuple(part.strip().lower() for part in text.split(",") if part.strip())
    if not names:
        raise DanluError(f"{text!r} names no number format", where=where, fix=f"known: {', '.join(known)}")
    return names
