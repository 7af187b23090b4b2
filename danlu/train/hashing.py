"""What a step learns from: a hash of it, the same however many processes read it, and whether it is numbers."""

from __future__ import annotations

import hashlib
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from danlu.errors import DanluError
from danlu.train.mesh import Mesh


def hash_batch(mesh: Mesh, batch: Any) -> str:
    """16 hexadecimal digits of a BLAKE2b over the hashes of all rows of the whole batch, in their order.

    A row is its token ids or, in batches without, all its tensors. Padding is no part of it: how much of it a row gets
    depends on which others are computed with it.
    """
    own = torch.from_numpy(_row_hashes(batch))
    if mesh.fine is None:
        rows = own
    else:
        parts = [torch.empty_like(own) for _ in range(mesh.world)]
        dist.all_gather(parts, own)
        readers: dict[int, Tensor] = {mesh.reader_of(rank): part for rank, part in enumerate(parts)}
        rows = torch.cat([readers[reader] for reader in range(mesh.plan.readers)])
    return hashlib.blake2b(rows.numpy().tobytes(), digest_size=8).hexdigest()


def check_numbers(batch: Any, step: int) -> None:
    """Raise DanluError, naming field and row, where a batch holds what is no finite number."""
    for name, value in _named(batch).items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            row = int((~value.isfinite()).flatten(1 if value.dim() > 1 else 0).nonzero()[0, 0])
            what = f"step {step + 1}: {name} of row {row} in this process's batch holds NaN or infinity"
            raise DanluError(what, where="data", fix="clean the data, or leave such rows out")


def _row_hashes(batch: Any) -> np.ndarray:
    """int64 [rows]."""
    tensors = _tensors(batch)
    arrays = [np.ascontiguousarray(tensor.detach().cpu().numpy()) for tensor in tensors]
    segments = getattr(batch, "segments", None)
    real = segments.detach().cpu().numpy() > 0 if isinstance(segments, Tensor) else None
    found = []
    for row in range(len(arrays[0]) if arrays else 0):
        digest = hashlib.blake2b(digest_size=8)
        for array in arrays:
            padded = real is not None and array.shape[: real.ndim] == real.shape
            digest.update((array[row][real[row]] if padded and real is not None else array[row]).tobytes())
        found.append(int.from_bytes(digest.digest(), "little", signed=True))
    return np.array(found, dtype=np.int64)


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(getattr(batch, "tokens", None), Tensor):
        return [batch.tokens]
    return list(_named(batch).values())


def _named(batch: Any) -> dict[str, Tensor]:
    """The tensors of a batch that have rows, by the names of their fields."""
    held = {field.name: getattr(batch, field.name) for field in fields(batch)} if is_dataclass(batch) else vars(batch)
    return {name: value for name, value in held.items() if isinstance(value, Tensor) and value.dim()}
