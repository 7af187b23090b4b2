"""Documents -> rows of one width, each filled with whole documents that do not see one another."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from danlu.data.permutation import key_of, permute
from danlu.data.template import Document

OPEN_ROWS = 256  # rows being filled at a time; more pack no tighter
SHUFFLED = 2**20  # tokens held back to be shuffled, so that neighbours in a file do not end up in one row


@dataclass
class PackFigures:
    """What has been packed; `tokens` counts no padding."""

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    trained: int = 0

    def efficiency(self, window: int) -> float:
        """Share of the rows that is filled."""
        return self.tokens / (self.rows * window) if self.rows else 0.0


class GrowingArray:
    """A .npy file of rows, written from front to back without knowing how many there will be."""

    def __init__(self, path: Path, width: int, dtype: type[np.generic]) -> None:
        self._file: IO[bytes] = path.open("wb")
        self._width, self._dtype = width, np.dtype(dtype)
        self._rows = 0
        self._header()

    def append(self, row: npt.NDArray[np.generic]) -> None:
        self._file.write(row.astype(self._dtype, copy=False).tobytes())
        self._rows += 1

    def close(self) -> None:
        """Write the true number of rows into the header, which has room for it."""
        self._file.seek(0)
        self._header()
        self._file.close()

    def _header(self) -> None:
        described = {
            "descr": npy.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._rows, self._width),
        }
        npy.write_array_header_1_0(self._file, described)


class Packer:
    """Packs documents into the rows of a directory: tokens.npy, segments.npy and trained.npy.

    Each document goes into the open row it fills best (best fit); one that fits none opens a new row, and when too
    many are open the fullest is written. Documents are shuffled first, some at a time, by the seed alone.

    Args:
        directory: where the three arrays are written.
        window: tokens a row; no document may be longer.
        padding: the id that fills the rest of a row.
        seed: of the shuffle.
    """

    def __init__(self, directory: Path, window: int, padding: int, seed: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.figures = PackFigures()
        self._window, self._padding, self._seed = window, padding, seed
        self._tokens = GrowingArray(directory / "tokens.npy", window, np.int32)
        self._segments = GrowingArray(directory / "segments.npy", window, np.int32)
        self._trained = GrowingArray(directory / "trained.npy", window, np.bool_)
        self._waiting: list[Document] = []
        self._waiting_tokens = self._blocks = self._opened = 0
        self._spaces: list[tuple[int, int]] = []  # (free tokens, row), sorted
        self._rows: dict[int, list[Document]] = {}

    def add(self, document: Document) -> None:
        """Take in a document of 1 to `window` tokens."""
        if not 0 < len(document) <= self._window:
            raise ValueError(f"a document of {len(document)} tokens does not fit a window of {self._window}")
        self._waiting.append(document)
        self._waiting_tokens += len(document)
        if self._waiting_tokens >= SHUFFLED:
            self._place_waiting()

    def close(self) -> PackFigures:
        """Write what is still open, and return the figures."""
        self._place_waiting()
        for _, row in self._spaces:
            self._write(self._rows.pop(row))
        for file in (self._tokens, self._segments, self._trained):
            file.close()
        return self.figures

    def _place_waiting(self) -> None:
        count = len(self._waiting)
        if count:
            order = permute(np.arange(count), count, key_of(self._seed, self._blocks))
            for place in order.tolist():
                self._place(self._waiting[place])
        self._waiting, self._waiting_tokens, self._blocks = [], 0, self._blocks + 1

    def _place(self, document: Document) -> None:
        best = bisect_left(self._spaces, (len(document), -1))
        if best < len(self._spaces):
            space, row = self._spaces.pop(best)
        else:
            space, row = self._window, self._opened
            self._opened += 1
            self._rows[row] = []
        self._rows[row].append(document)
        if space == len(document):
            self._write(self._rows.pop(row))
            return
        insort(self._spaces, (space - len(document), row))
        if len(self._spaces) > OPEN_ROWS:
            self._write(self._rows.pop(self._spaces.pop(0)[1]))

    def _write(self, documents: list[Document]) -> None:
        tokens = np.full(self._window, self._padding, dtype=np.int32)
        segments = np.zeros(self._window, dtype=np.int32)
        trained = np.zeros(self._window, dtype=bool)
        begin = 0
        for number, document in enumerate(documents, 1):
            end = begin + len(document)
            tokens[begin:end], segments[begin:end], trained[begin:end] = document.tokens, number, document.trained
            begin = end
        self._tokens.append(tokens)
        self._segments.append(segments)
        self._trained.append(trained)
        self.figures.rows += 1
        self.figures.documents += len(documents)
        self.figures.tokens += begin
        self.figures.trained += int(trained.sum())
