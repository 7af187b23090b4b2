"""Examples set aside on disk between the two passes over the data, so that memory does not grow with their number."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator
from pathlib import Path

from danlu.data.example import Example


class Spill:
    """A file of examples: written once from front to back, then read in order, or any one by its number."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._lines = (directory / "examples.jsonl").open("w+b")
        self._offsets = (directory / "offsets").open("w+b")
        self._end = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def close(self) -> None:
        self._lines.close()
        self._offsets.close()

    def add(self, example: Example) -> None:
        """Append an example."""
        line = json.dumps(example.plain(), ensure_ascii=False).encode("utf-8") + b"\n"
        self._lines.write(line)
        self._offsets.write(array("q", [self._end]).tobytes())
        self._end += len(line)
        self._count += 1

    def __iter__(self) -> Iterator[Example]:
        self._finish()
        self._lines.seek(0)
        return map(Example.read, self._lines)

    def __getitem__(self, number: int) -> Example:
        self._finish()
        begin, end = self._offset(number), self._offset(number + 1) if number + 1 < self._count else self._end
        return Example.read(os.pread(self._lines.fileno(), end - begin, begin))

    def _offset(self, number: int) -> int:
        return int.from_bytes(os.pread(self._offsets.fileno(), 8, 8 * number), "little")

    def _finish(self) -> None:
        self._lines.flush()
        self._offsets.flush()
