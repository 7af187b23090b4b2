"""What putting state and activations away takes of a step: the slowest of the link to the host, the host's update and
the disks, where computing does not hide it (arXiv:2101.06840, arXiv:2104.07857)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from danlu.plan.jobs import Column, Jobs
from danlu.plan.offload import DISK, HOST

# Shares of their data sheets that are reached: a link with pinned memory; an update by all processes of a host at once,
# 0.22 in the longest measured series and about 0.5 in the paper's, of one process; a drive that reads and writes.
LINK, UPDATE, DRIVE = 0.8, 0.3, 0.8
# Bytes a weight that an update reads and writes: the gradient, the weight's copy, and twice masters and moments.
GRADIENT_AND_COPY = 10.0


@dataclass(frozen=True)
class Held:
    """Bytes that a process has a share of, as they travel.

    Attributes:
        weights: of all layers, as they are computed with.
        gradients: of what learns.
        learning: weights that learn, a count.
        activations: kept of one micro-batch.
    """

    weights: Column
    gradients: Column
    learning: Column
    activations: Column


def transfer_time(jobs: Jobs, held: Held, computing: Column) -> Column:
    """Seconds of a step that are neither computing nor hidden behind it.

    Weights and gradients travel beside computing; activations do not: `danlu train` copies them between two kernels.

    Args: computing: seconds of a micro-batch.
    """
    travels = np.maximum(_linked(jobs, held) / (jobs.link_rate * LINK), _filed(jobs, held) / (jobs.disk_rate * DRIVE))
    each = np.maximum(travels - computing, 0) + _activations_time(jobs, held)
    return jobs.micro_batches * each + update_time(jobs, held)


def _linked(jobs: Jobs, held: Held) -> Column:
    """Bytes of weights and gradients that pass the link in a micro-batch.

    Weights come over forward and again backward, while gradients leave: both ways do not disturb each other.
    """
    once = np.where(jobs.weights_at > 0, held.weights, 0)
    return once + np.maximum(once, np.where(jobs.gradients_at > 0, held.gradients, 0))


def _filed(jobs: Jobs, held: Held) -> Column:
    """Bytes of weights and gradients that disks read and write in a micro-batch; later ones add to the first's."""
    weights = np.where(jobs.weights_at == DISK, 2 * held.weights, 0)
    return weights + np.where(jobs.gradients_at == DISK, held.gradients * (2 - 1 / jobs.micro_batches), 0)


def _activations_time(jobs: Jobs, held: Held) -> Column:
    """Seconds in which activations of a micro-batch leave, and come back."""
    linked = np.where(jobs.activations_at > 0, 2 * held.activations / (jobs.link_rate * LINK), 0)
    filed = np.where(jobs.activations_at == DISK, 2 * held.activations / (jobs.disk_rate * DRIVE), 0)
    return np.maximum(linked, filed)


def update_time(jobs: Jobs, held: Held) -> Column:
    """Seconds of an update that the host makes: it reads and writes what it updates, files are read ahead of it, and
    weights that rest on the device are sent there. Zero where the device makes it.

    Of files an update reads gradients twice and writes them once: for their norm, and to clip them.
    """
    host = held.learning * (2 * jobs.state_bytes + GRADIENT_AND_COPY) / (jobs.host_rate * UPDATE)
    filed = np.where(jobs.optimizer_at == DISK, 2 * held.learning * jobs.state_bytes, 0)
    filed = filed + np.where(jobs.gradients_at == DISK, 3 * held.gradients, 0)
    filed = filed + np.where(jobs.weights_at == DISK, held.learning * jobs.weight_bytes, 0)
    sent = np.where(jobs.weights_at == 0, held.learning * jobs.weight_bytes / (jobs.link_rate * LINK), 0)
    slowest = np.maximum(np.maximum(host, filed / (jobs.disk_rate * DRIVE)), sent)
    return np.where(jobs.optimizer_at >= HOST, slowest, 0)
