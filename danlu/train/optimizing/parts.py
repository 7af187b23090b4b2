"""What a process holds of a tensor that may be spread over several, and what it needs of the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from danlu.errors import DanluError


def local(tensor: Tensor) -> Tensor:
    """This process's part as a plain tensor without a gradient. It shares the tensor's storage."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            tensor = tensor.to_local()
    return tensor.detach()


def beside(part: Tensor, master: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """A tensor spread like `master` of which this process holds `part`; `part` itself where `master` is not spread.

    Args:
        shape: of the whole, where it is not the master's.
    """
    if not isinstance(master, DTensor):
        return part
    whole = torch.empty(shape or master.shape, device="meta")
    return DTensor.from_local(
        part, master.device_mesh, master.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process of its mesh must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(everything: Tensor, master: Tensor) -> Tensor:
    """The part of a whole tensor that this process holds of `master`, which has the same shape. A view."""
    if isinstance(master, DTensor):
        sizes, starts = compute_local_shape_and_global_offset(master.shape, master.device_mesh, master.placements)
        for dim, (size, start) in enumerate(zip(sizes, starts, strict=True)):
            everything = everything.narrow(dim, min(start, everything.shape[dim] - size), size)
    return everything


def cuts(master: Tensor, *dims: int) -> int:
    """Into how many parts, over all processes, these dimensions of a tensor are cut."""
    if not isinstance(master, DTensor):
        return 1
    asked = {dim % master.dim() for dim in dims}
    placed = zip(master.device_mesh.shape, master.placements, strict=True)
    return math.prod(size for size, placement in placed if getattr(placement, "dim", None) in asked)


@torch.no_grad()
def fill(name: str, target: Tensor, saved: Tensor) -> None:
    """Copy a tensor, whole or spread in any way, into one of the same shape.

    Raises DanluError where the shapes differ.
    """
    if saved.shape != target.shape:
        what = f"{name} is {list(saved.shape)} in the checkpoint and {list(target.shape)} here"
        raise DanluError(what, fix="resume with the model and the optimizer that the checkpoint was written with")
    alike = isinstance(saved, DTensor) and isinstance(target, DTensor) and saved._spec == target._spec
    local(target).copy_(local(saved) if alike else own(whole(saved), target))


@dataclass(frozen=True)
class Weight:
    """One weight as an update rule sees it.

    Attributes:
        name: of the parameter.
        master: fp32, plain or spread.
        part: what this process holds of it, with the same storage.
        factor: of its learning rate.
        decay: the share that a step takes of it, before the learning rate.
    """

    name: str
    master: Tensor
    part: Tensor
    factor: float
    decay: float

    def zeros(self) -> Tensor:
        """Zeros like the master, spread as it is."""
        return beside(torch.zeros_like(self.part), self.master)

    def shrink(self, rate: float) -> None:
        """Decoupled decay (arXiv:1711.05101) at a learning rate that the factor is in."""
        if self.decay:
            self.part.mul_(1 - rate * self.decay)
