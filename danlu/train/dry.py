"""One process of many, without the others, without memory and without arithmetic: for looking at what a step holds.

Floating-point tensors are torch's fake ones, which have shapes and no numbers. Whole numbers and truth values stay
real, as far as they do not come from them: which tokens are learned, where documents end. What would be read off a
number that is not there is answered as training in good order would: experts get equally many tokens, every choice
finds room, and any number asked for, of whomever, is 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from danlu.train.ledger import is_wrapper

aten, c10d = torch.ops.aten, torch.ops.c10d
FACTORIES = (aten.arange, aten.empty, aten.zeros, aten.ones, aten.full)
# Of collectives between processes that are all alike: where what this process gives goes, and what it gives.
EXCHANGES = {c10d.allgather_.default, c10d._allgather_base_.default, c10d.alltoall_base_.default}


class Numberless(TorchDispatchMode):
    """Above a FakeTensorMode: keeps whole numbers real, and answers what depends on numbers that are not there.

    Args:
        fake: the mode below.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(
        self, func: Any, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(is_wrapper(kind) for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if _real(given) or (not given and _makes_whole(func, args, kwargs)):
            with _disable_current_modes():
                made = func(*args, **kwargs)
                if func in EXCHANGES:
                    _exchange(args[0], args[1])
                elif func is c10d.recv_.default:
                    [told] = args[0]
                    told.fill_(1)
                return made
        if func is aten.empty_like.default and given[0].is_meta and not isinstance(given[0], FakeTensor):
            # Made fake, a parameter without memory could no longer change places with one that has some.
            like = given[0]
            device, dtype = kwargs.get("device") or like.device, kwargs.get("dtype") or like.dtype
            return torch.empty_strided(like.shape, like.stride(), dtype=dtype, device=device)
        if func is aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        if func is aten.bincount.default:
            return _shares(args[0].numel(), args[2] if len(args) > 2 else kwargs["minlength"])
        if func is aten.nonzero.default:
            return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.int64, device=args[0].device)
        made = func(*args, **kwargs)
        if func is aten.detach.default:
            # What the mode remembers of it would keep a parameter from changing places with one without memory.
            self.fake.fake_tensor_converter.tensor_memo.clear()
        return made


def _real(given: list[Tensor]) -> bool:
    """Whether an operator is given whole numbers and truth values alone, all of them real."""
    return bool(given) and not any(isinstance(one, FakeTensor) or one.is_floating_point() for one in given)


def _makes_whole(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a factory makes whole numbers or truth values."""
    if func.overloadpacket not in FACTORIES:
        return False
    dtype = kwargs.get("dtype")
    if dtype is None:
        return func.overloadpacket is aten.arange and all(isinstance(value, int) for value in args)
    return not dtype.is_floating_point and not dtype.is_complex


def _shares(count: int, parts: int) -> Tensor:
    """So many tokens shared out equally, a real tensor."""
    with _disable_current_modes():
        return torch.tensor([count // parts + (part < count % parts) for part in range(parts)])


def _exchange(out: Any, own: Any) -> None:
    """What arrives where every process gives the same as this one."""
    given = tree_leaves(own)
    for number, tensor in enumerate(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
        source = given[number % len(given)]
        tensor.view(-1, source.numel()).copy_(source.flatten())


@contextmanager
def pretended(world: int, rank: int) -> Iterator[None]:
    """Inside, this process is one of so many, of which the others do nothing and nothing ever arrives.

    Raises RuntimeError where this process is one of several already.
    """
    if dist.is_initialized():
        raise RuntimeError("this process has a process group")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def numberless() -> Iterator[None]:
    """Inside, tensors that are made have no numbers; see the module."""
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True) as fake, Numberless(fake):
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # all lie at 0, and are compared
        yield
