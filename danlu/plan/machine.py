"""A measured machine as a file that travels: what its device can do, and what Danlu's own runs on it taught."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from danlu.artifact import user_cache, write_json
from danlu.errors import DanluError
from danlu.plan.calibrate import Calibration
from danlu.plan.coefficient import Coefficient
from danlu.plan.memory import MEMORY
from danlu.plan.processor import PROCESSOR_TIME
from danlu.plan.processor_memory import PROCESSOR_MEMORY
from danlu.plan.time import TIME
from danlu.settings import Settings

KIND: Literal["danlu machine"] = "danlu machine"
AGAIN = "measure it again:  danlu plan --probe"


Rate = Annotated[float, Field(ge=1e8)]  # smaller numbers are in other units


class Figures(Settings):
    """Of one accelerator, or of all cores of a processor; links one way. For the units see `plan/hardware.yaml`."""

    name: str = Field(min_length=1, description="as the system calls it")
    processor: bool = Field(description="a processor, which processes share, and no accelerator")
    peak: dict[str, Rate] = Field(min_length=1, description="operations a second of matrix products, by precision")
    memory: float = Field(ge=1e8, description="bytes")
    memory_rate: float = Field(ge=1e8, description="bytes/s")
    units: int = Field(gt=0, description="multiprocessors, or the cores that one process uses by itself")
    near: float | None = Field(None, ge=1e6, description="bytes/s between two processes; null where there is one alone")
    node: int = Field(gt=0, description="accelerators of the machine, or cores")


class Taught(Settings):
    """Coefficients fitted to runs on the machine."""

    coefficients: dict[str, float] = Field(description="by name; see `danlu.plan.time`, `memory` and `processor`")
    spread: float = Field(ge=0, description="half the width of the 90 % interval, in natural logarithms")
    runs: int = Field(ge=0, description="that they were fitted to")

    @classmethod
    def of(cls, taught: Calibration) -> Taught:
        return cls(coefficients=taught.coefficients, spread=taught.spread, runs=taught.runs)

    def calibration(self) -> Calibration:
        return Calibration(dict(self.coefficients), spread=self.spread, runs=self.runs)


class Trial(Settings):
    """One short run, and what is predicted of it with what all of them taught."""

    what: str = Field(description="model, batch and plan, in words")
    seconds: float = Field(gt=0, description="of a step, the median")
    optimizer_seconds: float = Field(gt=0, description="of that, in the optimizer")
    gib: float = Field(gt=0, description="that the fullest process held at most")
    predicted_seconds: float = Field(gt=0, description="of a step")
    predicted_gib: float = Field(gt=0, description="of the fullest process")


class Machine(Settings):
    """All of the file."""

    kind: Literal["danlu machine"] = KIND
    figures: Figures = Field(description="what the device can do")
    time: Taught = Field(description="coefficients of time")
    memory: Taught = Field(description="coefficients of memory")
    trials: tuple[Trial, ...] = Field(description="the runs that taught them")
    by: str = Field(description="what measured it")
    when: str = Field(description="UTC")
    torch: str = Field(description="version of torch")
    seconds: float = Field(ge=0, description="that measuring took")

    def write(self, path: Path) -> None:
        """As JSON, aside and renamed."""
        write_json(path, self.plain())


def machine_file() -> Path:
    """Where `danlu train` looks for this machine's own measurement."""
    return user_cache() / "machine.json"


def read_machine(path: Path) -> Machine:
    """A file that `danlu plan --probe` wrote. Raises DanluError where it is none, or coefficients are out of bounds."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DanluError("there is no such file", where=str(path), fix="danlu plan --probe writes one") from None
    except (OSError, ValueError) as error:
        raise DanluError(f"cannot be read: {error}", where=str(path), fix=AGAIN) from None
    if not isinstance(read, dict) or read.get("kind") != KIND:
        raise DanluError("is no measured machine", where=str(path), fix="danlu plan --probe writes one")
    try:
        machine = Machine.model_validate(read)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
        raise DanluError(what, where=str(path), fix=AGAIN) from None
    processor = machine.figures.processor
    for name, taught, known in (
        ("time", machine.time, PROCESSOR_TIME if processor else TIME),
        ("memory", machine.memory, PROCESSOR_MEMORY if processor else MEMORY),
    ):
        _check(path, name, taught, known)
    return machine


def _check(path: Path, name: str, taught: Taught, known: dict[str, Coefficient]) -> None:
    if set(taught.coefficients) != set(known):
        what = f"{name}.coefficients are those of another version"
        raise DanluError(what, where=str(path), fix=AGAIN)
    for each, bounds in known.items():
        value = taught.coefficients[each]
        if not bounds.low * (1 - 1e-9) <= value <= bounds.high * (1 + 1e-9):
            what = f"{name}.coefficients.{each} is {value:g}, which is not between {bounds.low:g} and {bounds.high:g}"
            raise DanluError(what, where=str(path), fix=AGAIN)
