"""What to do when a step goes wrong: its loss or gradient is no number, or jumps far above the steps before it."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from danlu.artifact import write_json
from danlu.settings import Settings
from danlu.train.notes import read_note

Action = Literal["go on", "skip", "back", "stop"]
FEWEST = 10  # steps that must be known before one counts as a spike


class GuardSettings(Settings):
    """When a step counts as wrong, and what is done then."""

    nonfinite: Literal["stop", "skip", "back"] = Field(
        "stop",
        description="where the loss or the gradient is no finite number: stop; skip the update; or go back to the last"
        " checkpoint and on without the batches that led there",
    )
    spike: float | None = Field(
        None,
        gt=1,
        description="a loss this many times the median of the steps before it is a spike; default: none is",
    )
    on_spike: Literal["stop", "skip", "back"] = Field("skip", description="what is done on a spike, as for nonfinite")
    window: int = Field(50, ge=FEWEST, description="steps that the median is taken over")
    batches: int = Field(1, ge=1, description="batches left out after going back: the wrong one and those before it")
    most: int = Field(10, ge=1, description="wrong steps in a row after which the run is stopped in any case")


class Guard:
    """Judges every step. What it knows is small, the same on all processes, and part of each checkpoint.

    Args:
        home: of the run; steps to leave out are noted there when they are found, since going back forgets the rest.
    """

    def __init__(self, settings: GuardSettings | None = None, home: Path | None = None) -> None:
        self.settings = settings or GuardSettings()
        self._file = None if home is None else home / "skipped.json"
        self.recent: list[float] = []
        self.wrong = 0
        self.left_out: set[int] = set()
        if self._file is not None and self._file.exists():
            fix = "put a copy of it back, or delete it: batches that were left out are then learned from"
            self.left_out = read_note(self._file, lambda saved: set(map(int, saved["steps"])), fix)

    @property
    def goes_back(self) -> bool:
        """Whether a wrong step can lead back to a checkpoint."""
        return self.settings.nonfinite == "back" or (
            self.settings.spike is not None and self.settings.on_spike == "back"
        )

    def judge(self, loss: float, norm: float) -> tuple[Action, str]:
        """What to do with a step of this loss and gradient norm, and why, in words."""
        action, why = self._look(loss, norm)
        self.wrong = 0 if action == "go on" else self.wrong + 1
        if action == "go on":
            self.recent = [*self.recent, loss][-self.settings.window :]
        elif self.wrong >= self.settings.most:
            return "stop", f"{why}; {self.wrong} steps in a row went wrong"
        return action, why

    def _look(self, loss: float, norm: float) -> tuple[Action, str]:
        if not math.isfinite(loss) or not math.isfinite(norm):
            return self.settings.nonfinite, f"loss {loss}, gradient norm {norm}"
        if self.settings.spike is not None and len(self.recent) >= FEWEST:
            usual = statistics.median(self.recent)
            if loss > self.settings.spike * usual:
                return self.settings.on_spike, f"loss {loss:.4g}, {loss / usual:.2g} times the median of {usual:.4g}"
        return "go on", ""

    def leave_out(self, step: int, write: bool) -> None:
        """Never again learn from the batches up to a step's, counted from 0. Args: write: this process notes it."""
        self.left_out |= {number for number in range(step - self.settings.batches + 1, step + 1) if number >= 0}
        if write and self._file is not None:
            write_json(self._file, {"steps": sorted(self.left_out)})

    def state(self) -> dict[str, Any]:
        """What the next judgement depends on, JSON-able."""
        return {"recent": self.recent, "wrong": self.wrong}

    def load(self, saved: dict[str, Any]) -> None:
        """Take up where `state` left off."""
        self.recent, self.wrong = list(saved["recent"]), int(saved["wrong"])
