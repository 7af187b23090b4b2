"""A physical number that measurements may move, within bounds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Coefficient:
    """Where a number starts, how far it may go, and its unit.

    Attributes:
        start: what is believed without a measurement.
        low, high: bounds.
        doubt: standard deviation of the belief, in natural logarithms.
        unit, meaning: as printed.
    """

    start: float
    low: float
    high: float
    doubt: float
    unit: str
    meaning: str
