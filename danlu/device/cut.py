"""Parts of a GGUF file as files of their own: some layers, and of each tensor its first rows and columns.

Stored blocks are copied as they are: nothing is dequantised, so a part's numbers are the whole's to the bit. It needs
neither PyTorch nor what made the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from pydantic import Field

from danlu.errors import DanluError
from danlu.gguf_header import Header, TensorPlace, gguf_writer, read_header
from danlu.settings import Settings

BLOCK = re.compile(r"blk\.(\d+)\.")
ANY_BLOCK = "blk.{i}."  # how tables name the tensors of all layers


class Cut(Settings):
    """What a part of a file is."""

    layers: tuple[int, ...] = Field(min_length=1, description="those that stay, by their numbers in the whole")
    shapes: dict[str, tuple[int, ...]] = Field(
        description="first rows and columns of tensors, blk.{i}. for those of every layer; others stay whole"
    )
    metadata: dict[str, bool | int | float | str | list[Any]] = Field(description="keys that say otherwise there")
    absent: tuple[str, ...] = Field((), description="keys of the whole that the part has not")


def write_cut(whole: Path, cut: Cut, out: Path) -> None:
    """Write a part of a GGUF file, aside and renamed.

    Raises DanluError where the file lacks a layer or tensor, or a shape reaches beyond a tensor or cuts through a block
    of numbers that share a step.
    """
    header = read_header(whole)
    pieces = list(_pieces(header, cut))
    keys = {key: value for key, value in (header.metadata | cut.metadata).items() if key not in cut.absent}
    data = np.memmap(whole, np.uint8, "r")
    with gguf_writer(out, keys) as writer:
        for name, tensor, taken in pieces:
            kind = gguf.GGMLQuantizationType(tensor.type)
            writer.add_tensor_info(name, taken, np.dtype(np.uint8), math.prod(taken), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor, taken in pieces:
            stored = _stored_shape(tensor.shape, tensor, whole)
            rows = data[tensor.offset : tensor.offset + math.prod(stored)].reshape(stored)
            writer.write_tensor_data(np.ascontiguousarray(rows[tuple(slice(size) for size in taken)]))


def _pieces(header: Header, cut: Cut) -> Iterator[tuple[str, TensorPlace, tuple[int, ...]]]:
    """Name in the part, tensor in the whole, and what is taken of it: outer dimensions, and bytes of a row."""
    places = {layer: number for number, layer in enumerate(cut.layers)}
    found: set[str] = set()
    for tensor in header.tensors:
        block = BLOCK.match(tensor.name)
        name, kind = tensor.name, tensor.name
        if block is not None:
            layer, rest = int(block[1]), tensor.name[block.end() :]
            if layer not in places:
                continue
            name, kind = f"blk.{places[layer]}.{rest}", ANY_BLOCK + rest
            found.add(f"layer {layer}")
        found.add(kind)
        yield name, tensor, _taken(tensor, cut.shapes.get(kind, tensor.shape), header.path)
    wanted = [*cut.shapes, *(f"layer {layer}" for layer in cut.layers)]
    missing = next((each for each in wanted if each not in found), None)
    if missing is not None:
        raise DanluError(f"has no {missing}, of which a part is asked", where=header.path, fix="make it again")


def _taken(tensor: TensorPlace, shape: tuple[int, ...], where: Path) -> tuple[int, ...]:
    """The first so many rows and columns of a tensor, in stored bytes."""
    inside = len(shape) == len(tensor.shape) and all(
        0 < part <= size for part, size in zip(shape, tensor.shape, strict=True)
    )
    if not inside:
        what = f"{tensor.name} of shape {list(tensor.shape)} has no first part of shape {list(shape)}"
        raise DanluError(what, where=where, fix="make the file and its table again")
    return _stored_shape(shape, tensor, where)


def _stored_shape(shape: tuple[int, ...], tensor: TensorPlace, where: Path) -> tuple[int, ...]:
    """A shape whose last dimension is in bytes of the tensor's number format."""
    kind = gguf.GGMLQuantizationType(tensor.type)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        what = f"{tensor.name} cannot be cut after {shape[-1]:,} columns: {kind.name} has blocks of {block}"
        raise DanluError(what, where=where, fix=f"take a multiple of {block}")
    return (*shape[:-1], shape[-1] // block * size)
