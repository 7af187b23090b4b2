"""What workers have delivered and which rounds were made of it: small files, each whole or absent, and no lock.

`rounds/00000003.json` says how the shared weights of round 3 came about and whose folder holds them. Whoever links
the file there first has made the round; it never changes afterwards. `workers/NAME/notes.json` is a worker's own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from danlu.artifact import sync, write_json
from danlu.errors import DanluError

NOTES = "notes.json"
Model = TypeVar("Model", bound=BaseModel)


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Delivery(_Frozen):
    """What a worker has learned between two exchanges.

    Attributes:
        number: of this worker's deliveries, counted from 0.
        started: the round whose weights it started from.
        seen_from: the round whose weights it is told against: `started` or, where there were newer ones when it was
            delivered, the newest of them.
        steps: that were made.
    """

    worker: str
    number: int
    started: int
    seen_from: int
    steps: int


class Counted(_Frozen):
    """A delivery, and what it was multiplied by before the mean was taken."""

    delivery: Delivery
    weight: float


class Round(_Frozen):
    """How the shared weights of a round came about.

    Attributes:
        maker: the worker in whose folder they lie.
        terms: settings that they were made with.
        counted: of which they are made.
        left_out: deliveries that could not be read.
        through: worker -> number of its last delivery that was dealt with, in this round or before.
    """

    maker: str
    terms: dict[str, Any]
    counted: tuple[Counted, ...] = ()
    left_out: tuple[Delivery, ...] = ()
    through: dict[str, int] = {}


class Notes(_Frozen):
    """What a worker has to know when it is started again.

    Attributes:
        starts: the round that it took up before its first steps, and after each delivery.
        delivered: the last of its deliveries.
    """

    starts: tuple[int, ...] = ()
    delivered: tuple[Delivery, ...] = ()


class Ledger:
    """The books of a directory, as one worker reads and writes them.

    Args:
        keep: deliveries that a worker's notes tell of.
    """

    def __init__(self, home: Path, worker: str, keep: int) -> None:
        self.rounds, self.workers, self.worker, self.keep = home / "rounds", home / "workers", worker, keep
        self.rounds.mkdir(parents=True, exist_ok=True)
        self._newest = max((int(file.stem) for file in self.rounds.glob("[0-9]*.json")), default=-1)

    def newest(self) -> int | None:
        """The last round that was made; None where there is none."""
        while self._file(self._newest + 1).exists():
            self._newest += 1
        return self._newest if self._newest >= 0 else None

    def round(self, number: int) -> Round:
        """Raises DanluError where its file is missing or damaged."""
        return _load(self._file(number), Round)

    def publish(self, number: int, made: Round) -> bool:
        """Make this the round of that number, unless another worker was first; returns whether it is."""
        aside = self.rounds / f".{number:08d}.{self.worker}.aside"
        write_json(aside, made.model_dump())
        try:
            os.link(aside, self._file(number))
            sync(self.rounds)
            return True
        except FileExistsError:
            return False
        finally:
            aside.unlink()
            self._claim(number).unlink(missing_ok=True)

    def claim(self, number: int) -> bool:
        """Say that one is about to make a round; returns False where another has said so.

        It spares others the work and decides nothing: who has waited long enough makes the round all the same.
        """
        try:
            with self._claim(number).open("x", encoding="utf-8") as file:
                file.write(self.worker)
            return True
        except FileExistsError:
            return False

    def notes(self, worker: str | None = None) -> Notes:
        """A worker's, or one's own; empty where it has none yet."""
        file = self.workers / (worker or self.worker) / NOTES
        return _load(file, Notes) if file.exists() else Notes()

    def begin(self, place: int, number: int) -> None:
        """Note that the steps before one's delivery of number `place` start from this round, if it is not noted."""
        notes = self.notes()
        if len(notes.starts) == place:
            self._note(notes.model_copy(update={"starts": (*notes.starts, number)}))

    def deliver(self, delivery: Delivery) -> None:
        """Note that a delivery is there to be counted."""
        notes = self.notes()
        self._note(notes.model_copy(update={"delivered": (*notes.delivered, delivery)[-self.keep :]}))

    def pool(self, number: int) -> list[Delivery]:
        """What was delivered and not dealt with in any round up to this one, by worker and number."""
        through = self.round(number).through
        workers = sorted(folder.name for folder in self.workers.iterdir() if folder.is_dir())
        found = [delivery for worker in workers for delivery in self.notes(worker).delivered]
        return [delivery for delivery in found if delivery.number > through.get(delivery.worker, -1)]

    def _note(self, notes: Notes) -> None:
        write_json(self.workers / self.worker / NOTES, notes.model_dump())

    def _file(self, number: int) -> Path:
        return self.rounds / f"{number:08d}.json"

    def _claim(self, number: int) -> Path:
        return self.rounds / f".{number:08d}.claim"


def weigh(deliveries: Sequence[Delivery], number: int, power: float) -> tuple[Counted, ...]:
    """Give deliveries that are counted after this round their weights.

    Late ones count less, as in FedAsync (arXiv:1903.03934): (1 + rounds) ** -power. A mean over deliveries so weighted
    is one over workers, of which some have delivered twice since the last round.
    """
    share = len(deliveries) / max(len({delivery.worker for delivery in deliveries}), 1)
    return tuple(
        Counted(delivery=delivery, weight=(1 + number - delivery.started) ** -power * share) for delivery in deliveries
    )


def _load(file: Path, kind: type[Model]) -> Model:
    try:
        return kind.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        reason = str(error).partition("\n")[0]
        raise DanluError(f"cannot be read: {reason}", where=file, fix="mend the disk, or use another home") from None
