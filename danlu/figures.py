"""Numbers as people read them: with the unit's usual symbol, and no more digits than the interval makes meaningful."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

SPACE = "\u00a0"  # between a number and its symbol, so that no line ends there
UNSAID = ("score", "perplexity", "count")  # units that the name of the figure already says


def parts(value: object, unit: str = "", digits: int | None = None) -> tuple[str, str]:
    """A number and its symbol as people write them: bytes as MB, shares as %, long times as minutes.

    Args:
        value: a number; anything else is shown as it is.
        unit: as on the card.
        digits: after the point, in the card's unit; None leaves four in all.
    """
    if isinstance(value, bool):
        return "yes" if value else "no", ""
    if not isinstance(value, (int, float)):
        return str(value), ""
    if not math.isfinite(value):
        return "not measured", ""
    if unit in ("byte", "bytes", "B"):
        return _bytes(value)
    if unit in ("s", "second", "seconds"):
        return show_seconds(value), ""
    if unit == "share":
        return _number(100 * value, 1 if digits is None else max(0, digits - 2)), "%"
    return _number(value, digits), "" if unit in UNSAID else unit


def show_amount(value: object, unit: str = "", digits: int | None = None) -> str:
    """A number with its symbol."""
    return SPACE.join(parts(value, unit, digits)).strip()


def parts_of(about: Mapping[str, Any]) -> tuple[str, str]:
    """A figure's number and symbol, with as many digits as its interval makes meaningful."""
    return parts(about["value"], str(about.get("unit", "")), _digits(about))


def show_value(about: Mapping[str, Any]) -> str:
    """A figure's value and symbol in one."""
    return SPACE.join(parts_of(about)).strip()


def show_range(about: Mapping[str, Any]) -> str:
    """A figure's interval, the symbol said once; nothing if it has none."""
    if "low" not in about:
        return ""
    low, high = (parts(about[end], str(about.get("unit", "")), _digits(about)) for end in ("low", "high"))
    shared = low[1] == high[1]
    return f"{low[0] if shared else SPACE.join(low)} to {SPACE.join(high).strip()}"


def show_change(about: Mapping[str, Any], points: bool = True) -> str:
    """A difference with its sign; one between shares is in percentage points, unless it is itself a relative change."""
    number, symbol = parts_of(about)
    sign = "+" if about["value"] > 0 else ""
    return SPACE.join((sign + number, "points" if points and symbol == "%" else symbol)).strip()


def show_seconds(seconds: float) -> str:
    """A duration: 0.42 s, 41 s, 3 min 12 s, 2 h 5 min."""
    if seconds < 10:
        return f"{_number(seconds, 1 if seconds >= 1 else 2)} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _bytes(value: float) -> tuple[str, str]:
    for size, symbol in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= size:
            return _number(value / size, 2 if symbol == "GB" else 1), symbol
    return f"{value:.0f}", "bytes"


def _digits(about: Mapping[str, Any]) -> int | None:
    """Digits after the point that leave two of the interval's half-width, as far as there is an interval."""
    half = (float(about["high"]) - float(about["low"])) / 2 if "low" in about else 0.0
    return min(6, max(0, 1 - math.floor(math.log10(half)))) if half > 0 and math.isfinite(half) else None


def _number(value: float, digits: int | None) -> str:
    if digits is None:
        if float(value).is_integer() and abs(value) < 1e15:
            digits = 0
        elif value and abs(value) < 1e-3:
            return f"{value:.2e}".replace("-", "−")
        else:
            digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
            digits = min(digits, 4)
    return f"{value:,.{digits}f}".replace("-", "−")
