"""The learning rate as a pure function of the step, so there is nothing to save."""

from __future__ import annotations

import math

from danlu.train.settings import TuneSettings


def learning_rate(step: int, steps: int, settings: TuneSettings) -> float:
    """The learning rate of a step counted from 0, of `steps` in all: a linear rise, then the schedule's fall."""
    warm = math.ceil(steps * settings.warmup)
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    done = (step - warm) / max(steps - warm - 1, 1)
    fall = {"constant": 0.0, "linear": done, "cosine": 0.5 - 0.5 * math.cos(math.pi * done)}[settings.schedule]
    return settings.learning_rate * (1 - fall * (1 - settings.final_share))
