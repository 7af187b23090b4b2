"""Settings of training with local steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from danlu.settings import Settings

TERMS = ("outer_learning_rate", "outer_momentum", "staleness_power", "compress")


class LocalSettings(Settings):
    """How workers that train apart come together."""

    home: Path = Field(description="directory that all workers see, and through which they exchange weights")
    workers: int = Field(
        1, gt=0, description="workers that the first round waits for, up to the deadline; others may join at any time"
    )
    local_steps: int = Field(
        500, gt=0, description="steps between two exchanges; a slow worker may make fewer than the others"
    )
    outer_learning_rate: float = Field(
        0.7, gt=0, description="how far the shared weights follow the mean of what the workers have learned"
    )
    outer_momentum: float = Field(0.9, ge=0, lt=1, description="memory of the shared weights' earlier moves (Nesterov)")
    deadline: float = Field(
        300.0,
        gt=0,
        le=1200,
        description="seconds for which a worker waits for the others; more than a step takes, less than a run may stand"
        " still before it counts as hung",
    )
    staleness_power: float = Field(
        0.5, ge=0, description="what comes n rounds late counts (1 + n) to the power of minus this"
    )
    compress: Literal["none", "bf16"] = Field(
        "none",
        description="number format of what is exchanged; bf16 halves it, and what rounding takes away is given later",
    )
    keep: int = Field(4, ge=4, description="rounds for which a worker keeps what it has written")

    def terms(self) -> dict[str, Any]:
        """What all workers must have alike, since any of them may make a round."""
        return {name: getattr(self, name) for name in TERMS}


class ApartSettings(LocalSettings):
    """A run as one of several workers that train apart and share the rows out."""

    worker: int = Field(
        ge=0, description="which of the workers this run is, from 0; every one is started with a number of its own"
    )
    workers: int = Field(
        1,
        gt=0,
        description="workers among whom the rows of a step are shared out; the first round waits for all of them, up to"
        " the deadline, and who is missing may join at any time",
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> ApartSettings:
        if self.worker >= self.workers:
            raise ValueError(f"worker {self.worker} is none of {self.workers}, which are numbered from 0")
        return self

    def beside(self, folder: Path) -> ApartSettings:
        """The same with a relative directory starting at `folder`."""
        return self.model_copy(update={"home": folder / self.home})
