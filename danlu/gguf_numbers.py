"""Numbers out of GGML's formats: as the gguf package reads them, and binary Q1_0, which it does not read yet.

Layout of Q1_0: ggml-common.h of ggml. A block is an fp16 step and 128 signs, the first in the lowest bit of the first
byte; a bit that is set stands for the step, one that is not for its negative.
"""

from __future__ import annotations

import gguf
import numpy as np
from numpy.typing import NDArray

BINARY = gguf.GGMLQuantizationType.Q1_0
SIGNS = 16  # bytes of a block


def dequantize(packed: NDArray[np.uint8], kind: gguf.GGMLQuantizationType) -> NDArray[np.float32]:
    """fp32 [..., columns] of uint8 [..., bytes of a row].

    Raises NotImplementedError where the package does not know the format.
    """
    if kind != BINARY:
        return gguf.dequantize(packed, kind)
    blocks = np.ascontiguousarray(packed).reshape(*packed.shape[:-1], -1, 2 + SIGNS)
    step = blocks[..., :2].view(np.float16).astype(np.float32)
    signs = np.unpackbits(blocks[..., 2:], axis=-1, bitorder="little").astype(np.float32)
    return (step * (2 * signs - 1)).reshape(*packed.shape[:-1], -1)
