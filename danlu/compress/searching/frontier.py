"""What can be had at which size: the best mixes along sizes as they are told, beside the files that were measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from danlu.compress.searching.allocate import solve
from danlu.compress.searching.costs import BYTES, DIVERGENCE, Told
from danlu.compress.searching.starts import Start
from danlu.console import result, table

POINTS = 9


@dataclass(frozen=True)
class Point:
    """A mix that was told of.

    Attributes:
        start: the model it is of.
        told: of the file.
    """

    start: str
    told: Told

    def plain(self) -> dict[str, Any]:
        """As in frontier.json."""
        return {
            "start": self.start,
            "bytes": self.told.bytes,
            "tokens_per_second": 1 / self.told.seconds,
            "divergence": self.told.divergence,
        }


def sweep(starts: Sequence[Start], cache: str, own: float, most_seconds: float) -> list[Point]:
    """The best mixes of sizes between the smallest and the largest, as fast as is asked where that can be.

    Args: own: the divergence that the cache brings.
    """
    found = [point for start in starts for point in _of_start(start, cache, own, most_seconds)]
    points: list[Point] = []
    for point in sorted(found, key=lambda each: (each.told.bytes, each.told.divergence)):
        if not points or point.told.divergence < points[-1].told.divergence * 0.999:
            points.append(point)
    return points


def _of_start(start: Start, cache: str, own: float, most_seconds: float) -> Iterator[Point]:
    costs, choices = start.costs, start.costs.choices()
    least, most = (sum(float(pick(cost[BYTES])) for cost in choices.costs) for pick in (np.min, np.max))
    for size in np.geomspace(least * 1.0001, most, POINTS):
        answer = solve(choices, [np.inf, size, most_seconds - costs.rest_seconds(cache)], DIVERGENCE)
        if answer.within:
            forms = choices.named(answer.chosen)
            yield Point(start.name, costs.told(forms, cache, start.own + own))


def print_frontier(found: Mapping[str, Any]) -> None:
    """What was told and what was measured as one table, by size; `found` is as in frontier.json."""
    rows: list[tuple[float, list[str]]] = []
    for point in found["told"]:
        cells = [f"{point['bytes'] / 1e6:,.1f}", f"{point['tokens_per_second']:,.0f}", f"{point['divergence']:.4f}"]
        rows.append((point["bytes"], ["told", point["start"], *cells, "", ""]))
    for each in found["measured"]:
        size, speed, divergence, rise = (
            each["figures"][name]["value"] for name in ("file_size", "decode", "divergence", "heldout_loss_rise")
        )
        name = f"measured, {each['number']}" + (" (chosen)" if each["chosen"] else "")
        cells = [f"{size / 1e6:,.1f}", f"{speed:,.0f}", f"{divergence:.4f}", f"{rise:+.2%}", each["cache"]]
        rows.append((size, [name, each["start"], *cells]))
    rows.sort(key=lambda row: row[0])
    table("Frontier", ["", "model", "MB", "token/s", "KLD", "loss", "cache"], [cells for _, cells in rows])
    for each in found["smaller"]:
        result(f"smaller model {each['name']}: {each['why']}")
