"""What one process trains of a model, and the gradient of a step of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, OffloadPolicy
from torch.distributed.tensor import DTensor

from danlu.errors import DanluError
from danlu.model.transformer import Block
from danlu.train.compiling import compile_blocks
from danlu.train.learner import Learner, StageLearner
from danlu.train.mesh import Mesh
from danlu.train.optimizer import square_sum
from danlu.train.parallelize import shard, split
from danlu.train.pipelined import TIED, make_schedule, stages_of, tied_group
from danlu.train.recompute import Recompute, recompute_blocks
from danlu.train.waiting import Lookout
from danlu.train.watch import Clock

PREFIX = "model."  # before the names of a model's weights in its learner


class Replica:
    """A process's part of a model with its objective.

    Args:
        model: whole, its weights set, on the process's device, or on the meta device.
        objectives: (model, batch) -> Loss, one for each turn of a step; with a pipeline, one with `hidden` and `score`.
        mesh: the processes; by default this one alone.
        rows, length: of the batch that this process gets in a step, before rows are cut; for models of a family.
        dtype: what is computed in, where weights are laid out over processes.
        recompute: what the backward pass computes again.
        compiled: whether blocks are compiled.
        offload: see `danlu.train.parallelize.shard`.
        batch: the class of batches, for a pipeline.

    Attributes:
        factor: what losses are multiplied by on their way back, and so the gradients that are left on the weights.
        lookout: measures what the first of several processes waits for; None on the others.
    """

    def __init__(
        self,
        model: nn.Module,
        objectives: Sequence[Any],
        mesh: Mesh | None = None,
        *,
        rows: int = 1,
        length: int = 1,
        dtype: torch.dtype = torch.float32,
        recompute: Recompute = "none",
        compiled: bool = False,
        batch: type | None = None,
        offload: OffloadPolicy | None = None,
    ) -> None:
        mesh = mesh or Mesh()
        self.mesh, self.plan, self.clock = mesh, mesh.plan, Clock()
        self.lookout = Lookout(self.clock, mesh.device) if mesh.world > 1 and mesh.rank == 0 else None
        self.factor = 1.0
        width = getattr(getattr(model, "config", None), "width", 0)
        if recompute == "selective" and self.plan.schedule == "zero-bubble":
            what = "a zero-bubble pipeline goes backward twice; selective recomputing keeps nothing for the second time"
            raise DanluError(what, where="recompute", fix="set recompute to full or none")
        parts = split(model, mesh, length, dtype)
        for part in parts if compiled else ():
            compile_blocks(part)
        recompute_blocks([inner for part in parts for inner in part.modules() if isinstance(inner, Block)], recompute)
        self.learners: list[Learner | StageLearner] = []
        self.stages: list[int] = []
        self.schedule: Any = None
        self._tied: dist.ProcessGroup | None = None
        if self.plan.pipeline == 1:
            self.learners = [Learner(parts[0], objectives)]
        else:
            [objective] = objectives
            assert batch is not None
            self.stages, last = stages_of(self.plan, mesh.place("pipeline")), self.plan.all_stages - 1
            pairs = zip(self.stages, parts, strict=True)
            self.learners = [StageLearner(part, objective, stage == last, batch) for stage, part in pairs]
        for learner in self.learners:
            shard(learner, mesh, dtype, offload)
        if self.plan.pipeline > 1:
            tokens = length // self.plan.context // (self.plan.tensor if self.plan.sequence else 1)
            shape = (rows // self.plan.micro_batches, tokens, width)
            self.between = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
            self._make_schedule()
            if model.config.tied:  # type: ignore[union-attr]
                self._tied = tied_group(self.plan, mesh.fine)

    def _make_schedule(self) -> None:
        group = self.mesh.group("pipeline")
        assert group is not None
        stages: dict[int, nn.Module] = dict(zip(self.stages, self.learners, strict=True))
        self.schedule = make_schedule(self.plan, stages, group, self.mesh.device, self.between, self.plan.micro_batches)

    @staticmethod
    def _names(learner: nn.Module) -> dict[str, nn.Parameter]:
        return {name.removeprefix(PREFIX): weight for name, weight in learner.named_parameters()}

    @property
    def models(self) -> list[nn.Module]:
        """The parts of the model that are here."""
        return [learner.model for learner in self.learners]

    def parameters(self) -> dict[str, nn.Parameter]:
        """The weights that are here, by the names of the whole model; cut ones are DTensors."""
        found: dict[str, nn.Parameter] = {}
        for learner in self.learners:
            found |= self._names(learner)
        return found

    def buffers(self) -> dict[str, Tensor]:
        """Running means and the like, by the names of the whole model."""
        return {
            name.removeprefix(PREFIX): buffer for learner in self.learners for name, buffer in learner.named_buffers()
        }

    def gradients(self, batch: Any, count: int, turn: int = 0) -> Tensor:
        """Add the gradient of a step's rows, times `factor`, to the weights.

        Args:
            batch: this process's rows.
            count: targets of the whole batch, on all processes, by which losses are divided.
            turn: whose objective is minimised.

        Returns: this process's part of the sum of losses, fp64 without gradient: summed over all processes it is the
        whole batch's.
        """
        batch = self._cut_rows(batch)
        with nullcontext() if self.lookout is None else self.lookout.step():
            if self.schedule is None:
                total = self._straight(batch, count, turn)
            else:
                with self.clock.phase("forward and backward"):
                    total = self._pipelined(batch, count)
        with self.clock.phase("communication"):
            self._finish()
        return total / self.plan.tensor

    @torch.no_grad()
    def measure(self, batches: Iterable[Any]) -> float:
        """The mean loss of some batches, the same number on every process.

        Args: batches: this process's part of each.
        """
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            own = self._cut_rows(batch.to(self.mesh.device))
            with self.clock.phase("validation"):
                loss = self._loss(own) if self.schedule is None else self._through_stages(own)
            sums += torch.stack((loss / self.plan.tensor, torch.tensor(batch.count * self._share, dtype=torch.float64)))
        self.reshard()
        total, count = self.mesh.sum(sums).tolist()
        return total / max(count, 1.0)

    @property
    def _share(self) -> float:
        """Of what is counted on every process, the part that makes the sum over all processes right."""
        return self.plan.readers / self.plan.world

    def _loss(self, batch: Any) -> Tensor:
        [learner] = self.learners
        parts = (learner(part)[0].double().cpu() for part in batch.split(self.plan.micro_batches))
        return torch.stack(list(parts)).sum()

    def _through_stages(self, batch: Any) -> Tensor:
        """The loss of a batch that goes forward through the stages of a pipeline in one piece; 0 without the last."""
        held: dict[int, Any] = dict(zip(self.stages, self.learners, strict=True))
        owners = {stage: rank for rank in range(self.plan.pipeline) for stage in stages_of(self.plan, rank)}
        group, inputs, x = self.mesh.group("pipeline"), _filled(batch), batch.tokens
        for stage in range(self.plan.all_stages):
            before, owner = owners.get(stage - 1), owners[stage]
            if stage > 0 and before != owner:
                if stage - 1 in held:
                    dist.send(x.contiguous(), group=group, group_dst=owner)
                if stage in held:
                    x = torch.empty((len(batch.tokens), *self.between.shape[1:]), dtype=self.between.dtype)
                    x = x.to(self.mesh.device)
                    dist.recv(x, group=group, group_src=before)
            if stage in held:
                held[stage].total = torch.zeros((), dtype=torch.float64)
                x = held[stage](x, **inputs)
        return held[stage].total if stage in held else torch.zeros((), dtype=torch.float64)

    def reshard(self) -> None:
        """Let go of gathered weights: after a forward pass alone they stay, and would not see weights that change."""
        for learner in self.learners:
            if isinstance(learner, FSDPModule):
                learner.reshard()

    def _cut_rows(self, batch: Any) -> Any:
        """The places of the rows that this process holds, where several share them."""
        if self.mesh.ring is None:
            return batch
        places = self.mesh.ring.places(batch.tokens.shape[1])
        return replace(
            batch,
            **{f.name: getattr(batch, f.name)[:, places] for f in fields(batch) if getattr(batch, f.name) is not None},
        )

    def _straight(self, batch: Any, count: int, turn: int) -> Tensor:
        [learner] = self.learners
        parts = batch.split(self.plan.micro_batches)
        losses = []
        for number, part in enumerate(parts):
            if isinstance(learner, FSDPModule):
                last = number + 1 == len(parts)
                learner.set_is_last_backward(last)
                # ZeRO's first stage sums gradients up whole and lays them out once.
                learner.set_requires_gradient_sync(last or self.plan.zero > 1)
            with self.clock.phase("forward"):
                loss, penalty = learner(part, turn)
            with self.clock.phase("backward"):
                # Tensor processes each make the whole penalty, of which gradients are summed.
                ((loss + penalty / self.plan.tensor) / max(count, 1) * self.factor).backward()
            losses.append(loss.detach().double())
        return torch.stack(losses).sum().cpu()  # an accelerator is waited for once a step, not for every part

    def _pipelined(self, batch: Any, count: int) -> Tensor:
        for learner in self.learners:
            assert isinstance(learner, StageLearner)
            learner.scale = self.factor / max(count, 1)
            learner.penalty_scale = learner.scale / self.plan.tensor
            learner.total = torch.zeros((), dtype=torch.float64)
        inputs = _filled(batch)
        first = [inputs["tokens"]] if 0 in self.stages else []
        target = inputs["tokens"] if self.plan.all_stages - 1 in self.stages else None
        self.schedule.step(*first, target=target, return_outputs=False, **inputs)
        return torch.stack([learner.total for learner in self.learners if isinstance(learner, StageLearner)]).sum()

    def _finish(self) -> None:
        """Sum up what several processes have made parts of and nobody has summed yet."""
        _sum_partial(list(self.parameters().values()))
        ends = self._ends()
        if self._tied is not None and ends:
            dist.all_reduce(_local(ends[0].grad), group=self._tied)
        elif len(ends) == 2 and ends[0] is not ends[1]:
            _local(ends[1].grad).add_(_local(ends[0].grad))

    def _ends(self) -> list[nn.Parameter]:
        """The weight that the first and the last stage share, as often as it stands here."""
        if self.schedule is None or not self.models[0].config.tied:  # type: ignore[union-attr]
            return []
        return [named[TIED] for learner in self.learners if TIED in (named := self._names(learner))]

    @torch.no_grad()
    def settle(self) -> None:
        """After weights have changed: make both ends of a pipeline equal again where one process holds them apart."""
        ends = self._ends()
        if len(ends) == 2 and ends[0] is not ends[1]:
            _local(ends[0]).copy_(_local(ends[1]))
            ends[0].grad = None

    def copies(self, name: str, weight: Tensor) -> float:
        """How many processes hold the same part of a weight."""
        cuts = 1
        if isinstance(weight, DTensor):
            cuts = math.prod(
                weight.device_mesh.size(number)
                for number, placement in enumerate(weight.placements)
                if not placement.is_replicate()
            )
        ends = 2 if name == TIED and self._tied is not None else 1
        return ends * self.plan.world / self.plan.pipeline / cuts

    def norm(self, gradients: dict[str, Tensor]) -> float:
        """The norm of all gradients together, over all processes; the same bits on each."""
        groups: dict[float, dict[str, Tensor]] = {}
        for name, gradient in gradients.items():
            groups.setdefault(self.copies(name, gradient), {})[name] = gradient
        squares = torch.zeros((), dtype=torch.float64)
        for copies, some in groups.items():
            squares += square_sum(some).cpu() / copies
        return float(self.mesh.sum(squares).sqrt())


def _filled(batch: Any) -> dict[str, Tensor]:
    """The tensors of a batch by their fields."""
    return {field.name: value for field in fields(batch) if (value := getattr(batch, field.name)) is not None}


def _local(x: Tensor | None) -> Tensor:
    assert x is not None
    return x.to_local() if isinstance(x, DTensor) else x


def _sum_partial(weights: list[nn.Parameter]) -> None:
    """Sum gradients of which every process of a mesh has a part, all at once."""
    by_mesh: dict[Any, list[nn.Parameter]] = {}
    for weight in weights:
        gradient = weight.grad
        if isinstance(gradient, DTensor) and any(placement.is_partial() for placement in gradient.placements):
            by_mesh.setdefault((gradient.device_mesh, gradient.placements), []).append(weight)
    for (mesh, placements), some in by_mesh.items():
        flat = torch.cat([_local(weight.grad).flatten() for weight in some])
        for number, placement in enumerate(placements):
            if placement.is_partial():
                dist.all_reduce(flat, group=mesh.get_group(number))
        for weight, summed in zip(some, flat.split([_local(weight.grad).numel() for weight in some]), strict=True):
            own = summed.view(_local(weight.grad).shape)
            assert isinstance(weight, DTensor)
            weight.grad = DTensor.from_local(
                own, mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
            )
