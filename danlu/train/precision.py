"""Which precision to compute in, decided by measuring this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

Choice = Literal["auto", "bf16", "fp16", "float8", "fp32"]
WORTH = 1.2  # bf16 must be this much faster than fp32 to be worth its rounding
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float8": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Precision:
    """What a run computes in, decided when it begins.

    Attributes:
        dtype: of activations and of the weights that they meet.
        why: in words.
        float8: products of linear layers are in float8, and all else in `dtype`.
    """

    dtype: torch.dtype
    why: str
    float8: bool = False

    @classmethod
    def choose(cls, asked: Choice, device: str = "cpu") -> Precision:
        """See `choose_precision`."""
        return cls(*choose_precision(asked, device), float8=asked == "float8")

    @classmethod
    def read(cls, saved: dict[str, Any]) -> Precision:
        """What `plain` wrote. Earlier notes say no more than whether it was bf16."""
        name = saved.get("dtype") or ("bfloat16" if saved["bf16"] else "float32")
        dtypes = {_name(dtype): dtype for dtype in DTYPES.values()}
        return cls(dtypes[name], saved["precision"], saved.get("float8", False))

    @property
    def name(self) -> str:
        """As recipes call it."""
        return "float8" if self.float8 else next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    def plain(self) -> dict[str, Any]:
        return {"dtype": _name(self.dtype), "float8": self.float8, "precision": self.why}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def gemm_rate(dtype: torch.dtype, seconds: float = 0.3, device: str = "cpu") -> float:
    """The best rate of a matrix product in GFLOP/s, tried again for about `seconds`.

    Its sides are 2048; 8192 on an accelerator, which would spend its time on starting; and 256 in fp16 on a CPU, where
    most have no units for it and take a minute for the larger one.
    """
    size = 8192 if device != "cpu" else 256 if dtype == torch.float16 else 2048
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
        asked: a name in `DTYPES`, or "auto": bf16 where its matrix products measure clearly faster than fp32's.
    """
    if asked != "auto":
        return DTYPES[asked], f"{asked}, as asked"
    low, full = gemm_rate(torch.bfloat16, device=device), gemm_rate(torch.float32, device=device)
    measured = f"matrix products measure {low:,.0f} GFLOP/s in bf16 and {full:,.0f} in fp32"
    if low >= WORTH * full:
        return torch.bfloat16, f"bf16: {measured}"
    return torch.float32, f"fp32: {measured}"
