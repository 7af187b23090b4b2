"""A plan and a model -> the modules that one process computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from danlu.model.mixture import BankFeedForward
from danlu.model.transformer import Block, Decoder, Encoder, Stack
from danlu.train.direct import DirectAllGather, DirectReduceScatter
from danlu.train.dispatch import share_experts
from danlu.train.mesh import Mesh
from danlu.train.pipelined import cut_model
from danlu.train.tensor import distribute, local_experts, split_model


def split(model: nn.Module, mesh: Mesh, length: int, dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    """The parts of a model that this process computes, their weights cut as the plan says; one, or its stages.

    What is cut here is never put together again: stages of the pipeline, matrices, experts. What FSDP lays out and
    gathers comes after, in `shard`.

    Args:
        model: on the meta device.
        length: tokens of a row.
        dtype: what is computed in.
    """
    plan = mesh.plan
    distribute(model, mesh.tensor, mesh.experts)  # before stages part: what two of them share stays one weight
    parts: list[nn.Module] = [model]
    if plan.pipeline > 1:
        assert isinstance(model, Decoder | Encoder)
        parts = list(cut_model(model, plan, mesh.place("pipeline"), length, _over(mesh, dtype) is not None))
    for part in parts:
        for stack in part.modules():
            if isinstance(stack, Stack):
                stack.ring = mesh.ring
        if mesh.tensor is not None:
            split_model(part, mesh.tensor, plan.sequence, plan.overlap)  # type: ignore[arg-type]
        if plan.expert > 1:
            share_experts(part, mesh.group("expert"))  # type: ignore[arg-type]
            if mesh.tensor is None:
                for module in part.modules():
                    if isinstance(module, BankFeedForward):
                        local_experts(module)
    return parts


def _over(
    mesh: Mesh, dtype: torch.dtype, experts: bool = False, offload: OffloadPolicy | None = None
) -> DeviceMesh | None:
    """The processes over which FSDP lays weights; this one alone, if need be, where there is a group: where it computes
    in less than fp32, and where weights rest elsewhere.

    FSDP then keeps the fp32 weights, rounds them for each use and sums gradients in fp32, and brings what rests
    elsewhere, under every plan.
    """
    return mesh.sharding(experts, always=dtype != torch.float32 or isinstance(offload, CPUOffloadPolicy))


def shard(root: nn.Module, mesh: Mesh, dtype: torch.dtype, offload: OffloadPolicy | None = None) -> None:
    """Lay the weights of a module out over the processes that share rows, as FSDP2 does (arXiv:2304.11277).

    Args:
        root: what is called once a micro-batch; blocks and experts inside it are gathered one by one.
        dtype: what is computed in. Weights are kept, and gradients summed, in fp32.
        offload: where weights, gradients and moments rest, if not where they are used.
    """
    over, over_experts = (_over(mesh, dtype, experts, offload) for experts in (False, True))
    if over is None:
        return
    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
        # A zero-bubble pipeline looks for the weights of a backward pass before it begins, among those then gathered.
        "reshard_after_forward": mesh.plan.zero == 3 and mesh.plan.schedule != "zero-bubble",
        "offload_policy": offload or OffloadPolicy(),
    }
    alone: set[nn.Parameter] = set()
    for module in reversed(list(root.modules())):
        if isinstance(module, BankFeedForward) and mesh.plan.expert > 1:
            if over_experts is None:
                alone |= set(module.parameters())
            else:
                fully_shard(module, mesh=over_experts, **options)
        elif isinstance(module, Block):
            fully_shard(module, mesh=over, ignored_params=alone, **options)
    fully_shard(root, mesh=over, ignored_params=alone, **options)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # losses are divided by the count over all processes
            module.set_force_sum_reduction_for_comms(True)
            if mesh.device.type == "cpu":
                module.set_custom_all_gather(DirectAllGather())  # type: ignore[arg-type]
                module.set_custom_reduce_scatter(DirectReduceScatter())  # type: ignore[arg-type]
