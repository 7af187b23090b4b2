"""Rows with what a teacher said of their words, on disk: asked for once, learned from as often as one likes.

Of each place the teacher's likeliest words are kept, so what lies here depends on no model any more and a run that
learns from it resumes as exactly as one on text.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from danlu.artifact import Artifact, canonical
from danlu.data.permutation import shuffled
from danlu.data.stream import Batch, positions_of
from danlu.errors import DanluError
from danlu.tokenizer import Tokenizer

ABOUT = "told.json"
TRAIN, HELDOUT = "train.rows", "heldout.rows"
VERSION = 1
NOTHING = -1e4  # the log probability of a column that no word stands in: e to it is 0, and it is a number

Ids = npt.NDArray[np.int64]
Row = npt.NDArray[np.void]  # one of `row_type`


def row_type(window: int, most: int) -> np.dtype[np.void]:
    """A row on disk, little-endian.

    tokens, targets and segments are [window], as in `danlu.data.stream.Batch`; ids and logprobs are [window, most]: the
    words that the teacher named as a place's target, and how likely they are, in nat. Where it named fewer, the last
    columns have the first one's id and NOTHING. The checksum is CRC-32 of all that follows it.
    """
    line, table = (window,), (window, most)
    return np.dtype(
        [
            ("checksum", "<u4"),
            ("tokens", "<i4", line),
            ("targets", "<i4", line),
            ("segments", "<i4", line),
            ("ids", "<i4", table),
            ("logprobs", "<f4", table),
        ]
    )


def _checksum(row: Row) -> int:
    return zlib.crc32(row.tobytes()[4:])


class RowFile:
    """A file of rows that is written one behind the other, and goes on where a killed process left it.

    Args: path: of the file; what of it is no whole row is cut off.

    Attributes: rows: how many it holds.
    """

    def __init__(self, path: Path, window: int, most: int) -> None:
        self.type = row_type(window, most)
        self._file = path.open("r+b" if path.exists() else "w+b")
        self.rows = sum(1 for _ in self._whole())
        self._file.truncate(self.rows * self.type.itemsize)
        self._file.seek(0, os.SEEK_END)

    def _whole(self) -> Iterator[None]:
        while len(held := self._file.read(self.type.itemsize)) == self.type.itemsize:
            row = np.frombuffer(held, self.type)[0]
            if row["checksum"] != _checksum(row):
                return
            yield

    def append(self, rows: npt.NDArray[np.void]) -> None:
        """Add rows of `type`, on the disk when this returns; their checksums are set here."""
        for row in rows:
            row["checksum"] = _checksum(row)
        self._file.write(rows.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows += len(rows)

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class ToldBatch(Batch):
    """Rows with a teacher's words.

    Attributes:
        told: int64 [B, T, K], the words that the teacher named as each place's target.
        logprobs: fp32 [B, T, K], how likely it found them, in nat; NOTHING in columns without a word.
    """

    told: torch.Tensor | None = None
    logprobs: torch.Tensor | None = None


@dataclass(frozen=True)
class ToldRows:
    """The rows of a finished directory, drawn without end (see `danlu.data.mixing.RowSource`).

    Attributes:
        path: the directory.
        about: the content of its told.json: version, window, columns by file (most), teacher, url, words, how.
        seed: decides, with the number of the epoch, the order; None keeps it as it stands.
        file: which of its files.
    """

    path: Path
    about: dict[str, Any]
    seed: int | None = None
    file: str = TRAIN

    @classmethod
    def open(cls, path: Path, seed: int | None = None, file: str = TRAIN) -> ToldRows:
        """Raises DanluError where there are none, or the directory is not whole."""
        Artifact.load(path)
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
        if about["version"] != VERSION:
            raise DanluError(f"holds rows of version {about['version']}, not {VERSION}", where=path, fix="ask again")
        return cls(path, about, seed, file)

    @property
    def window(self) -> int:
        return int(self.about["window"])

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def digest(self) -> str:
        """The identity of all that is in the directory."""
        return Artifact.load(self.path).digest

    def batch(self, draws: Ids) -> ToldBatch:
        """The rows of these draws, counted from 0 over all epochs: [B, window].

        Raises DanluError where a row is not what was written.
        """
        _, chosen = shuffled(draws, len(self), self.seed)
        rows = np.asarray(self._rows[chosen])
        for number, row in zip(chosen.tolist(), rows, strict=True):
            if row["checksum"] != _checksum(row):
                fix = f"delete {self.path} and ask again"
                raise DanluError(f"row {number:,} is damaged", where=self.path / self.file, fix=fix)
        tokens, targets, told = (torch.from_numpy(rows[name].astype(np.int64)) for name in ("tokens", "targets", "ids"))
        segments, logprobs = (torch.from_numpy(np.ascontiguousarray(rows[name])) for name in ("segments", "logprobs"))
        positions = torch.from_numpy(positions_of(rows["segments"]))
        return ToldBatch(tokens, targets, segments, positions, told=told, logprobs=logprobs)

    def check_words(self, tokenizer: Tokenizer) -> None:
        """Raise DanluError where another vocabulary than this one was asked about."""
        if self.about["words"] != words_digest(tokenizer):
            raise DanluError("the teacher was asked about another vocabulary", where=self.path, fix="ask it again")

    @cached_property
    def _rows(self) -> np.memmap:
        kind = row_type(self.window, int(self.about["most"][self.file]))
        return np.memmap(self.path / self.file, kind, mode="r")


def is_told(place: str | Path) -> bool:
    """Whether a directory holds rows that a teacher was asked about."""
    return (Path(place) / ABOUT).is_file()


def words_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 of which token has which id."""
    return hashlib.sha256(canonical(tokenizer.complete_backend.get_vocab(with_added_tokens=True)).encode()).hexdigest()
