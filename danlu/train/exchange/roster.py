"""Who takes part, judged by signs of life alone."""

from __future__ import annotations

import time
from pathlib import Path

SIGN = "alive"  # a worker's file: a count that goes up, and whether it is here or gone
HERE, GONE = "here", "gone"
BEATS = 10  # signs of life within a deadline


class Roster:
    """The workers as one of them sees them.

    Each counts up in a file of its own; the others note by their own monotonic clock when they saw it change last, so
    clocks of two machines are never compared.

    Args:
        home: has a folder for each worker.
        deadline: seconds without a sign of life after which a worker is no longer waited for.
    """

    def __init__(self, home: Path, worker: str, deadline: float) -> None:
        self.home, self.worker, self.deadline = home, worker, deadline
        self._count = _counted(_read(home / worker / SIGN))
        self._beaten = 0.0
        self._seen: dict[str, tuple[str, float]] = {}
        self._write(HERE)

    def beat(self) -> None:
        """Give a sign of life, and look for the others', unless that was done a moment ago."""
        if time.monotonic() - self._beaten >= self.deadline / BEATS:
            self._write(HERE)
            self._look()

    def live(self) -> set[str]:
        """Those who have given a sign of life within the deadline and have not left."""
        self._look()
        now = time.monotonic()
        others = {
            name
            for name, (sign, since) in self._seen.items()
            if now - since < self.deadline and not sign.endswith(GONE)
        }
        return others | {self.worker}

    def joined(self) -> int:
        """How many have ever been here, as far as was seen when they were last looked for."""
        return len(self._seen)

    def leave(self) -> None:
        """Say that nobody needs to wait for this worker any more."""
        self._write(GONE)

    def _write(self, state: str) -> None:
        """The file is renamed into place but not made durable: after a crash of the machine nobody is alive anyway."""
        self._count += 1
        self._beaten = time.monotonic()
        aside = self.home / self.worker / f".{SIGN}.aside"
        aside.write_text(f"{self._count} {state}", encoding="ascii")
        aside.replace(self.home / self.worker / SIGN)

    def _look(self) -> None:
        now = time.monotonic()
        for folder in self.home.iterdir():
            sign = _read(folder / SIGN)
            if sign and self._seen.get(folder.name, ("", 0.0))[0] != sign:
                self._seen[folder.name] = (sign, now)


def _read(file: Path) -> str:
    """What a worker's file says; nothing where there is none."""
    try:
        return file.read_text(encoding="ascii")
    except (FileNotFoundError, NotADirectoryError):
        return ""


def _counted(sign: str) -> int:
    return int(sign.split()[0]) if sign else 0
