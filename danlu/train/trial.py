"""A short run of `danlu train`, to see how long a step takes and how much memory it holds; nothing of it is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from danlu.artifact import write_json
from danlu.errors import DanluError

POLL = 0.05  # seconds between two looks at a run
GONE = 60.0  # seconds that killed processes may take to go
SAID = 3000  # characters of what a failed run said that are told
NEVER = 1_000_000  # steps: none is ever done
WARM = 2  # steps before those that count: memory is touched and kernels are made for the first time


def short_run(
    recipe: dict[str, Any], steps: int, folder: Path, plan: str | None = None, timeout: float = 600.0
) -> list[dict[str, Any]]:
    """The first lines of metrics.jsonl of a run that is ended as soon as they are there.

    The run writes no checkpoint and measures no held-out loss. Its memory is that of training steps alone.

    Args:
        recipe: of `TrainRecipe`, JSON-able, its paths whole.
        steps: lines that are waited for.
        folder: for the recipe and the run, to be deleted by the caller.
        plan: as in tensor=2; None for the recipe's.
        timeout: seconds that the run may take.

    Raises DanluError where the run ends by itself or takes too long, with the end of what it said.
    """
    out, path = folder / "run", folder / "recipe.json"
    never = {"steps": NEVER, "checkpoints": {"every": NEVER}, "validation": {"every": NEVER}}
    write_json(path, recipe | never)  # JSON is YAML
    words = [sys.executable, "-m", "danlu", "train", str(path), "--out", str(out)]
    words += [] if plan is None else ["--plan", plan]
    until = time.monotonic() + timeout
    with (folder / "said").open("w+", encoding="utf-8") as said:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True)
        try:
            lines: list[dict[str, Any]] = []
            while len(lines) < steps and process.poll() is None and time.monotonic() < until:
                time.sleep(POLL)
                lines = whole_lines(out / "metrics.jsonl")
        finally:
            end(process)
        said.seek(0)
        text = said.read()
    if len(lines) < steps:
        why = "ended" if time.monotonic() < until else f"took more than {timeout:.0f} s"
        raise DanluError(f"a trial run {why} before it was measured", where=recipe["name"], fix=text[-SAID:].strip())
    return lines[:steps]


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that is being written."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def step_seconds(lines: list[dict[str, Any]]) -> float:
    """The median of the steps after the first few."""
    return median(line["seconds"] for line in lines[WARM:])


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a run with all its processes, and wait until they are gone, and their memory with them."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + GONE
    with suppress(ProcessLookupError):
        while time.monotonic() < until:
            os.killpg(process.pid, 0)
            time.sleep(POLL)
