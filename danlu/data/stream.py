"""Which rows make up the batch of a step: a pure function of seed and step, so there is no state to save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from danlu.data.batch import RowBatch
from danlu.data.permutation import shuffled
from danlu.errors import DanluError

IGNORED = -100  # the target of a token that is not learned, as in torch's cross-entropy


@dataclass(frozen=True)
class Rows:
    """Packed rows on disk, mapped into memory as they are read.

    Attributes:
        tokens: int32 [rows, window].
        segments: int32 [rows, window]: 0 is padding, 1.. the number of the document within its row.
        trained: bool [rows, window], True where the token is one the model must learn to produce.
    """

    tokens: np.memmap
    segments: np.memmap
    trained: np.memmap

    @classmethod
    def open(cls, directory: Path) -> Rows:
        """Map tokens.npy, segments.npy and trained.npy. Raises DanluError where one is missing, damaged or empty."""
        arrays = {field.name: _map(directory / f"{field.name}.npy") for field in fields(cls)}
        if len({array.shape for array in arrays.values()}) != 1 or arrays["tokens"].ndim != 2:
            shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
            raise DanluError(f"the arrays do not belong together: {shapes}", where=directory)
        return cls(**arrays)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def window(self) -> int:
        return int(self.tokens.shape[1])


@dataclass(frozen=True)
class Batch(RowBatch):
    """Rows of tokens with what is to be predicted.

    Attributes:
        tokens: int64 [B, T].
        targets: int64 [B, T], the next token; -100 where that is not learned, or belongs to another document.
        segments: int32 [B, T], 0 is padding; tokens attend only within their own.
        positions: int64 [B, T], from 0 in each document.
        weights: fp32 [B, T], what the loss of each target is multiplied by; None for 1.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    segments: torch.Tensor
    positions: torch.Tensor
    weights: torch.Tensor | None = None

    @cached_property
    def count(self) -> int:
        """How many targets are learned."""
        return int((self.targets != IGNORED).sum())

    @cached_property
    def size(self) -> int:
        """Tokens, padding aside."""
        return int((self.segments > 0).sum())


def make_batch(rows: Rows, indices: Sequence[int] | npt.NDArray[np.int64]) -> Batch:
    """The batch of the rows with these numbers, in this order."""
    chosen = np.asarray(indices, dtype=np.int64)
    tokens = rows.tokens[chosen].astype(np.int64)
    segments = np.asarray(rows.segments[chosen])
    trained = np.asarray(rows.trained[chosen])
    learned = trained[:, 1:] & (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    targets = np.full_like(tokens, IGNORED)
    targets[:, :-1] = np.where(learned, tokens[:, 1:], IGNORED)
    return Batch(*map(torch.from_numpy, (tokens, targets, segments, positions_of(segments))))


class Stream:
    """Batches without end: epoch after epoch, each in its own order, each row exactly once an epoch.

    Rows are counted on across epochs, so a batch may hold the end of one epoch and the beginning of the next.

    Args:
        rows: what to draw from.
        batch_rows: rows a step, over all ranks together. Rank r of w gets the r-th of w equal parts of the batch, so
            the same rows are seen in the same steps on any number of ranks.
        seed: decides the order, together with the number of the epoch.
        rank, world: this process among how many.

    Raises DanluError where there are no rows, or they cannot be shared out evenly.
    """

    def __init__(self, rows: Rows, batch_rows: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if not len(rows):
            raise DanluError("there are no rows to draw from")
        self.rows, self.batch_rows, self.seed = rows, batch_rows, seed
        self._mine = np.array(share_of(batch_rows, rank, world), dtype=np.int64)

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0: [batch_rows / world, window]."""
        return make_batch(self.rows, self.indices(step))

    def indices(self, step: int) -> npt.NDArray[np.int64]:
        """The numbers of the rows in this rank's batch of a step, int64 [batch_rows / world]."""
        return shuffled(step * self.batch_rows + self._mine, len(self.rows), self.seed)[1]


def share_of(batch_rows: int, rank: int, world: int) -> range:
    """Which rows of a batch a process reads. Raises DanluError where they cannot be shared out evenly."""
    if batch_rows < 1 or batch_rows % world:
        fix = f"use a multiple of {world}"
        raise DanluError(f"{batch_rows} rows a step cannot be shared by {world} processes evenly", fix=fix)
    if not 0 <= rank < world:
        raise DanluError(f"rank {rank} is not one of {world} processes", fix=f"use 0 to {world - 1}")
    share = batch_rows // world
    return range(rank * share, (rank + 1) * share)


def _map(path: Path) -> np.memmap:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        fix = "delete the artifact and run the recipe again"
        raise DanluError(f"cannot be read as packed rows: {error}", where=path, fix=fix) from None


def positions_of(segments: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """[B, T] from 0 in each segment, padding included."""
    places = np.arange(segments.shape[1], dtype=np.int64)
    starts = np.ones_like(segments, dtype=bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return places - np.maximum.accumulate(np.where(starts, places, 0), axis=1)
