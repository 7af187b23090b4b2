"""Codes and scales as the bytes of GGML's blocks. Layouts: ggml-common.h of ggml, as the gguf package reads them."""

from __future__ import annotations

import torch
from torch import Tensor


def interleave(codes: Tensor, bits: int, run: int) -> Tensor:
    """Bytes that hold codes of `bits` bits each: of every 8 / bits runs of `run` columns, the first in the lowest bits.

    Args: codes: uint8 [rows, n]. Returns: uint8 [rows, n * bits / 8].
    """
    share = 8 // bits
    shaped = codes.view(len(codes), -1, share, run).int()
    shift = torch.arange(share, device=codes.device)[None, None, :, None] * bits
    return (shaped << shift).sum(2).to(torch.uint8).view(len(codes), -1)


def halves(x: Tensor) -> Tensor:
    """fp32 [rows] or [rows, n], which fp16 holds, as bytes [rows, 2 n]."""
    return x.half().view(len(x), -1).contiguous().view(torch.uint8)


def six_bits(steps: Tensor, lows: Tensor) -> Tensor:
    """Two times 8 numbers of 6 bits as 12 bytes: those of Q4_K and Q5_K.

    The first four of both lie in the low bits of bytes 0-3 and 4-7, whose two top bits are those of the last four; the
    rest of those share bytes 8-11. Args: uint8 [rows, 8] each.
    """
    first = steps[:, :4] | (steps[:, 4:] >> 4 << 6)
    second = lows[:, :4] | (lows[:, 4:] >> 4 << 6)
    return torch.cat([first, second, (steps[:, 4:] & 15) | (lows[:, 4:] & 15) << 4], dim=1)


def sixteen_of_six_bits(scales: Tensor) -> Tensor:
    """16 numbers of 6 bits as 12 bytes: those of Q3_K. Low halves of 8 and 8 share bytes 0-7, the rest bytes 8-11."""
    low, high = scales & 15, scales >> 4
    return torch.cat([low[:, :8] | low[:, 8:] << 4, interleave(high, 2, 4)], dim=1)
