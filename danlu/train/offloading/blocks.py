"""Blocks whose weights or activations are brought in when they are wanted."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from danlu.train.offloading.files import Files, release


def read_ahead(model: nn.Module, blocks: Sequence[nn.Module], files: Files) -> None:
    """Read the weights of the next block while one computes, forward and backward, and let go of those it has used.

    Args:
        model: all of it; its weights lie in files (others are passed over). With FSDP, it is laid out already.
        blocks: in the order in which they compute.
    """
    weights = [list(block.parameters()) for block in blocks]
    for number, block in enumerate(blocks):
        coming = weights[number + 1] if number + 1 < len(blocks) else []
        before = weights[number - 1] if number else []
        block.register_forward_pre_hook(partial(_begin, files, coming))
        block.register_forward_hook(partial(_end, files, weights[number], before))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_let_go)


def _begin(files: Files, coming: list[nn.Parameter], *_: Any) -> None:
    files.ahead(coming)


def _end(files: Files, own: list[nn.Parameter], before: list[nn.Parameter], *called: Any) -> None:
    release(own)
    output = called[-1]
    if output.requires_grad:
        output.register_hook(lambda gradient: files.ahead(before))


def _let_go(parameter: Tensor) -> None:
    release([parameter])


def offload_activations(blocks: Sequence[nn.Module], away: Callable[[Tensor], Tensor]) -> None:
    """Keep what blocks save for the backward pass somewhere else. With recomputing that is their inputs alone.

    Args:
        away: to the place where it is kept until then: `Files.move`, or a `Host` for an accelerator.
    """
    for block in blocks:
        block.forward = partial(_saving, block, block.forward, away)


class Host:
    """Keeps copies of an accelerator's tensors in its host's memory.

    Pinned memory is read and written by the accelerator while it computes, and can be given to nobody else by the
    system, so it is bounded; what finds no room in it is copied to plain memory, for which the accelerator waits.

    Args: room: bytes that may be pinned at once.
    """

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self, tensor: Tensor) -> Tensor:
        pinned = tensor.is_cuda and self.take(tensor.nbytes)
        kept = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
        if pinned:
            weakref.finalize(kept, self.give, tensor.nbytes)
        return kept.copy_(tensor, non_blocking=pinned)

    def take(self, size: int) -> bool:
        """Whether so many bytes may be pinned, which then count as pinned until they are given back."""
        fits = size <= self.room
        self.room -= size if fits else 0
        return fits

    def give(self, size: int) -> None:
        """So many bytes are pinned no more."""
        self.room += size


def _saving(
    block: nn.Module, forward: Callable[..., Tensor], away: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any
) -> Tensor:
    weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        mine = tensor.untyped_storage().data_ptr() in weights
        return tensor.device, tensor if mine else away(tensor)

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor.to(device, non_blocking=True)

    with saved_tensors_hooks(pack, unpack):
        return forward(*args, **kwargs)
