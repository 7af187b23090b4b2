"""How many cores this process may really use: affinity, hyper-threads and container quotas considered."""

from __future__ import annotations

import os
from pathlib import Path

TOPOLOGY = Path("/sys/devices/system/cpu")
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Physical cores this process may run on, at least 1.

    Two hyper-threads of one core count once: arithmetic kernels gain nothing from the second, and llama.cpp's
    barriers make it a loss. A container's CPU quota (cgroup v2) caps the number.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    physical = len({_core(cpu) for cpu in allowed})
    quota = _quota()
    return max(1, physical if quota is None else min(physical, int(quota)))


def _core(cpu: int) -> tuple[str, str]:
    """The (package, core) a logical processor belongs to; itself where the system does not say."""
    try:
        place = TOPOLOGY / f"cpu{cpu}" / "topology"
        return (place / "physical_package_id").read_text().strip(), (place / "core_id").read_text().strip()
    except OSError:
        return "cpu", str(cpu)


def _quota() -> float | None:
    """Cores' worth of time the container may use, or None where there is no limit."""
    try:
        allowed, period = QUOTA.read_text().split()
        return None if allowed == "max" else int(allowed) / int(period)
    except (OSError, ValueError):
        return None
