"""The checkpoints of a run as people look at them."""

from __future__ import annotations

from pathlib import Path

from danlu.console import table
from danlu.errors import DanluError
from danlu.train.state import CHECKPOINTS, Facts, list_checkpoints


def checkpoints_of(run: Path, *, contents: bool) -> list[Facts]:
    """Every checkpoint of a run, ascending. Raises DanluError where there are none.

    Args:
        contents: whether every byte is read and compared with its checksum.
    """
    home = run / CHECKPOINTS
    if not home.is_dir():
        raise DanluError("holds no checkpoints", where=run, fix="name the directory of `danlu train`, say runs/NAME")
    return list_checkpoints(home, contents=contents)


def print_checkpoints(run: Path, found: list[Facts], *, contents: bool) -> None:
    """A table of them."""
    whole = "whole" if contents else "sizes are right"
    rows = [
        (
            facts.step,
            f"{facts.bytes / 1e6:,.1f} MB",
            facts.files,
            "" if facts.score is None else f"{facts.score:.4f}",
            facts.made or "",
            facts.problem or whole,
        )
        for facts in found
    ]
    table(f"{run}", ("step", "size", "files", "validation loss", "made", "state"), rows)
