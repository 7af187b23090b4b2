"""Matrices of few bits in safetensors files, as compressed-tensors, and so transformers and vLLM, store them.

A matrix X.weight lies there as whole numbers, packed bit to bit into X.weight_packed or one a byte in X.weight, or as
floats of 8 bits in X.weight, and X.weight_scale, the step of every run of columns. Reading gives their products.
Source: compressed-tensors' formats pack-quantized, int-quantized and float-quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from danlu.console import warn
from danlu.errors import DanluError

METHOD = "compressed-tensors"
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
PACKED, SCALE, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
WORD = 32  # bits
PIECE = 2**22  # numbers packed or unpacked at once: each takes a byte a bit on the way


def plain_config(hf: dict[str, Any], where: Path) -> dict[str, Any]:
    """A config.json without what it says about few bits: as of the model whose weights are read as products.

    Warns where inputs of layers are to be rounded too, which is not done here. Raises DanluError where weights are
    stored in another way than those that are read.
    """
    said = hf.get("quantization_config")
    if said is None:
        return hf
    known = isinstance(said, dict) and said.get("quant_method") == METHOD and said.get("format") in FORMATS
    others = [key for key in ("sparsity_config", "transform_config", "kv_cache_scheme") if known and said.get(key)]
    if not known or others:
        told = f"with {', '.join(others)}" if others else _words(said)
        what = f"quantization_config is {told}: such weights are not read here"
        raise DanluError(what, where=where, fix=f"{METHOD} is read: {', '.join(FORMATS)}; or use the original model")
    groups = said.get("config_groups") or {}
    if any(isinstance(group, dict) and group.get("input_activations") for group in groups.values()):
        warn(f"{where}: asks for inputs of few bits too; here only the weights have them, and inputs are exact")
    return {key: value for key, value in hf.items() if key != "quantization_config"}


def _words(said: object) -> str:
    if not isinstance(said, Mapping):
        return repr(said)
    return f"of the method {said.get('quant_method')}, format {said.get('format')}"


def pack(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers bit to bit, the first in the lowest bits: int32 [rows, ceil(columns * bits / 32)].

    Args: codes: uint8 [rows, columns], below 2 ** bits.
    """
    words = -(-codes.shape[1] * bits // WORD)
    made = np.zeros((len(codes), words * WORD // 8), np.uint8)
    step = max(PIECE // codes.shape[1], 1)
    for first in range(0, len(codes), step):
        part = codes[first : first + step].numpy()
        lines = np.unpackbits(part[..., None], axis=2, count=bits, bitorder="little").reshape(len(part), -1)
        packed = np.packbits(lines, axis=1, bitorder="little")
        made[first : first + step, : packed.shape[1]] = packed
    return torch.from_numpy(made.view("<i4").astype(np.int32))


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """The way back: uint8 [rows, columns]."""
    made = np.empty((len(words), columns), np.uint8)
    step = max(PIECE // columns, 1)
    for first in range(0, len(words), step):
        stored = words[first : first + step].numpy()
        lines = np.unpackbits(stored.astype("<i4").view(np.uint8), axis=1, count=columns * bits, bitorder="little")
        numbers = np.packbits(lines.reshape(len(stored), columns, bits), axis=2, bitorder="little")
        made[first : first + step] = numbers[..., 0]
    return torch.from_numpy(made)


def products(codes: Tensor, steps: Tensor, columns: int) -> Tensor:
    """What is stored, fp32 [rows, columns].

    Args:
        codes: int32 words as of `pack`, or int8 or float8 [rows, columns].
        steps: [rows, groups], [rows, 1] for whole rows, or [1] for the whole matrix.

    Raises ValueError where the shapes do not go together.
    """
    if codes.dtype == torch.int32:
        bits = codes.shape[1] * WORD // columns
        numbers = unpack(codes, bits, columns).float() - 2 ** (bits - 1)
    else:
        numbers = codes.float()
    scale = steps.float().view(-1, 1) if steps.dim() < 2 else steps.float()
    if columns % scale.shape[1] or len(scale) not in (1, len(codes)):
        raise ValueError(f"steps of shape {list(steps.shape)} do not divide {len(codes)} x {columns} numbers")
    return (numbers.view(len(codes), scale.shape[1], -1) * scale[..., None]).view(len(codes), columns)
