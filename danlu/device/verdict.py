"""What was measured against what was asked, line by line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from danlu.artifact import figure
from danlu.device.settings import Target

Figure = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One line of a certificate.

    Attributes:
        name: what is measured.
        asked: the limit as a figure; None where nothing was asked.
        measured: as a figure.
        miss: how far beyond the limit, as a share of it; 0 where the line is met.
        short: the same in words; empty where the line is met.
    """

    name: str
    asked: Figure | None
    measured: Figure
    miss: float = 0.0
    short: str = ""

    def plain(self) -> dict[str, Any]:
        """As in certificate.json."""
        return {
            "name": self.name,
            "asked": self.asked,
            "measured": self.measured,
            "passed": not self.short,
            "short": self.short,
        }


def judge(
    target: Target,
    *,
    file_size: Figure,
    memory: Figure,
    decode: Figure,
    loss_rise: Figure,
    memory_name: str = "peak memory",
) -> list[Line]:
    """The target's four lines.

    Sizes and speed are judged by what was measured; the loss, an estimate, by the upper end of its interval, so that
    a pass holds with 97.5 % confidence.
    """
    return [
        _at_most("file size", target.file_size, file_size, file_size["value"]),
        _at_most(memory_name, target.memory, memory, memory["value"]),
        _at_least("decoding", target.speed, decode, decode["value"]),
        _at_most("held-out loss, rise", target.quality_loss, loss_rise, upper_end(loss_rise)),
    ]


def upper_end(estimate: Figure) -> float:
    """Of an estimate's interval; the estimate itself where it has none."""
    return float(estimate["high"] if "high" in estimate else estimate["value"])


def worst_miss(lines: list[Line]) -> float:
    """The largest miss among the lines, as a share of what was asked; 0 where all are met."""
    return max(line.miss for line in lines)


def _at_most(name: str, limit: float | None, measured: Figure, value: float) -> Line:
    if limit is None or value <= limit:
        return Line(name, _asked(limit, measured), measured)
    return _missed(name, limit, measured, value, "more")


def _at_least(name: str, limit: float | None, measured: Figure, value: float) -> Line:
    if limit is None or value >= limit:
        return Line(name, _asked(limit, measured), measured)
    return _missed(name, limit, measured, value, "less")


def _missed(name: str, limit: float, measured: Figure, value: float, direction: str) -> Line:
    unit, gap = measured["unit"], abs(value - limit)
    miss = gap / limit if limit else math.inf
    by = f" ({miss:.1%})" if limit and unit != "share" else ""
    at = " at the interval's upper end" if value != measured["value"] else ""
    short = f"{amount(value, unit)}{at} is {amount(gap, unit)}{by} {direction} than the {amount(limit, unit)} asked"
    return Line(name, _asked(limit, measured), measured, miss, short)


def _asked(limit: float | None, measured: Figure) -> Figure | None:
    return None if limit is None else figure(limit, measured["unit"])


def amount(value: float, unit: str) -> str:
    """A value with its unit, as people write it."""
    if unit == "byte":
        return f"{value / 1e6:,.1f} MB"
    if unit == "share":
        return f"{value:.2%}"
    return f"{value:,.1f} {unit}"
