"""Starting in parts: a process makes room for what it keeps of a model, and fills that one weight after another.

A model is made on the meta device, without memory, cut as the plan says and laid out. Only then do weights come to be:
each is drawn or read as a whole, this process's part of it kept, and the rest let go. So a start takes as much memory
as the part and the largest weight, and has the same bits under every plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor

from danlu.model.stored import Make
from danlu.train.optimizer import masters_of
from danlu.train.replica import Replica
from danlu.train.storage import Box, held


@torch.no_grad()
def start_weights(replica: Replica, makers: Mapping[str, Make], policy: OffloadPolicy | None = None) -> None:
    """Give a replica that was made of a model on the meta device its memory and its weights.

    Args:
        replica: nothing of it is in memory yet.
        makers: by name, every weight and running mean of the whole model.
        policy: what the replica was made with.
    """
    device = replica.mesh.device
    make_room(replica.learners, device, torch.device("cpu") if isinstance(policy, CPUOffloadPolicy) else device)
    for name, tensor in (replica.parameters() | replica.buffers()).items():
        own = held(tensor)
        if own is not None and own[0].elements:
            _keep(*own, makers[name]())
    replica.settle()


def _keep(box: Box, own: Tensor, whole: Tensor) -> None:
    everything = Box((0,) * whole.dim(), tuple(whole.shape))
    own.copy_(whole[box.within(everything)])


def make_room(modules: Sequence[nn.Module], device: torch.device, resting: torch.device) -> None:
    """Put what modules hold on the meta device into memory that nothing is written to yet.

    Args: resting: of weights that are laid out over processes; device: of the others, and of buffers.
    """

    def room(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return torch.empty_like(tensor, device=device)
        own = torch.empty_like(tensor.to_local(), device=resting if laid_out(tensor) else device)
        return DTensor.from_local(
            own,
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )

    with _same_objects():
        for module in modules:
            module._apply(room)


@contextmanager
def _same_objects() -> Iterator[None]:
    """Inside, modules keep their parameters' objects when these get other memory: two stages may share one."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def laid_out(weight: Tensor) -> bool:
    """Whether FSDP keeps a weight, and gathers it in the precision of the computation."""
    names = weight.device_mesh.mesh_dim_names or () if isinstance(weight, DTensor) else ()
    return "shard" in names or "replicate" in names


def masters_and_copies(replica: Replica, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, nn.Parameter]]:
    """The fp32 weights to optimise and the rounded copies that the model computes with, where FSDP makes none."""
    if replica.mesh.fine is None:
        return masters_of(replica.models[0], dtype)
    return {name: weight for name, weight in replica.parameters().items() if weight.requires_grad}, {}
