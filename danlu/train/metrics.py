"""metrics.jsonl, the file with a line for each step: read from its end, so that nothing takes longer as a run grows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from danlu.console import warn

METRICS = "metrics.jsonl"
BLOCK = 2**16  # bytes that are read at once
TAIL = 2**20  # bytes before the end that are looked through: what a power cut can spoil lies there


def cut_back(path: Path, done: int) -> None:
    """Cut the file off before the first line past step `done`.

    A line that cannot be read goes too, with all that follow it, and is told: a cut of the power may leave one. One
    that lies further back than `TAIL` stays; those who read the file pass over it.
    """
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = cut = file.seek(0, os.SEEK_END)
        broken, before = False, 0
        for start, line in _backwards(file):
            step = _read(line).get("step")
            if step is None or step > done:
                cut, before = start, 0
                broken = broken or (step is None and line.endswith(b"\n"))  # a kill cuts the last line short
            else:
                before = before or step
                if end - start > TAIL:
                    break
        file.truncate(cut)
    if broken:
        warn(f"{path}: a line after step {before} cannot be read; it and those after it are dropped")


def read_back(path: Path, begun: int = 0) -> Iterator[dict[str, Any]]:
    """What stands in the file, from the last step back to the first after `begun`; broken lines are passed over."""
    with path.open("rb") as file:
        for _, line in _backwards(file):
            found = _read(line)
            if found and found["step"] <= begun:
                return
            if found:
                yield found


def _read(line: bytes) -> dict[str, Any]:
    """What a line says of its step; {} where it is not whole."""
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else {}


def _backwards(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Where each line begins, and the line with its break, from the last to the first."""
    place, held = file.seek(0, os.SEEK_END), b""
    while place or held:
        cut = held.rfind(b"\n", 0, -1) + 1
        if cut or not place:
            yield place + cut, held[cut:]
            held = held[:cut]
            continue
        size = min(BLOCK, place)
        place -= size
        file.seek(place)
        held = file.read(size) + held
