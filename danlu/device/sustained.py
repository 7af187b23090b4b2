"""Decoding without a pause: what is left of the speed once a device is warm."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from danlu.artifact import figure
from danlu.console import progress
from danlu.device.engine import CACHES, Engine

WINDOWS = 12  # parts of the time, of which the first and last quarter tell the trend


def sustained_speed(
    path: Path,
    prompt: Sequence[int],
    seconds: float,
    *,
    context: int,
    threads: int | None = None,
    cache: str = CACHES[0],
) -> dict[str, dict[str, Any]]:
    """Decode for so long, from the prompt again each time the context is full.

    Returns: `sustained`, token/s of the whole time with the slowest and fastest twelfth, and `sustained_trend`, by
        which share the last quarter was faster or slower than the first.
    """
    counts = [0] * WINDOWS
    with (
        Engine(path, context=context, threads=threads, cache=cache) as engine,
        progress("sustained", round(seconds), "s") as tick,
    ):
        shown = 0
        started = time.perf_counter()
        while (elapsed := time.perf_counter() - started) < seconds:
            for _ in engine.generate(list(prompt), max_new_tokens=engine.context):
                elapsed = time.perf_counter() - started
                if elapsed >= seconds:
                    break
                counts[int(elapsed / seconds * WINDOWS)] += 1
                if int(elapsed) > shown:
                    tick.advance(int(elapsed) - shown)
                    shown = int(elapsed)
    each, quarter = seconds / WINDOWS, WINDOWS // 4
    by = f"{seconds:,.0f} s of decoding without a pause; the range is that of its twelfths"
    trend = sum(counts[-quarter:]) / max(sum(counts[:quarter]), 1) - 1
    return {
        "sustained": figure(sum(counts) / seconds, "token/s", min(counts) / each, max(counts) / each, by),
        "sustained_trend": figure(trend, "share", by="the last quarter against the first"),
    }
