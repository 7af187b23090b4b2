"""The learning rate as a function of the step and, on a plateau, of the validation losses seen so far."""

from __future__ import annotations

import math
from typing import Any

from danlu.train.optimizing.settings import ScheduleSettings
from danlu.train.settings import TuneSettings


class Schedule:
    """The learning rate of every step of a run: a linear rise, then the fall that the settings choose.

    | kind | share of the highest learning rate after the rise |
    |---|---|
    | constant | 1 |
    | linear, cosine | along the line, or half a wave, to final_share |
    | exponential | final_share to the power of the part that is done |
    | step | drop for each milestone that is passed |
    | inverse_sqrt | sqrt(steps of the rise / steps begun) (arXiv:1706.03762) |
    | wsd | 1, and over the last part of the run along a line to final_share (arXiv:2404.06395) |
    | plateau | drop each time that more than `patience` validations in a row were no better, down to final_share |

    Behind the last step the share stays what it is there; a plateau goes on falling.

    Args:
        learning_rate: the highest.
        steps: of the whole run.
    """

    def __init__(self, settings: ScheduleSettings, learning_rate: float, steps: int) -> None:
        self.settings, self.learning_rate, self.steps = settings, learning_rate, steps
        self.warm = math.ceil(steps * settings.warmup)
        self.best: float | None = None
        self.worse, self.drops = 0, 0

    def rate(self, step: int) -> float:
        """The learning rate of a step counted from 0."""
        if step < self.warm:
            return self.learning_rate * (step + 1) / self.warm
        return self.learning_rate * self._share(step)

    def _share(self, step: int) -> float:
        settings = self.settings
        step = min(step, self.steps - 1)  # a run may go on behind its schedule's end
        done = max(step - self.warm, 0) / max(self.steps - self.warm - 1, 1)
        final, drop = settings.final_share or 0.0, settings.drop or 1.0
        match settings.kind:
            case "linear":
                return 1 - done * (1 - final)
            case "cosine":
                return 1 - (0.5 - 0.5 * math.cos(math.pi * done)) * (1 - final)
            case "exponential":
                return final**done
            case "step":
                return drop ** sum(step >= math.ceil(share * self.steps) for share in settings.milestones or ())
            case "inverse_sqrt":
                return math.sqrt(max(self.warm, 1) / (step + 1))
            case "wsd":
                falling = math.ceil(self.steps * (settings.fall or 0.0))
                return 1 - max(step + 1 - (self.steps - falling), 0) / falling * (1 - final)
            case "plateau":
                return max(drop**self.drops, final)
        return 1.0

    def observe(self, loss: float) -> None:
        """Note a validation loss; on a plateau it may lower the learning rate of all later steps."""
        if self.settings.kind != "plateau":
            return
        bound = math.inf if self.best is None else self.best * (1 - (self.settings.threshold or 0.0))
        if loss < bound:
            self.best, self.worse = loss, 0
        else:
            self.worse += 1
        if self.worse > (self.settings.patience or 0):
            self.drops, self.worse = self.drops + 1, 0

    def state(self) -> dict[str, Any]:
        """What `observe` has noted, as JSON-ready values."""
        return {"best": self.best, "worse": self.worse, "drops": self.drops}

    def load(self, saved: dict[str, Any]) -> None:
        """Take up where `state` left off."""
        self.best, self.worse, self.drops = saved["best"], saved["worse"], saved["drops"]


def learning_rate(step: int, steps: int, settings: TuneSettings) -> float:
    """The learning rate of a step counted from 0, of `steps` in all: a linear rise, then the schedule's fall."""
    fall = {} if settings.schedule == "constant" else {"final_share": settings.final_share}
    chosen = ScheduleSettings(kind=settings.schedule, warmup=settings.warmup, **fall)
    return Schedule(chosen, settings.learning_rate, steps).rate(step)
