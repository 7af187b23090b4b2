"""The processes of a run, arranged as a plan asks, and what they tell each other."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from danlu.errors import DanluError
from danlu.model.ring_attention import Ring
from danlu.plan.plan import DEGREES, ROWS, Plan


def backend_for(device: str) -> str:
    """What of torch.distributed connects processes that compute on this kind of device.

    Counts and hashes are summed in RAM, gradients where they lie.
    """
    return "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"


@dataclass(frozen=True)
class Mesh:
    """This process among those of a run.

    Attributes:
        plan: its degrees multiply to the number of processes.
        device: of this process.
        fine: the processes by all six degrees; None where there is one process and no process group.
        dense: by pipeline, replicate (data x context x expert), shard and tensor: how most weights lie.
        sparse: by pipeline, replicate (data x context), expert, shard and tensor: how the experts' weights lie.
    """

    plan: Plan = field(default_factory=Plan)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    fine: DeviceMesh | None = None
    dense: DeviceMesh | None = None
    sparse: DeviceMesh | None = None

    @property
    def rank(self) -> int:
        """Of this process among all."""
        return dist.get_rank() if self.fine is not None else 0

    @property
    def world(self) -> int:
        """Processes of the run."""
        return self.plan.world

    def place(self, degree: str) -> int:
        """Which of the parts along a degree this process is."""
        return 0 if self.fine is None else self.fine.get_local_rank(degree)

    @property
    def reader(self) -> int:
        """Which part of a batch's rows this process reads, of `plan.readers`."""
        return self._reader({degree: self.place(degree) for degree in ROWS})

    def group(self, degree: str) -> dist.ProcessGroup | None:
        """The processes that differ from this one in a degree only; None where that is only this one."""
        return None if self.fine is None or getattr(self.plan, degree) == 1 else self.fine.get_group(degree)

    @property
    def tensor(self) -> DeviceMesh | None:
        """Those that share every matrix with this process; None where it has them alone."""
        return None if self.dense is None or self.plan.tensor == 1 else self.dense["tensor"]

    @property
    def experts(self) -> DeviceMesh | None:
        """Those that share the experts out, with `tensor` as a second dimension; None where each has all experts."""
        if self.sparse is None or self.plan.expert == 1:
            return None
        return self.sparse["expert", "tensor"] if self.plan.tensor > 1 else self.sparse["expert"]

    @property
    def ring(self) -> Ring | None:
        """Those that share rows with this process; None where it has them whole."""
        group = self.group("context")
        return None if group is None else Ring(group, self.plan.context, self.place("context"))

    def sharding(self, experts: bool = False, always: bool = False) -> DeviceMesh | None:
        """The processes over which FSDP lays weights (of experts, or the others).

        None where each holds its own; with `always`, this one alone then, and None only where there is no group.
        """
        mesh = self.sparse if experts else self.dense
        if mesh is None:
            return None
        copies = mesh["replicate"].size()
        if copies > 1:
            return mesh["replicate", "shard"]
        return mesh["shard"] if self.plan.shard > 1 or always else None

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes; the same bits on each."""
        if self.fine is not None:
            dist.all_reduce(values)
        return values

    def most(self, value: float) -> float:
        """The largest of all processes' values."""
        told = torch.tensor([value], dtype=torch.float64)
        if self.fine is not None:
            dist.all_reduce(told, dist.ReduceOp.MAX)
        return float(told)

    def reader_of(self, rank: int) -> int:
        """Which part of a batch's rows a process reads."""
        places = {}
        for degree in reversed(DEGREES):
            rank, places[degree] = divmod(rank, getattr(self.plan, degree))
        return self._reader(places)

    def _reader(self, places: dict[str, int]) -> int:
        number = 0
        for degree in ROWS:
            number = number * getattr(self.plan, degree) + places[degree]
        return number

    def agree(self, error: DanluError | None) -> None:
        """Raise the error of the lowest rank that has one, on every process."""
        if self.fine is None:
            if error is not None:
                raise error
            return
        told: list[tuple[str, object, str | None] | None] = [None] * self.world
        dist.all_gather_object(told, None if error is None else (error.what, str(error.where or ""), error.fix))
        for one in told:
            if one is not None:
                raise DanluError(one[0], where=one[1] or None, fix=one[2])


def everyone(world: int, device: torch.device) -> Mesh:
    """The processes before they have a plan, which can only agree."""
    fine = init_device_mesh(device.type, (world,), mesh_dim_names=("data",)) if world > 1 else None
    return Mesh(Plan(data=world), device, fine)


def make_mesh(plan: Plan, device: torch.device | None = None) -> Mesh:
    """Arrange the processes of the default group as a plan asks.

    Neighbours in rank are those of the last degree in `DEGREES`: links between them should be the fastest.

    Raises DanluError where their number is not the plan's.
    """
    device = device or torch.device("cpu")
    if not dist.is_initialized():
        if plan.world > 1:
            raise DanluError(f"the plan takes {plan.world} processes, and this is one", where="plan")
        return Mesh(plan, device)
    if dist.get_world_size() != plan.world:
        raise DanluError(f"the plan takes {plan.world} processes, not {dist.get_world_size()}", where="plan")
    world = init_device_mesh(device.type, (plan.world,), mesh_dim_names=("world",))
    degrees = {name: getattr(plan, name) for name in DEGREES}
    copies = plan.data * plan.context
    return Mesh(
        plan,
        device,
        world._unflatten(0, tuple(degrees.values()), DEGREES),
        _arrange(world, pipeline=plan.pipeline, replicate=copies * plan.expert, shard=plan.shard, tensor=plan.tensor),
        _arrange(
            world, pipeline=plan.pipeline, replicate=copies, expert=plan.expert, shard=plan.shard, tensor=plan.tensor
        ),
    )


def _arrange(world: DeviceMesh, **sizes: int) -> DeviceMesh:
    return world._unflatten(0, tuple(sizes.values()), tuple(sizes))
