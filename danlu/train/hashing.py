"""A hash of what a step learns from, the same however many processes read it."""

from __future__ import annotations

import hashlib
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from danlu.train.mesh import Mesh


def hash_batch(mesh: Mesh, batch: Any) -> str:
    """16 hexadecimal digits of a BLAKE2b over the hashes of all rows of the whole batch, in their order.

    A row is its token ids or, in batches without, all its tensors.
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


def _row_hashes(batch: Any) -> np.ndarray:
    """int64 [rows]."""
    tensors = _tensors(batch)
    arrays = [np.ascontiguousarray(tensor.detach().cpu().numpy()) for tensor in tensors]
    found = []
    for row in range(len(arrays[0]) if arrays else 0):
        digest = hashlib.blake2b(digest_size=8)
        for array in arrays:
            digest.update(array[row].tobytes())
        found.append(int.from_bytes(digest.digest(), "little", signed=True))
    return np.array(found, dtype=np.int64)


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(getattr(batch, "tokens", None), Tensor):
        return [batch.tokens]
    if not is_dataclass(batch):
        return [value for value in vars(batch).values() if isinstance(value, Tensor) and value.dim()]
    values = (getattr(batch, field.name) for field in fields(batch))
    return [value for value in values if isinstance(value, Tensor) and value.dim()]
