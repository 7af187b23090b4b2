"""Pipeline parallelism: each process holds some neighbouring layers, and micro-batches pass through them in turn."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from danlu.errors import DanluError
from danlu.model.costs import costs_by_layer
from danlu.model.embedding import Received, TextEmbedding
from danlu.model.transformer import Decoder, Encoder
from danlu.plan.plan import Plan
from danlu.plan.stages import cut

ZERO_BUBBLE = (2, 13)  # the first torch whose zero-bubble schedules run; 2.11's lose the graph between the two passes
TIED = "embedding.tokens.weight"  # held by the first and the last stage where the head shares it


def can_zero_bubble() -> bool:
    """Whether this torch runs zero-bubble pipelines."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= ZERO_BUBBLE


def stages_of(plan: Plan, rank: int) -> list[int]:
    """The stages that a process of a pipeline holds, the earliest first.

    They go round the processes; two zero-bubble stages go there and back (the V schedule, arXiv:2401.10241).
    """
    if plan.schedule == "zero-bubble" and plan.stages == 2:
        return [rank, plan.all_stages - 1 - rank]
    return [rank + turn * plan.pipeline for turn in range(plan.stages)]


def cut_model(model: Decoder | Encoder, plan: Plan, rank: int, length: int, copied: bool) -> list[Decoder | Encoder]:
    """The stages of a process, each a model with the same names that lacks what other stages hold.

    Layers are shared out so that the slowest stage is as fast as can be; the last has the head besides.

    Args:
        model: whole. Its parts share its layers.
        rank: of this process in its pipeline.
        length: tokens of a row.
        copied: a weight that the first and the last stage share is one each, as FSDP wants it; otherwise one for both.
    """
    layers, head = costs_by_layer(model, length)
    borders = cut(layers, plan.all_stages, last=head)
    return [_part(model, *borders[stage], copied) for stage in stages_of(plan, rank)]


def _part(model: Decoder | Encoder, first: int, end: int, copied: bool) -> Decoder | Encoder:
    part = copy.copy(model)
    part._modules = dict(model._modules)
    part.blocks = nn.ModuleDict({str(layer): model.blocks[layer] for layer in range(first, end)})  # type: ignore[index]
    is_last = end == model.config.layers
    if first > 0:
        assert isinstance(model.embedding, TextEmbedding)
        tied = is_last and model.config.tied
        part.embedding = Received(_alike(model.embedding.tokens, copied) if tied else None)
    if not is_last:
        part.norm, part.head = None, None
    return part


def _alike(tokens: nn.Embedding, copied: bool) -> nn.Embedding:
    made = copy.copy(tokens)
    made._parameters = dict(tokens._parameters)
    if copied:
        made.weight = nn.Parameter(tokens.weight.detach().clone(), requires_grad=tokens.weight.requires_grad)
    return made


class Attach(torch.autograd.Function):
    """Hidden states that, on the way back, also ask for the gradient of a penalty."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, penalty: Tensor) -> Tensor:
        ctx.like = penalty
        return hidden.clone()  # FSDP wants no views here

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.ones_like(ctx.like)


def make_schedule(
    plan: Plan,
    stages: dict[int, nn.Module],
    group: dist.ProcessGroup,
    device: torch.device,
    between: Tensor,
    micro_batches: int,
) -> Any:
    """The order in which a process computes its stages.

    Args:
        stages: number -> module. Each takes hidden states (the first: token ids) and keyword arguments; the last gives
            its loss, fp64 [1].
        between: on the meta device, like the hidden states of a micro-batch between two stages.
    """
    if plan.schedule == "zero-bubble" and not can_zero_bubble():
        fix = f"use torch {'.'.join(map(str, ZERO_BUBBLE))} or newer, or schedule=interleaved,stages=2"
        raise DanluError(f"torch {torch.__version__} cannot run zero-bubble pipelines", where="plan", fix=fix)
    made = []
    for number, module in stages.items():
        last = number == plan.all_stages - 1
        rows, length = between.shape[:2]
        ids = torch.empty(rows, length, dtype=torch.int64, device="meta")
        given = ids if number == 0 else between
        gives = torch.empty(1, dtype=torch.float64, device="meta", requires_grad=True) if last else between
        made.append(PipelineStage(module, number, plan.all_stages, device, given, gives, group=group))
    options: dict[str, Any] = {"loss_fn": _itself, "scale_grads": False}
    if plan.schedule == "1f1b":
        return Schedule1F1B(made[0], micro_batches, **options)
    if plan.schedule == "interleaved":
        return ScheduleInterleaved1F1B(made, micro_batches, **options)  # type: ignore[arg-type]
    if plan.stages == 2:
        return ScheduleZBVZeroBubble(made, micro_batches, **options)  # type: ignore[arg-type]
    return ScheduleInterleavedZeroBubble(made, micro_batches, **options)  # type: ignore[arg-type]


def _itself(loss: Tensor, target: Tensor) -> Tensor:
    return loss.sum()


def tied_group(plan: Plan, mesh: Any) -> dist.ProcessGroup | None:
    """The processes that hold the first and the last stage of this process's pipeline, where they are two."""
    ends = {stage: rank for rank in range(plan.pipeline) for stage in stages_of(plan, rank)}
    first, last = ends[0], ends[plan.all_stages - 1]
    if first == last:
        return None
    pipelines = mesh.mesh.movedim(list(mesh.mesh_dim_names).index("pipeline"), -1).flatten(0, -2)
    own = None
    for pipeline in pipelines.tolist():  # every process must take part in making every group
        group = dist.new_group([pipeline[first], pipeline[last]])
        if dist.get_rank() in (pipeline[first], pipeline[last]):
            own = group
    return own
