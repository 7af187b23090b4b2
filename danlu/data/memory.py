"""Rows of unequal lengths that fit into memory, and batches of them by step and seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from danlu.data.permutation import key_of, permute
from danlu.data.stream import Stream, share_of

MULTIPLE = 8  # batches are padded to a multiple of so many places, which fast matrix products want
B = TypeVar("B", covariant=True)


@dataclass(frozen=True)
class Ragged:
    """Rows of whole numbers, each of its own length.

    Attributes:
        values: int32, all rows behind one another.
        starts: int64 [rows + 1], where each row begins in `values`, and the last one's end.
    """

    values: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int] | npt.NDArray[np.signedinteger]]) -> Ragged:
        """The same numbers, kept tightly."""
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        values = np.concatenate([np.asarray(row, dtype=np.int32) for row in rows]) if len(rows) else np.empty(0)
        return cls(values.astype(np.int32), np.concatenate(([0], lengths.cumsum())).astype(np.int64))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> npt.NDArray[np.int32]:
        return self.values[self.starts[row] : self.starts[row + 1]]

    def lengths(self, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How long the rows of these numbers are, int64 [B]."""
        return self.starts[chosen + 1] - self.starts[chosen]

    def padded(self, chosen: npt.NDArray[np.int64], fill: int) -> npt.NDArray[np.int64]:
        """The rows of these numbers, int64 [B, T], with `fill` behind each up to the next multiple of 8."""
        table = np.full((len(chosen), self._width(chosen)), fill, dtype=np.int64)
        for line, row in zip(table, chosen.tolist(), strict=True):
            line[: len(self[row])] = self[row]
        return table

    def segments(self, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """int32 [B, T] beside `padded`: 1 where the row is, 0 where padding is."""
        return (np.arange(self._width(chosen)) < self.lengths(chosen)[:, None]).astype(np.int32)

    def _width(self, chosen: npt.NDArray[np.int64]) -> int:
        longest = int(self.lengths(chosen).max(initial=1))
        return -(-longest // MULTIPLE) * MULTIPLE


class MemoryRows(Protocol[B]):
    """Rows that a stream draws from."""

    def __len__(self) -> int: ...

    def take(self, chosen: npt.NDArray[np.int64]) -> B:
        """The batch of the rows with these numbers, in this order."""
        ...


class MemoryStream(Generic[B]):
    """Batches of rows in memory without end, drawn exactly as `Stream` draws: by seed and step, on any number of ranks.

    Args: see `Stream`. Raises DanluError as it does.
    """

    def __init__(self, rows: MemoryRows[B], batch_rows: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.rows = rows
        self._order = Stream(rows, batch_rows, seed, rank, world)  # type: ignore[arg-type]  # only their number counts

    def batch(self, step: int) -> B:
        """The batch of a step, counted from 0: batch_rows / world rows."""
        return self.rows.take(self.indices(step))

    def indices(self, step: int) -> npt.NDArray[np.int64]:
        """The numbers of the rows in this rank's batch of a step, int64 [batch_rows / world]."""
        return self._order.indices(step)


class MeasurableRows(MemoryRows[B], Protocol[B]):
    """Rows that tell how long they are."""

    def lengths(self, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens of the rows with these numbers, int64 [B]."""
        ...


class AlikeStream(Generic[B]):
    """As `MemoryStream`, with rows of like length side by side, so that little is padded.

    The rows of some steps are drawn together, sorted by length, and cut into batches, which then come in an order of
    chance: still a function of seed and step alone.

    Args:
        together: so many steps.
        rows, batch_rows, seed, rank, world: see `Stream`.
    """

    def __init__(
        self, rows: MeasurableRows[B], batch_rows: int, seed: int, together: int, rank: int = 0, world: int = 1
    ) -> None:
        self.rows, self.seed, self.together = rows, seed, together
        self._mine = np.array(share_of(batch_rows, rank, world), dtype=np.int64)
        self._drawn = MemoryStream(rows, batch_rows * together, seed)

    def batch(self, step: int) -> B:
        """The batch of a step, counted from 0: batch_rows / world rows."""
        return self.rows.take(self.indices(step))

    def indices(self, step: int) -> npt.NDArray[np.int64]:
        """The numbers of the rows in this rank's batch of a step, int64 [batch_rows / world]."""
        turn, place = divmod(step, self.together)
        drawn = self._drawn.indices(turn)
        order = np.argsort(self.rows.lengths(drawn), kind="stable")
        chosen = permute(np.array([place], dtype=np.int64), self.together, key_of(self.seed, turn, 2))
        return drawn[order].reshape(self.together, -1)[chosen[0]][self._mine]


def tensor(array: npt.NDArray[np.generic]) -> torch.Tensor:
    """The same numbers as a tensor of the same dtype."""
    return torch.from_numpy(np.ascontiguousarray(array))
