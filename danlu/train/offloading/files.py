"""Tensors that lie in files and are computed with where they lie.

Such a tensor is a shared mapping of a file of its own. The system reads its pages when they are touched, writes them
back in the background, and takes their memory for others when it runs short, so a tensor like this costs address space
and disk, and only as much memory as is to spare. Operators see a plain tensor: what is computed with it has the same
bits as with any other.

The files have no names: a killed process leaves none behind, and the disk gets the room back with the tensor.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from danlu.errors import DanluError
from danlu.train.optimizing.parts import local

SMALLEST = 2**16  # bytes of a tensor that gets a file; a mapping is made of pages, and their number is limited
M_MMAP_THRESHOLD = -3  # mallopt(3)'s name for it, glibc's
APART = 2**17  # bytes of an allocation that goes back to the system when it is freed; glibc's own value to start with
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")  # file systems that have no disk behind them

_LIBC = ctypes.CDLL(None)


class Files:
    """Where tensors are put that are to take no memory, on Linux.

    From the first of them on, memory that is freed goes back to the system, so `kept_memory` is not for such a run.

    Args:
        folder: on a disk, made where it is missing; the faster, the better.

    Raises DanluError where the folder lies in memory, or nothing can be written there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DanluError(f"no folder can be made to offload to ({error})", where=folder) from None
        kind = _file_system(folder)
        if kind in IN_MEMORY:
            fix = "choose a folder on a disk"
            raise DanluError(f"is {kind}, which lies in memory: nothing is saved by it", where=folder, fix=fix)
        _give_back()

    def new(self, size: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros in a file, whose room on the disk is its own from now on.

        Raises DanluError where the disk has none. Without that, touching the tensor would end the process.
        """
        count = 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        try:
            handle, name = tempfile.mkstemp(dir=self.folder)
            try:
                os.posix_fallocate(handle, 0, count * dtype.itemsize)
                flat = torch.from_file(name, shared=True, size=count, dtype=dtype)
            finally:
                os.close(handle)
                Path(name).unlink()
        except (OSError, RuntimeError) as error:
            what = f"{count * dtype.itemsize / 1e6:,.0f} MB cannot be put there ({error})"
            raise DanluError(what, where=self.folder, fix="free some room, or offload to another disk") from None
        return flat.as_strided(size, stride)

    @torch.no_grad()
    def move(self, tensor: Tensor) -> Tensor:
        """A tensor's values in a file, strided alike; the tensor itself where it lies in one already, or is small."""
        if tensor.nbytes < SMALLEST or in_file(tensor):
            return tensor
        like = torch.empty_like(tensor, device="meta")
        moved = self.new(like.shape, like.stride(), like.dtype).copy_(tensor)
        release([moved])
        return moved

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Inside, every new tensor on the CPU lies in a file: a model's weights, an optimizer's moments."""
        with _Keeping(self):
            yield

    def ahead(self, tensors: Iterable[Tensor]) -> None:
        """Begin to read tensors that are wanted soon, in a thread; those that lie in no file are passed over."""
        wanted = [storage for storage in map(_storage, tensors) if storage is not None]
        self._reader.submit(_read, wanted)


def in_file(tensor: Tensor) -> bool:
    """Whether what this process holds of a tensor lies in a file."""
    return _storage(tensor) is not None


def release(tensors: Iterable[Tensor]) -> None:
    """Let go of the memory that tensors in files take at the moment. What they hold stays, and what is changed is
    written back by the system; those that lie in no file are passed over.
    """
    for storage in map(_storage, tensors):
        if storage is not None:
            _advise(storage, mmap.MADV_DONTNEED)


class _Keeping(TorchDispatchMode):
    """Moves what operators make anew. What shares the storage of their inputs stays where it is."""

    def __init__(self, files: Files) -> None:
        super().__init__()
        self.files = files

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        fresh = type(made) is Tensor and func._schema.returns[0].alias_info is None
        return self.files.move(made) if fresh and made.device.type == "cpu" and made.layout == torch.strided else made


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    """The storage of what this process holds of a tensor, where it is a shared mapping.

    Of nothing else may memory be let go: there, what it holds would be lost.
    """
    held = local(tensor)
    if held.device.type != "cpu":
        return None
    storage = held.untyped_storage()
    return storage if storage.filename is not None else None


def _read(storages: list[torch.UntypedStorage]) -> None:
    for storage in storages:
        _advise(storage, mmap.MADV_WILLNEED)


def _advise(storage: torch.UntypedStorage, advice: int) -> None:
    _LIBC.madvise(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), advice)


def _give_back() -> None:
    """Let memory that tensors free go back to the system.

    Left to itself, glibc keeps ever larger pieces for later: what is moved to files, tensor after tensor, would leave
    half of its size behind.
    """
    if platform.libc_ver()[0] == "glibc":
        _LIBC.mallopt(M_MMAP_THRESHOLD, APART)


def _file_system(folder: Path) -> str | None:
    """What kind of file system a folder is on; None where the system does not say (it is Linux that does)."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return None
    place, above, found = folder.resolve(), "", None
    for line in mounts.read_text(encoding="utf-8").splitlines():
        _, where, kind, *_ = line.split(" ")
        if place.is_relative_to(where) and len(where) >= len(above):
            above, found = where, kind
    return found
