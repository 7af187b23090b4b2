"""Which rows are a worker's: its processes, counted among those of all workers."""

from __future__ import annotations

from dataclasses import dataclass

from danlu.train.exchange.settings import ApartSettings
from danlu.train.mesh import Mesh


@dataclass(frozen=True)
class WiderMesh(Mesh):
    """A run's processes as a stream of rows is to see them: with more copies besides, which are other runs.

    Attributes:
        before: readers in the copies before this run's.
    """

    before: int = 0

    @property
    def reader(self) -> int:
        """Which part of a batch's rows this process reads, of `plan.readers`."""
        return self.before + super().reader


def share_rows(mesh: Mesh, apart: ApartSettings) -> Mesh:
    """A worker's processes among as many copies of its plan as there are workers, each with its own rows.

    Every worker has the same share, so workers with other plans fit beside it.
    """
    plan = mesh.plan.model_copy(update={"data": mesh.plan.data * apart.workers})
    before = apart.worker * mesh.plan.readers
    return WiderMesh(plan, mesh.device, mesh.fine, mesh.dense, mesh.sparse, before=before)
