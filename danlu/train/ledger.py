"""Bytes of tensors from their making to their end: what a step of training really holds, operator by operator."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass


@dataclass(slots=True)
class Holding:
    """Memory that tensors share.

    Attributes:
        kind: what it is for.
        size: bytes.
        born, died: counted in operators; None while it is there.
    """

    kind: str
    size: int
    born: int
    died: int | None = None


class Ledger(TorchDispatchMode):
    """Inside, every tensor that an operator makes is counted until nobody holds it any more, real and fake ones alike.

    What an operator needs within itself is not seen, nor are tensors that were there before, except for `hold`. What
    is made on the way back counts as `working`, other tensors as what `kind` says.

    Attributes:
        kind: of what is made next.
        total, peak: bytes held now, and the most so far.
    """

    def __init__(self, kind: str = "weights") -> None:
        super().__init__()
        self.kind, self.total, self.peak = kind, 0, 0
        self._now = self._peak_at = 0
        self._live: dict[int, tuple[weakref.ref[torch.UntypedStorage], Holding]] = {}
        self._all: list[Holding] = []
        self._resize = torch.UntypedStorage.resize_

    def __torch_dispatch__(
        self, func: Any, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(is_wrapper(kind) for kind in types):
            return NotImplemented  # the wrapper's own operators on what it holds come here, too
        made = func(*args, **(kwargs or {}))
        self._now += 1
        kind = self.kind if torch._C._current_graph_task_id() == -1 else "working"
        for tensor in _tensors(made):
            self.hold(tensor, kind)
        return made

    def __enter__(self) -> Ledger:
        ledger = self

        def resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            """FSDP lets go of gathered weights and takes room for them again without any operator."""
            resized: Any = ledger._resize(storage, size)
            ledger._resized(storage)
            return resized

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    @contextmanager
    def counting(self, kind: str) -> Iterator[None]:
        """Inside, what is made is for this."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def hold(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor's memory, unless it is counted already."""
        for storage in _storages(tensor):
            if id(storage) not in self._live and storage.nbytes():
                self._begin(storage, kind)

    def name(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say afterwards what the memory of some tensors is for."""
        for tensor in tensors:
            for storage in _storages(tensor):
                if id(storage) in self._live:
                    self._live[id(storage)][1].kind = kind

    def forget_peak(self) -> None:
        """Look for the most from now on."""
        self.peak, self._peak_at = self.total, self._now

    def at_peak(self) -> dict[str, int]:
        """Bytes by kind when the most was held."""
        found: dict[str, int] = defaultdict(int)
        for one in self._all:
            if one.born <= self._peak_at and (one.died is None or one.died >= self._peak_at):
                found[one.kind] += one.size
        return dict(found)

    def _begin(self, storage: torch.UntypedStorage, kind: str) -> None:
        one = Holding(kind, storage.nbytes(), self._now)
        self._live[id(storage)] = weakref.ref(storage, partial(self._end, id(storage))), one
        self._all.append(one)
        self.total += one.size
        if self.total > self.peak:
            self.peak, self._peak_at = self.total, self._now

    def _end(self, key: int, _: object = None) -> None:
        _, one = self._live.pop(key)
        one.died = self._now
        self.total -= one.size

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._live:
            self._live[id(storage)][1].kind = "gathered"
            self._end(id(storage))
        self._now += 1
        if storage.nbytes():
            self._begin(storage, "gathered")


def is_wrapper(kind: type) -> bool:
    """Whether tensors of a type hold others, as DTensor's do."""
    return hasattr(kind, "__tensor_flatten__")


def _tensors(made: Any) -> Iterator[Tensor]:
    if isinstance(made, Tensor):
        yield made
    elif isinstance(made, tuple | list):
        for one in made:
            yield from _tensors(one)


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    if is_traceable_wrapper_subclass(tensor):
        for value in (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]):
            if isinstance(value, Tensor):
                yield from _storages(value)
    else:
        yield tensor.untyped_storage()
