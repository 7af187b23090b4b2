"""An optimizer whose masters, gradients and moments lie in files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from danlu.train.groups import Group
from danlu.train.offloading.files import Files, in_file, release
from danlu.train.optimizer import Optimizer
from danlu.train.optimizing.parts import beside, local
from danlu.train.optimizing.settings import OptimizerSettings

BUCKET = 2**24  # bytes of masters that are updated at once; with moments and gradients four times that


class FiledOptimizer(Optimizer):
    """The same updates, bit for bit, with all they need kept in files (the idea of arXiv:2104.07857).

    Gradients go to files as soon as backward has made them. An update goes through the weights some at a time: while
    those are updated, the next are read.

    Args:
        masters, copies, settings, groups: see `Optimizer`. A master that has a copy should lie in a file; one that the
            model computes with may lie in memory.
        files: where to put things.
        bucket: bytes of masters to update at once.
    """

    def __init__(
        self,
        masters: dict[str, Tensor],
        copies: dict[str, nn.Parameter],
        settings: OptimizerSettings,
        groups: Mapping[str, Group] | None = None,
        *,
        files: Files,
        bucket: int = BUCKET,
    ) -> None:
        with files.keeping():
            super().__init__(masters, copies, settings, groups)
        self.files = files
        self._buckets = list(_buckets(masters, bucket))
        self._rooms: dict[str, Tensor] = {}
        for name, master in masters.items():
            learns = copies.get(name, master)
            learns.register_post_accumulate_grad_hook(self._put_away(name))

    def _put_away(self, name: str) -> Callable[[Tensor], None]:
        """A hook that moves a finished gradient to its file, to which later micro-batches add."""

        def hook(_: Tensor) -> None:
            master = self.masters[name]
            assert master.grad is not None
            made = local(master.grad)
            if not in_file(made):
                if name not in self._rooms:
                    self._rooms[name] = self.files.move(made)
                else:
                    self._rooms[name].copy_(made)
                master.grad = beside(self._rooms[name], master.grad)
            release([self._rooms[name]])

        return hook

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """See `Optimizer.step`."""
        for name, master in self.masters.items():
            self.parts[name].data = local(master)
        gradients = {name: local(gradient) for name, gradient in self.gradients().items()}
        for names, coming in zip(self._buckets, [*self._buckets[1:], []], strict=True):
            self.files.ahead(self._all_of(coming))
            some = {name: gradients[name] for name in names if name in gradients}
            self._penalise(some)
            for rule in self.rules:
                rule.step(some, learning_rate)
            self._refresh(names)
        self.updates += 1

    @torch.no_grad()
    def refresh(self) -> None:
        """See `Optimizer.refresh`."""
        for names in self._buckets:
            self._refresh(names)

    def _refresh(self, names: list[str]) -> None:
        for name in names:
            if name in self.copies:
                self.copies[name].copy_(self.masters[name])
        release(self._all_of(names))
        release(self.copies[name] for name in names if name in self.copies)

    def _all_of(self, names: list[str]) -> list[Tensor]:
        """What an update of some weights reads and writes."""
        masters = [self.masters[name] for name in names]
        gradients = [self._rooms[name] for name in names if name in self._rooms]
        found = [tensor for rule in self.rules for name in names for tensor in rule.state.get(name, {}).values()]
        return [*masters, *gradients, *found]


def _buckets(masters: Mapping[str, Tensor], limit: int) -> Iterator[list[str]]:
    """Names in their order, some at a time. They are cut by whole sizes, so that all processes cut them alike."""
    names: list[str] = []
    size = 0
    for name, master in masters.items():
        if names and size + master.nbytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += master.nbytes
    if names:
        yield names
