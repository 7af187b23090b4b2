"""GGUF files: weights in, dequantised a piece at a time, and out, for llama.cpp.

Format: GGUF specification version 3; number formats as in the gguf package.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from torch import Tensor

from danlu.console import warn
from danlu.errors import DanluError
from danlu.gguf_header import DEFAULT_ALIGNMENT, Header, TensorPlace, gguf_writer
from danlu.gguf_numbers import dequantize
from danlu.model.config import ModelConfig
from danlu.model.families.family import Family
from danlu.model.families.known import FAMILIES, family_for
from danlu.model.families.metadata import read_metadata, rope_factors, write_metadata
from danlu.model.names import Place
from danlu.model.stored import Stored, Weights
from danlu.model.transformer import Decoder
from danlu.tokenizer import Tokenizer

Type = Literal["f32", "f16", "bf16"]


@dataclass(frozen=True)
class Packed:
    """A matrix in one of GGML's number formats.

    Attributes:
        kind: the format.
        data: uint8 [..., rows, bytes of a row].
    """

    kind: gguf.GGMLQuantizationType
    data: Tensor


TYPES: dict[Type, tuple[torch.dtype, gguf.GGMLQuantizationType, gguf.LlamaFileType]] = {
    "f32": (torch.float32, gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (torch.float16, gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (torch.bfloat16, gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
ROPE_FACTORS = "rope_freqs.weight"
# Matrices that llama.cpp's own converter writes in fp32 whatever the rest: routers, learned positions.
EXACT = ("ffn_gate_inp.weight", "position_embd.weight")
# A matrix of one row, which files hold as a vector.
SINGLE_ROW = "ffn_gate_inp_shexp.weight"
PIECE = 2**20  # numbers dequantised at once; several fp32 copies of them are alive meanwhile


def read_config(header: Header) -> tuple[Family, ModelConfig]:
    """The family and configuration of the model in a file.

    Raises DanluError where Danlu does not compute it, or data is cut off.
    """
    if (header.find("split.count", int) or 1) > 1:
        raise DanluError("is one part of several", where=header.path, fix="join them: llama-gguf-split --merge")
    _check_whole(header)
    factors = next((tensor for tensor in header.tensors if tensor.name == ROPE_FACTORS), None)
    config = read_metadata(header, None if factors is None else _read(header.path, factors, torch.float32).tolist())
    return _family(config, header), config


def _family(config: ModelConfig, header: Header) -> Family:
    """The family of a file; its own architecture decides in which order queries and keys lie."""
    arch = header.need("general.architecture", str)
    for family in FAMILIES:
        if family.gguf == arch and family.expresses(config):
            return family
    what = f"names the architecture {arch}, but holds tensors or keys of another one"
    raise DanluError(what, where=header.path, fix="convert the model to GGUF again")


def stored_weights(header: Header, family: Family, config: ModelConfig) -> Weights:
    """The weights in a file; DanluError for a tensor that has no place in the model."""
    names = family.gguf_names
    weights = {}
    for tensor in header.tensors:
        if tensor.name == ROPE_FACTORS:
            continue  # part of the configuration
        found = names.ours(tensor.name)
        if not found:
            raise DanluError(f"the tensor {tensor.name} is not known", where=header.path)
        for ours in found:
            heads = _rotated_heads(ours.ours, config) if family.neighbours else None
            own = _part(tensor, ours.place, header.path)
            read = partial(_read_weight, header.path, own, ours.place.plus, heads)
            weights[ours.ours] = Stored(tensor.name, header.path, own.shape, read)
    return Weights(header.path, names, weights)


def _part(tensor: TensorPlace, place: Place, where: Path) -> TensorPlace:
    """Where our weight lies in a tensor; the tensor itself where it cannot be cut, which is then found wrong."""
    shape = place.shape(tensor.shape)
    if shape is None:
        return tensor
    if tensor.name.endswith(SINGLE_ROW) and len(shape) == 1:
        shape = (1, *shape)
    return replace(tensor, shape=shape, offset=tensor.offset + _size(tensor, where) // place.parts * place.part)


def _read_weight(path: Path, own: TensorPlace, plus: float, heads: int | None, dtype: torch.dtype) -> Tensor:
    """One weight of ours. `plus`: what was added to it; `heads`: the rows of so many go from neighbours to halves."""
    if plus:
        return (_read(path, own, torch.float32) - plus).to(dtype)
    made = _read(path, own, dtype)
    return made if heads is None else _to_halves(made, heads)


def write_gguf(model: Decoder, tokenizer: Tokenizer, out: Path, dtype: Type = "f32") -> None:
    """Write a model with its tokenizer and chat template as a file that llama.cpp loads.

    Args:
        model: any dtype; norms, biases, routers and learned positions are written in fp32, the rest as `dtype`.
        tokenizer: must have a form that GGUF knows.
        out: the file, written aside and renamed.
        dtype: "f32", "f16" or "bf16".

    Raises DanluError where llama.cpp would compute or tokenise otherwise, or a weight does not fit in `dtype`.
    """
    write_weights(model.config, model.state_dict(), tokenizer, out, dtype)


def write_weights(
    config: ModelConfig,
    weights: Mapping[str, Tensor | Packed],
    tokenizer: Tokenizer,
    out: Path,
    dtype: Type = "f32",
    file_type: gguf.LlamaFileType | None = None,
) -> None:
    """Write weights by their names in a model, of which some may be packed already. See `write_gguf`.

    Args:
        dtype: of matrices that are not packed.
        file_type: what the file says most of it is; by default `dtype`.
    """
    family = family_for(config)
    metadata = all_metadata(config, tokenizer, file_type or TYPES[dtype][2])
    arch = metadata["general.architecture"]
    context = metadata[f"{arch}.context_length"]
    if context < config.context:
        warn(f"llama.cpp has no sliding window for {arch}: the context is limited to {context:,}")
    with gguf_writer(out, metadata) as writer:
        tensors = _weights_out(config, weights, family)
        for tensor in tensors:
            stored = np.dtype(np.float32 if tensor.packed is None else np.uint8)
            kind = _kind(tensor, dtype)
            size = math.prod(tensor.shape) * kind.itemsize
            writer.add_tensor_info(tensor.name, tensor.shape, stored, size, tensor.packed or _ggml_type(kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(_bytes(tensor, _kind(tensor, dtype)))
            for part in tensor.parts:
                forget_pages(part)


def all_metadata(
    config: ModelConfig, tokenizer: Tokenizer, file_type: gguf.LlamaFileType = gguf.LlamaFileType.ALL_F32
) -> dict[str, Any]:
    """All keys of a file of a model.

    Raises DanluError where llama.cpp would compute or tokenise otherwise: worth asking before a model is changed.
    """
    words = {f"tokenizer.{key}": value for key, value in tokenizer.gguf_metadata(config.vocab_size).items()}
    return {**write_metadata(config), **_general(file_type), **words}


def keys_bytes(config: ModelConfig, tokenizer: Tokenizer) -> int:
    """What the keys of a file of a model take, of which the words are the most. For errors see `all_metadata`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys.gguf"
        with gguf_writer(file, all_metadata(config, tokenizer)) as writer:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
        return file.stat().st_size


def told_bytes(config: ModelConfig, weights: Mapping[str, Tensor | Packed], keys: int) -> int:
    """The size of the file that `write_weights` would write of weights, which may be without memory.

    Args: keys: what its keys take; see `keys_bytes`.

    Raises DanluError where GGUF has no name for a weight.
    """
    ends = keys
    tensors = _weights_out(config, weights, family_for(config))
    for tensor in tensors:
        ends += 8 + len(tensor.name) + 4 + 8 * len(tensor.shape) + 4 + 8  # a name, sizes, a type, an offset
    for tensor in tensors:
        size = math.prod(tensor.shape) * _kind(tensor, "f32").itemsize
        ends = -(-ends // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT + size
    return -(-ends // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def forget_pages(weight: Tensor) -> None:
    """Let go of the memory in which a tensor's file is mapped, where it lies in one: it is read again when needed."""
    storage = weight.untyped_storage()
    if storage.filename is not None and hasattr(mmap, "MADV_DONTNEED"):
        advise = ctypes.CDLL(None).madvise
        advise(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), mmap.MADV_DONTNEED)


def _general(file_type: gguf.LlamaFileType) -> dict[str, Any]:
    return {
        "general.type": "model",
        "general.file_type": int(file_type),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }


@dataclass(frozen=True)
class _Out:
    """A tensor to write: its parts are joined, and brought into GGUF's order, only when it is its turn.

    Attributes:
        packed: the number format of a matrix whose parts are bytes already; all that is done to rows holds for them.
    """

    name: str
    place: Place
    parts: list[Tensor]
    heads: int | None
    packed: gguf.GGMLQuantizationType | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        whole = (sum(len(part) for part in self.parts), *self.parts[0].shape[1:])
        return whole[1:] if self.name.endswith(SINGLE_ROW) else whole

    def make(self) -> Tensor:
        parts = [part if self.heads is None else _to_neighbours(part, self.heads) for part in self.parts]
        return self.place.put(parts)


def _weights_out(config: ModelConfig, weights: Mapping[str, Tensor | Packed], family: Family) -> list[_Out]:
    names = family.gguf_names
    heads = {names.theirs(name): _rotated_heads(name, config) if family.neighbours else None for name in weights}
    packed = {names.theirs(name): weight.kind for name, weight in weights.items() if isinstance(weight, Packed)}
    plain = {name: weight.data if isinstance(weight, Packed) else weight for name, weight in weights.items()}
    try:
        made = [_Out(name, place, parts, heads[name], packed.get(name)) for name, place, parts in names.outward(plain)]
    except KeyError as error:
        what = f"GGUF has no name for the weight {error.args[0]}"
        raise DanluError(what, fix="merge adapters before writing") from None
    factors = rope_factors(config)
    if factors is not None:
        made.append(_Out(ROPE_FACTORS, Place(ROPE_FACTORS, bare=True), [torch.tensor(factors)], None))
    return made


def _kind(tensor: _Out, dtype: Type) -> torch.dtype:
    if tensor.packed is not None:
        return torch.uint8
    # llama.cpp reads norms and biases in fp32.
    exact = len(tensor.shape) == 1 or tensor.name.endswith(EXACT)
    return torch.float32 if exact else TYPES[dtype][0]


def _ggml_type(kind: torch.dtype) -> gguf.GGMLQuantizationType:
    return next(theirs for ours, theirs, _ in TYPES.values() if ours == kind)


def _bytes(tensor: _Out, kind: torch.dtype) -> np.ndarray:
    """The weight as it is written; numpy has no bfloat16, so bits are handed over."""
    made = tensor.make().detach().to("cpu", kind).contiguous()
    if kind == torch.float16 and made.isinf().any():
        raise DanluError(f"{tensor.name} holds numbers that fp16 cannot (beyond 65,504)", fix="write bf16 or f32")
    return made.view(torch.uint8).numpy()


def _rotated_heads(name: str, config: ModelConfig) -> int | None:
    """The heads of a query or key projection, whose features rotary positions pair; None for any other weight."""
    part = name.rsplit(".", 2)[-2]
    return {"query": config.heads, "key": config.kv_heads}.get(part)


def _to_neighbours(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from (all first features, all second features) to pairs side by side."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _to_halves(weight: Tensor, heads: int) -> Tensor:
    """The way back."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


@cache
def _block(kind: int) -> tuple[int, int] | None:
    """Numbers and bytes of a block of a number format, None where it is not known or cannot be dequantised."""
    try:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        dequantize(np.zeros((1, size), np.uint8), gguf.GGMLQuantizationType(kind))
    except (ValueError, KeyError, NotImplementedError):
        return None
    return block, size


def _size(tensor: TensorPlace, where: Path) -> int:
    """Bytes of a tensor's data."""
    known = _block(tensor.type)
    if known is None:
        raise DanluError(f"{tensor.name} is stored as type {tensor.type}, which is not known", where=where)
    block, size = known
    count = math.prod(tensor.shape)
    if not count or not tensor.shape or tensor.shape[-1] % block:
        raise DanluError(f"{tensor.name} of shape {list(tensor.shape)} does not fill blocks of {block}", where=where)
    return count // block * size


def _check_whole(header: Header) -> None:
    for tensor in header.tensors:
        end = tensor.offset + _size(tensor, header.path)
        if end > header.size:
            what = f"is cut short: {tensor.name} ends at byte {end:,}, but the file has {header.size:,}"
            raise DanluError(what, where=header.path, fix="download or export it again")


def _read(path: Path, tensor: TensorPlace, dtype: torch.dtype) -> Tensor:
    """One tensor, dequantised."""
    kind = gguf.GGMLQuantizationType(tensor.type)
    made = torch.empty(tensor.shape, dtype=dtype)
    rows = made.view(-1, tensor.shape[-1])
    row_bytes = _size(tensor, path) // len(rows)
    step = max(1, PIECE // tensor.shape[-1])
    with path.open("rb") as file:
        file.seek(tensor.offset)
        for start in range(0, len(rows), step):
            count = min(step, len(rows) - start)
            piece = np.fromfile(file, np.uint8, count * row_bytes).reshape(count, row_bytes)
            rows[start : start + count] = torch.from_numpy(dequantize(piece, kind))
    return made
