"""What all batches share: tensors whose first dimension is the rows, cut and moved together."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Protocol, Self, TypeVar

import torch

from danlu.errors import DanluError

Read = TypeVar("Read", covariant=True)


class Batches(Protocol[Read]):
    """What to learn from, a batch of one type each step."""

    def batch(self, step: int) -> Read:
        """This process's part of the batch of a step, counted from 0: a function of nothing but the step."""
        ...


@dataclass(frozen=True)
class RowBatch:
    """The base of batches; each field of a subclass is a tensor with the rows first, or None."""

    def split(self, parts: int) -> list[Self]:
        """Cut along the rows into parts as equal as can be. Raises DanluError where there are more parts than rows."""
        held = self._tensors()
        size = len(next(iter(held.values())))
        if not 1 <= parts <= size:
            raise DanluError(f"a batch of {size} rows cannot be cut into {parts} parts", fix=f"use 1 to {size} parts")
        pieces = zip(*(tensor.tensor_split(parts) for tensor in held.values()), strict=True)
        return [replace(self, **dict(zip(held, piece, strict=True))) for piece in pieces]

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        held = self._tensors()
        if torch.device(device).type == "cuda":
            # Pageable memory would be waited for.
            held = {name: one.pin_memory() if one.device.type == "cpu" else one for name, one in held.items()}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in held.items()})

    def _tensors(self) -> dict[str, torch.Tensor]:
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in held.items() if tensor is not None}
