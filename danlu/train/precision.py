"""Which precision to compute in, decided by measuring this machine."""

from __future__ import annotations

import time
from functools import cache

import torch

WORTH = 1.2  # bf16 must be this much faster than fp32 to be worth its rounding


@cache
def gemm_rate(dtype: torch.dtype, seconds: float = 0.3, device: str = "cpu") -> float:
    """The best rate of a 2048 x 2048 x 2048 matrix product in GFLOP/s, tried again for about `seconds`."""
    size = 2048
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype, device=device)
    best, until = float("inf"), time.perf_counter() + seconds
    for attempt in range(1000):
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        if device != "cpu":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
        if attempt >= 2 and time.perf_counter() > until:
            break
    return 2 * size**3 / best / 1e9


def choose_precision(asked: str, device: str = "cpu") -> tuple[torch.dtype, str]:
    """The dtype to compute in, and why, in words.

    Args:
        asked: "bf16", "fp32", or "auto": bf16 where its matrix products measure clearly faster than fp32's.
    """
    if asked != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[asked], f"{asked}, as asked"
    low, full = gemm_rate(torch.bfloat16, device=device), gemm_rate(torch.float32, device=device)
    measured = f"matrix products measure {low:,.0f} GFLOP/s in bf16 and {full:,.0f} in fp32"
    if low >= WORTH * full:
        return torch.bfloat16, f"bf16: {measured}"
    return torch.float32, f"fp32: {measured}"
