"""A running average of the weights, which often generalises better than the last of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from danlu.train.optimizer import Optimizer
from danlu.train.optimizing.parts import beside, fill, local


class Average:
    """The exponential moving average of an optimizer's masters, in fp32; it lies as they do.

    Args:
        decay: share of the old average that an update keeps.
        warmup: weigh as Adam does (arXiv:1412.6980, section 3): the start does not count, and the first update makes
            the average equal to the weights. Without, the average starts at the weights as they are now.

    Attributes:
        updates: int64 scalar, how many were made.
    """

    def __init__(self, optimizer: Optimizer, decay: float, warmup: bool = False) -> None:
        self.optimizer, self.decay, self.warmup = optimizer, decay, warmup
        self.parts = [weight.clone() for weight in self._weights()]
        self.averages = {
            name: beside(part, master)
            for (name, master), part in zip(optimizer.masters.items(), self.parts, strict=True)
        }
        self.updates = torch.zeros((), dtype=torch.int64)

    def _weights(self) -> list[Tensor]:
        return [local(master) for master in self.optimizer.masters.values()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are after a step."""
        self.updates += 1
        new = 1 - self.decay
        if self.warmup:
            new /= 1 - self.decay ** int(self.updates)
        if self.parts:
            torch._foreach_lerp_(self.parts, self._weights(), new)

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as named tensors that share storage."""
        return {f"average.{name}": tensor for name, tensor in self.averages.items()} | {"averaged": self.updates}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take up where `state` left off. Raises KeyError or DanluError where the tensors are not these."""
        for name, target in self.state().items():
            fill(name, target, saved[name])

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the model's weights are the averages; afterwards they are the same bits as before.

        Weights and averages change places one tensor at a time, so this takes no memory to speak of.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, average in zip(self._weights(), self.parts, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        self.optimizer.refresh()
