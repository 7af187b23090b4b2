"""What can be had at which size: the best mixes along sizes as they are told, beside the files that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from danlu.compress.searching.allocate import solve
from danlu.compress.searching.costs import BYTES, DIVERGENCE, SECONDS, Costs
from danlu.console import table

POINTS = 9


@dataclass(frozen=True)
class Point:
    """A mix that was told of.

    Attributes:
        bytes: of the file. seconds: of a token. divergence: nat a token.
    """

    bytes: float
    seconds: float
    divergence: float

    def plain(self) -> dict[str, Any]:
        """As in frontier.json."""
        return {"bytes": self.bytes, "tokens_per_second": 1 / self.seconds, "divergence": self.divergence}


def sweep(costs: Costs, cache: str, most_seconds: float) -> list[Point]:
    """The best mixes of sizes between the smallest and the largest, as fast as is asked where that can be."""
    choices = costs.choices()
    least, most = (sum(float(pick(cost[BYTES])) for cost in choices.costs) for pick in (np.min, np.max))
    points: list[Point] = []
    for size in np.geomspace(least * 1.0001, most, POINTS):
        limits = [np.inf, size, most_seconds - costs.rest_seconds(cache)]
        answer = solve(choices, limits, DIVERGENCE)
        if not answer.within:
            continue
        point = Point(
            float(answer.totals[BYTES]) + costs.fixed,
            float(answer.totals[SECONDS]) + costs.rest_seconds(cache),
            float(answer.totals[DIVERGENCE]),
        )
        if not points or point.divergence < points[-1].divergence * 0.999:
            points.append(point)
    return points


def print_frontier(found: Mapping[str, Any]) -> None:
    """What was told and what was measured as one table, by size; `found` is as in frontier.json."""
    rows: list[tuple[float, list[str]]] = []
    for point in found["told"]:
        cells = [f"{point['bytes'] / 1e6:,.1f}", f"{point['tokens_per_second']:,.0f}", f"{point['divergence']:.4f}"]
        rows.append((point["bytes"], ["told", *cells, "", ""]))
    for each in found["measured"]:
        size, speed, divergence, rise = (
            each["figures"][name]["value"] for name in ("file_size", "decode", "divergence", "heldout_loss_rise")
        )
        name = f"measured, {each['number']}" + (" (chosen)" if each["chosen"] else "")
        cells = [f"{size / 1e6:,.1f}", f"{speed:,.0f}", f"{divergence:.4f}", f"{rise:+.2%}", each["cache"]]
        rows.append((size, [name, *cells]))
    rows.sort(key=lambda row: row[0])
    table("Frontier", ["", "MB", "token/s", "KLD", "loss", "cache"], [cells for _, cells in rows])
