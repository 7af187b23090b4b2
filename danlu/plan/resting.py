"""Where plans of a search may rest what is not computed with, and whether there is room for it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from danlu.errors import DanluError
from danlu.plan.calibrate import Calibration
from danlu.plan.cluster import Accelerator, Cluster, Host
from danlu.plan.jobs import Column, Jobs
from danlu.plan.memory import GIB, MEMORY, away_memory
from danlu.plan.offload import DISK, HOST, Offload, Places, places

UNKNOWN_DISK = 3e9  # bytes/s: an NVMe drive's, where nothing is known of a machine's disks
AWAY = {HOST: "host", DISK: "disks"}
SPARE = 0.8  # of a host's memory and disks; the rest is for the system, the data and checkpoints


def put_away(offload: Offload | Places, cluster: Cluster, columns: dict[str, Column]) -> dict[str, Column]:
    """The same plans, and again with parts that rest elsewhere, where weights come layer by layer or updates may.

    Args: columns: of legal plans, all of one length.

    Raises DanluError where nothing is known of the machine that they are to rest in.
    """
    if isinstance(offload, Places):
        return columns | {name: np.full(1, float(value)) for name, value in offload.columns.items()}
    device, host = cluster.accelerator, cluster.share.host
    has_host, has_disk = host is not None and host.memory > 0, host is not None and host.disk > 0
    if {"host": not has_host, "nvme": not has_disk}.get(offload, False):
        what = f"how much memory or disk the host of {device.name} has is not known"
        raise DanluError(what, where="--offload", fix="tell its `host` in danlu/plan/hardware.yaml, or leave it out")
    tried = places(offload, has_host, has_disk)
    count = len(columns["zero"])
    may = np.flatnonzero((columns["zero"] == 3) | (cluster.count == 1) | device.processor)
    rows = np.r_[np.arange(count), np.repeat(may, len(tried) - 1)]
    which = np.r_[np.zeros(count, np.intp), np.tile(np.arange(1, len(tried)), len(may))]
    at = {name: np.array([each.columns[name] for each in tried], np.float64)[which] for name in tried[0].columns}
    return {name: column[rows] for name, column in columns.items()} | at


def rates(device: Accelerator) -> dict[str, float]:
    """Columns of `Jobs` that say how fast things come from where they rest; a processor computes where they do."""
    host = device.host
    if host is None:
        return {"link_rate": device.memory_rate, "host_rate": device.memory_rate, "disk_rate": UNKNOWN_DISK}
    return {"link_rate": host.link, "host_rate": host.rate, "disk_rate": host.disk_rate}


def farthest(cluster: Cluster) -> Offload:
    """The farthest place that is known of."""
    host = cluster.share.host
    if host is None:
        return "none"
    return "nvme" if host.disk else "host"


def has_room(offload: Offload | Places, cluster: Cluster, jobs: Jobs, scale: Calibration) -> NDArray[np.bool_]:
    """Whether the host's memory and disks have room for what rests there."""
    host = cluster.share.host
    if offload == "none" or host is None:
        return np.ones(len(jobs), np.bool_)
    held = away_memory(jobs, coefficients_of(scale))
    return (held[HOST] <= host.memory * SPARE) & (held[DISK] <= host.disk * SPARE)


def no_room(host: Host) -> str:
    """Why nothing can rest there, in words."""
    memory, disk = host.memory / GIB, host.disk / GIB
    return f"more would rest than {SPARE:.0%} of {memory:,.0f} GiB of memory and {disk:,.0f} GiB of disks of a host"


def gib_away(one: Jobs, scale: Calibration) -> dict[str, float]:
    """GiB that one job has in the host's memory and on its disks, where it has any."""
    held = {AWAY[place]: float(part[0]) / GIB for place, part in away_memory(one, coefficients_of(scale)).items()}
    return {name: gib for name, gib in held.items() if gib}


def coefficients_of(scale: Calibration) -> dict[str, float]:
    """Of an accelerator's memory, for what leaves it: those believed where others were learned."""
    return {name: scale.coefficients.get(name, each.start) for name, each in MEMORY.items()}
