"""Tensors one after another, in memory while they are few and in a file beyond: a long text's way through a model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from io import BufferedRandom

import torch
from torch import Tensor

ROOM = 60_000_000  # bytes that stay in memory


class Parts:
    """Tensors, read as often as wanted and replaced one by one by others of the same shape and dtype.

    Once they are more than `ROOM`, all of them lie in a temporary file (where TMPDIR says) that ends with this.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self._shapes: list[tuple[torch.Size, torch.dtype]] = []
        self._starts = [0]  # of each in the file, and behind the last
        self._kept: list[Tensor] = []  # all or none
        self._file: BufferedRandom | None = None
        for tensor in tensors:
            self.append(tensor)

    def __len__(self) -> int:
        return len(self._shapes)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Tensor:
        if self._file is None:
            return self._kept[index]
        shape, dtype = self._shapes[index]
        found = torch.empty(shape, dtype=dtype)
        self._file.seek(self._starts[index])
        self._file.readinto(_bytes(found))
        return found

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        assert (tensor.shape, tensor.dtype) == self._shapes[index]
        if self._file is None:
            self._kept[index] = tensor
        else:
            self._write(index, tensor)

    def append(self, tensor: Tensor) -> None:
        """One more, behind the others."""
        self._shapes.append((tensor.shape, tensor.dtype))
        self._starts.append(self._starts[-1] + tensor.numel() * tensor.itemsize)
        if self._file is not None:
            self._write(len(self) - 1, tensor)
            return
        self._kept.append(tensor)
        if self._starts[-1] > ROOM:
            self._file = tempfile.TemporaryFile(prefix="danlu-")  # noqa: SIM115  # open as long as this is
            for index, kept in enumerate(self._kept):
                self._write(index, kept)
            self._kept.clear()

    def _write(self, index: int, tensor: Tensor) -> None:
        assert self._file is not None
        self._file.seek(self._starts[index])
        self._file.write(_bytes(tensor))
        self._file.flush()


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, in the tensor's own memory where it lies in one piece."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
