"""What rows of tables tell of adapters, and of what rests outside of the device."""

from __future__ import annotations

import re

from danlu.plan.adapters import Lora
from danlu.plan.cluster import Accelerator
from danlu.plan.offload import HOST

RANK = 16  # where a row tells of adapters without one; a step's time hardly depends on it


def adapter_columns(words: str) -> dict[str, float]:
    """Columns of `Jobs` from what is written about a run; none where all its weights learn.

    NVIDIA's performance recipes put adapters beside queries, keys and values alone; rows that name a rank are taken to
    have them beside all linear layers.
    """
    if not re.search(r"\b(q?lora|peft)\b", words, re.IGNORECASE):
        return {}
    rank = re.search(r"\b(?:rank|r)\s*=?\s*(\d+)", words)
    quantised = re.search(r"\b(qlora|nf4|4[- ]?bit)\b", words, re.IGNORECASE)
    bits = 4 if quantised else 16
    return (Lora(int(rank.group(1)), "all", bits) if rank else Lora(RANK, "attention", bits)).columns


def offload_columns(told: str, device: Accelerator) -> dict[str, float] | None:
    """Columns of `Jobs` from a table's column `offload`, or None where the device's host is not known.

    Software that keeps the optimizer's state on the host sends it the gradients, too (arXiv:2101.06840).
    """
    if "cpu" not in told:
        return {}
    if device.host is None:
        return None
    optimizer = HOST if "optimizer-cpu" in told else 0
    return {
        "optimizer_at": optimizer, "gradients_at": optimizer, "weights_at": HOST if "param-cpu" in told else 0,
        "link_rate": device.host.link, "host_rate": device.host.rate, "disk_rate": device.host.disk_rate,
    }  # fmt: skip
