"""What rests outside of the device, as `danlu train` puts it there (`offload.state`, `offload.activations`): how much,
and where.

A part that is put away leaves the device, but for what is under way of it: these buffers are a part of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from danlu.plan.jobs import Column, Jobs

Offload = Literal["auto", "none", "host", "nvme"]
OFFLOADS: tuple[Offload, ...] = get_args(Offload)
DEVICE, HOST, DISK = 0, 1, 2
RESTING = ("weights", "gradients", "optimizer", "activations")  # parts that can rest elsewhere
UNDER_WAY = 2.0  # layers: one is computed with while another travels


@dataclass(frozen=True)
class Places:
    """Where things rest, and what `danlu train` calls that.

    Attributes:
        state, activations: as in the recipe's section `offload`.
        weights_at, gradients_at, optimizer_at, activations_at: as in Jobs.
    """

    state: str = "none"
    activations: str = "none"
    weights_at: int = DEVICE
    gradients_at: int = DEVICE
    optimizer_at: int = DEVICE
    activations_at: int = DEVICE

    @property
    def columns(self) -> dict[str, float]:
        """The columns of `Jobs` that say so."""
        return {f"{part}_at": getattr(self, f"{part}_at") for part in RESTING}

    @property
    def words(self) -> dict[str, str]:
        """What differs from a recipe's defaults, by setting."""
        told = {"offload.state": self.state, "offload.activations": self.activations}
        return {name: value for name, value in told.items() if value != "none"}


# What can be asked of an accelerator, whose weights then rest in its host's memory or on its disks, and come over layer
# by layer; and of a CPU, which has no memory besides its own.
STATES = (("none", 0, 0, 0), ("host", 1, 1, 1), ("optimizer", 1, 2, 2), ("parameters", 2, 2, 2))
CPU_STATES = (("none", 0, 0, 0), ("optimizer", 0, 2, 2), ("parameters", 2, 2, 2))
ACTIVATIONS = (("none", DEVICE), ("host", HOST), ("files", DISK))


def places(asked: Offload, has_host: bool, has_disk: bool) -> list[Places]:
    """All that may be tried; resting on the device comes first.

    Args: has_host: there is memory besides the device's own; has_disk: there are disks.
    """
    most = {"none": DEVICE, "auto": DISK, "host": HOST, "nvme": DISK}[asked]

    def allowed(place: int) -> bool:
        return place <= most and (place != HOST or has_host) and (place != DISK or has_disk)

    tried = [
        Places(state, activations, weights, gradients, optimizer, kept)
        for state, weights, gradients, optimizer in (STATES if has_host else CPU_STATES)
        for activations, kept in ACTIVATIONS
    ]
    return [each for each in tried if all(allowed(int(place)) for place in each.columns.values())]


def words_of(one: Jobs) -> dict[str, str]:
    """What `danlu train` is told to put away so that things rest as one job says."""
    at = tuple(int(getattr(one, f"{part}_at")[0]) for part in RESTING)
    state = next((name for name, *where in (*STATES, *CPU_STATES) if tuple(where) == at[:3]), "none")
    return Places(state, dict((place, name) for name, place in ACTIVATIONS)[at[3]]).words


def on_device(jobs: Jobs, parts: dict[str, Column], stays: dict[str, Column]) -> dict[str, Column]:
    """Bytes by part on a device of which some rest elsewhere; `buffers` is what is under way of those.

    Args:
        parts: what a process holds in all.
        stays: of gradients and activations, what is on the device all the same where they rest elsewhere.
    """
    here = {
        name: np.where(_place(jobs, name) > 0, 0, part) if name in RESTING else part for name, part in parts.items()
    }
    here["step"] = np.where(jobs.optimizer_at > 0, 0, parts["step"])
    under_way = [np.where(_place(jobs, name) > 0, part, 0) for name, part in stays.items()]
    return here | {"buffers": sum(under_way, np.zeros(1))}


def away(jobs: Jobs, parts: dict[str, Column]) -> dict[int, Column]:
    """Bytes that a process holds in its host's memory, and on its host's disks."""
    return {
        place: sum((np.where(_place(jobs, name) == place, parts[name], 0) for name in RESTING), np.zeros(1))
        for place in (HOST, DISK)
    }


def _place(jobs: Jobs, part: str) -> Column:
    found: Column = getattr(jobs, f"{part}_at")
    return found
