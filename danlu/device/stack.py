"""Models made only to be timed: all matrices of one number format and one shape, in a file that llama.cpp runs.

They hold no trained weights and no words, so that a device needs neither a model nor PyTorch to be measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

ARCHITECTURE = "llama"
HEAD = 64  # features of an attention head
CONTEXT = 4096
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
# Whichever two of these bytes a format reads as fp16 make a number between 2^-7 and 2^-4: nothing overflows, and
# nothing is so small that a processor takes longer over it.
BYTES = range(0x20, 0x30)


@dataclass(frozen=True)
class Stack:
    """Layers of seven square matrices.

    Attributes:
        type: their number format, as GGML calls it in lower case.
        width: rows and columns of each, a multiple of 64.
        layers: how many.
        words: rows of the embedding, which is the head too.
    """

    type: str
    width: int
    layers: int
    words: int = 256

    @property
    def weights(self) -> int:
        """Numbers in the matrices of the layers."""
        return len(MATRICES) * self.width**2 * self.layers


def layers_for(type: str, width: int, size: float) -> int:
    """How many layers take about `size` bytes, at least 1."""
    return max(1, round(size / (len(MATRICES) * width**2 * bytes_per_weight(type))))


def bytes_per_weight(type: str) -> float:
    """Of a number format."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type.upper()]]
    return size / block


def fills(type: str, columns: int) -> bool:
    """Whether rows of so many numbers fill blocks of the format."""
    return columns % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type.upper()]][0] == 0


def write_stack(stack: Stack, out: Path) -> None:
    """Write it; one matrix is made and put in every place, so that memory does not grow with the layers."""
    writer = gguf.GGUFWriter(out, ARCHITECTURE)
    writer.add_block_count(stack.layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(stack.width)
    writer.add_feed_forward_length(stack.width)
    writer.add_head_count(stack.width // HEAD)
    writer.add_head_count_kv(stack.width // HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD)
    writer.add_vocab_size(stack.words)
    writer.add_tokenizer_model("no_vocab")
    kind = gguf.GGMLQuantizationType[stack.type.upper()]
    ones = np.ones(stack.width, np.float32)
    matrix = _bytes(stack.width, stack.type, stack.width)
    writer.add_tensor("token_embd.weight", _bytes(stack.words, stack.type, stack.width), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", ones)
    for layer in range(stack.layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", ones)
        for name in MATRICES:
            writer.add_tensor(f"blk.{layer}.{name}.weight", matrix, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _bytes(rows: int, type: str, columns: int) -> NDArray[np.uint8]:
    """A matrix of any numbers that the format can hold, uint8 [rows, bytes of a row]."""
    size = round(columns * bytes_per_weight(type))
    return np.random.default_rng(0).integers(BYTES.start, BYTES.stop, (rows, size), np.uint8)
