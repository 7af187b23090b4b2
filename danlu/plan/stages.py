"""Which layers a pipeline's stages hold."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise


def cut(costs: Sequence[float], stages: int, first: float = 0.0, last: float = 0.0) -> list[tuple[int, int]]:
    """Neighbouring layers for every stage, so that the slowest stage is as fast as can be.

    Args:
        costs: of each layer, in any unit of time.
        stages: how many; each gets at least one layer.
        first, last: what the first stage does besides (the embedding), and the last (head and loss).

    Returns: (first layer, end) of each stage. Of equally good cuts, the one whose early stages are fuller: they hold
    more micro-batches in memory, but the last ones have less to wait for.
    """
    if not 1 <= stages <= len(costs):
        raise ValueError(f"{len(costs)} layers cannot fill {stages} stages")
    before = [0.0, *accumulate(costs)]
    count = len(costs)
    # slowest[s][n]: the least possible time of the slowest of s + 1 stages over the first n layers.
    slowest = [[before[n] + first + (last if stages == 1 else 0.0) if n else float("inf") for n in range(count + 1)]]
    choice: list[list[int]] = [[0] * (count + 1)]
    for stage in range(1, stages):
        extra = last if stage == stages - 1 else 0.0
        times, starts = [float("inf")] * (count + 1), [0] * (count + 1)
        for n in range(stage + 1, count + 1):
            for start in range(stage, n):
                time = max(slowest[-1][start], before[n] - before[start] + extra)
                if time <= times[n]:
                    times[n], starts[n] = time, start
        slowest.append(times)
        choice.append(starts)
    borders, end = [count], count
    for starts in reversed(choice):
        end = starts[end]
        borders.append(end)
    borders.reverse()
    return list(pairwise(borders))
