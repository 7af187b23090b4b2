"""A model as a Hugging Face directory: config.json and safetensors, read lazily, written as transformers loads it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from danlu.artifact import sync, write_json
from danlu.console import warn
from danlu.errors import DanluError
from danlu.model import compressed
from danlu.model.config import AnyConfig
from danlu.model.families.family import Family
from danlu.model.families.known import family_for, family_of
from danlu.model.names import Found, Place
from danlu.model.stored import Stored, Weights, stacks
from danlu.model.transformer import Model
from danlu.tokenizer import Tokenizer, read_json

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# What a directory is read from, beside the weights.
READ = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", INDEX),
)
SHARDS = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # safetensors' names
PIECE = 2**20  # numbers read at once
SHARD = 5_000_000_000  # bytes, the size at which Hugging Face splits


def read_directory_config(path: Path) -> tuple[Family, AnyConfig]:
    """The family and configuration of a Hugging Face directory."""
    file = path / "config.json"
    hf = compressed.plain_config(read_json(file), file)
    family = family_of(hf, file)
    return family, family.config(hf, file)


def files_read(path: Path) -> list[Path]:
    """Every file of a directory that decides what the model is."""
    return [path / name for name in READ if (path / name).is_file()] + weight_files(path)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a directory. Raises DanluError where there are none, or one of them is missing."""
    if (path / WHOLE).is_file():
        return [path / WHOLE]
    if (path / INDEX).is_file():
        listed = read_json(path / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise DanluError("has no weight_map", where=path / INDEX)
        files = [path / name for name in sorted(set(listed.values()))]
        for file in files:
            if file.parent != path or not file.is_file():
                raise DanluError(f"lacks {file.name}, which {INDEX} lists", where=path, fix="download the rest")
        return files
    pickled = next((name for name in PICKLED if (path / name).is_file()), None)
    if pickled is not None:
        raise DanluError(
            f"has only {pickled}, a pickle; unpickling can run any program, so Danlu never does",
            where=path,
            fix="where you trust it, transformers' from_pretrained(...).save_pretrained(...) makes safetensors",
        )
    raise DanluError("has no model.safetensors", where=path, fix="download the weights too, or name another directory")


def stored_weights(path: Path, family: Family, config: AnyConfig) -> Weights:
    """The weights in a directory, found from the files' headers alone.

    Raises DanluError where a file is damaged or cut short, or holds a tensor that has no place in the model.
    """
    pieces: dict[str, dict[int | None, _Piece]] = {}
    left: list[str] = []
    for name, tensor in _tensors(path).items():
        found = _ours(family, name)
        if found and tensor.dtype not in DTYPES and tensor.products is None:
            what = f"{name} is stored as {tensor.dtype}, which is not supported"
            raise DanluError(what, where=tensor.file, fix=f"use a checkpoint in one of {', '.join(DTYPES)}")
        for ours in found:
            pieces.setdefault(ours.ours, {})[ours.expert] = _Piece(name, tensor, ours.place)
        if not found and name.startswith(family.others):
            left.append(name)
        elif not found and not name.endswith(family.unread):
            raise DanluError(f"the tensor {name} is not known", where=tensor.file)
    if left:
        warn(f"{path}: left out, since {family.architecture} has no such head: {', '.join(sorted(left))}")
    weights = {ours: _stored(parts) for ours, parts in pieces.items()}
    if stacks(config)[-1].tied and "head.weight" in weights:
        _drop_tied_head(weights)
    return Weights(path, family.names, weights)


def _ours(family: Family, name: str) -> list[Found]:
    """What a tensor is, whether or not its name has the family's prefix, and with TensorFlow's words for norms."""
    name = name.replace(".gamma", ".weight").replace(".beta", ".bias")
    return (
        family.names.ours(name)
        or family.names.ours(family.prefix + name)
        or (family.names.ours(name.removeprefix(family.prefix)) if family.prefix else [])
    )


@dataclass(frozen=True)
class _Tensor:
    """A tensor in a safetensors file.

    Attributes:
        file, start: where its bytes begin.
        shape: outermost dimension first.
        dtype: by safetensors' name.
        products: makes its numbers, fp32, where they do not lie there as such (see `danlu.model.compressed`).
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int
    products: Callable[[], Tensor] | None = None

    def load(self, name: str) -> Tensor:
        """The tensor as it is stored. Args: name: it has in its file."""
        with safe_open(self.file, framework="pt") as opened:
            return opened.get_tensor(name)


def tensor_names(path: Path) -> list[str]:
    """Names of all tensors in a directory's files, as they are stored."""
    return [name for file in weight_files(path) for name in _header(file)]


def _tensors(path: Path) -> dict[str, _Tensor]:
    """Every tensor of a directory by its name; what a matrix of few bits is stored as counts as the matrix."""
    found = {name: tensor for file in weight_files(path) for name, tensor in _header(file).items()}
    for scale in [name for name in found if name.endswith(compressed.SCALE)]:
        stem = scale.removesuffix(compressed.SCALE)
        packed, shape = stem + compressed.PACKED, stem + compressed.SHAPE
        steps = found.pop(scale)
        if packed in found and shape in found:
            codes, columns = (packed, found.pop(packed)), int(found.pop(shape).load(shape)[-1])
        elif f"{stem}.weight" in found:
            codes = f"{stem}.weight", found.pop(f"{stem}.weight")
            columns = codes[1].shape[-1]
        else:
            raise DanluError(f"{scale} belongs to no matrix", where=steps.file, fix="the file is incomplete")
        make = partial(_products, codes, (scale, steps), columns)
        stored = codes[1]
        found[f"{stem}.weight"] = _Tensor(stored.file, (stored.shape[0], columns), stored.dtype, stored.start, make)
    return found


def _products(codes: tuple[str, _Tensor], steps: tuple[str, _Tensor], columns: int) -> Tensor:
    """A matrix of few bits, fp32, of what is stored by name."""
    try:
        return compressed.products(codes[1].load(codes[0]), steps[1].load(steps[0]), columns)
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise DanluError(f"{codes[0]} cannot be read: {error}", where=codes[1].file) from None


@dataclass(frozen=True)
class _Piece:
    """A tensor in a file and how our weight, or one expert's, lies in it."""

    name: str
    tensor: _Tensor
    place: Place

    @property
    def file(self) -> Path:
        """Where the tensor lies."""
        return self.tensor.file

    @property
    def shape(self) -> tuple[int, ...]:
        """Of our weight; the tensor's own where it cannot be cut, which is then found wrong."""
        return self.place.shape(self.tensor.shape) or self.tensor.shape

    def read(self, dtype: torch.dtype) -> Tensor:
        """In new memory; read part by part, so that there never is a second copy of it."""
        if self.tensor.products is not None:
            whole = self.tensor.products()
            parts = (whole.T if self.place.transposed else whole).chunk(self.place.parts)
            return parts[self.place.part].to(dtype).clone()
        made = torch.empty(self.shape, dtype=dtype)
        if self.place.transposed and made.dim() == 2:
            rows, width = self.tensor.shape
            ours = slice(self.place.part * width // self.place.parts, (self.place.part + 1) * width // self.place.parts)
            step = max(1, PIECE // width)
            for first, part in self._numbers(0, rows * width, step * width):
                here = slice(first // width, first // width + step)
                made.T[here] = part.view(-1, width)[:, ours]
            return made
        flat = made.view(-1)
        for first, part in self._numbers(self.place.part * len(flat), len(flat), PIECE):
            flat[first : first + len(part)] = part
        return made

    def _numbers(self, start: int, count: int, step: int) -> Iterator[tuple[int, Tensor]]:
        """So many numbers of the tensor from the `start`-th, `step` at once: how many came before, and they themselves.

        Read, not mapped: the pages of a map stay in memory.
        """
        stored = DTYPES[self.tensor.dtype]
        room = np.empty(min(step, count) * stored.itemsize, np.uint8)
        with self.file.open("rb") as file:
            file.seek(self.tensor.start + start * stored.itemsize)
            for first in range(0, count, step):
                part = room[: min(step, count - first) * stored.itemsize]
                if file.readinto(part.data) != part.nbytes:
                    raise DanluError(f"is cut short within {self.name}", where=self.file, fix="download it again")
                yield first, torch.from_numpy(part).view(stored)


def _stored(parts: dict[int | None, _Piece]) -> Stored:
    """One weight of ours, from one tensor or from one of every expert."""
    if None in parts:
        piece = parts[None]
        return Stored(piece.name, piece.file, piece.shape, piece.read)
    ordered = [parts[expert] for expert in sorted(parts, key=lambda expert: expert or 0)]
    first = ordered[0]
    odd = next((piece for piece in ordered if piece.shape != first.shape), first)
    shape = (len(ordered), *odd.shape)
    return Stored(odd.name, odd.file, shape, partial(_read_bank, ordered))


def _read_bank(pieces: list[_Piece], dtype: torch.dtype) -> Tensor:
    made = torch.empty(len(pieces), *pieces[0].shape, dtype=dtype)
    for expert, piece in enumerate(pieces):
        made[expert] = piece.read(dtype)
    return made


def is_written(name: str) -> bool:
    """Whether `write_directory` gives a file this name."""
    return name in (*READ, WHOLE) or SHARDS.fullmatch(name) is not None


def write_directory(model: Model, tokenizer: Tokenizer | None, path: Path, dtype: torch.dtype) -> None:
    """Fill an existing empty directory; see `danlu.model.checkpoint.save_checkpoint`."""
    family = family_for(model.config)
    config = family.file(model.config)
    if tokenizer is None:
        write_json(path / "config.json", {**config, "torch_dtype": str(dtype).removeprefix("torch.")})
    else:
        special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        write_json(path / "config.json", {**special, **config, "torch_dtype": str(dtype).removeprefix("torch.")})
        first = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        stops = first + sorted(tokenizer.stop_ids - set(first))
        write_json(path / "generation_config.json", {**special, "eos_token_id": stops or None})
        tokenizer.save(path)
    _write_weights(model, family, path, dtype)


def _write_weights(model: Model, family: Family, path: Path, dtype: torch.dtype) -> None:
    shards: list[dict[str, tuple[Place, list[Tensor]]]] = [{}]
    sizes = [0]
    try:
        for name, place, parts in family.names.outward(model.state_dict()):
            size = sum(part.numel() for part in parts) * dtype.itemsize
            if sizes[-1] and sizes[-1] + size > SHARD:
                shards.append({})
                sizes.append(0)
            shards[-1][name] = place, parts
            sizes[-1] += size
    except KeyError as error:
        what = f"Hugging Face has no name for the weight {error.args[0]}"
        raise DanluError(what, fix="merge adapters before saving") from None
    listed: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = path / (WHOLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors")
        made = {
            name: place.put([part.detach().to("cpu", dtype) for part in parts]).to(dtype).contiguous()
            for name, (place, parts) in shard.items()
        }
        save_file(made, file, metadata={"format": "pt"})
        sync(file)
        listed |= dict.fromkeys(shard, file.name)
    if len(shards) > 1:
        write_json(path / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": listed})


def _header(file: Path) -> dict[str, _Tensor]:
    """Every tensor of a file. The library checks that header and data fit in it, before memory is taken for either.

    Format: an 8-byte length, so many bytes of JSON, and the data that its offsets count in (safetensors' README).
    """
    try:
        with safe_open(file, framework="pt"):
            pass
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            listed = json.loads(opened.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise DanluError(f"is damaged or cut short: {error}", where=file, fix="download or save it again") from None
    return {
        name: _Tensor(file, tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0])
        for name, entry in listed.items()
        if name != "__metadata__"
    }


def _drop_tied_head(found: dict[str, Stored]) -> None:
    """Some files hold the embedding a second time as the head; it must be the same one."""
    head, embedding = found.pop("head.weight"), found["embedding.tokens.weight"]
    if not torch.equal(head.read(torch.float32), embedding.read(torch.float32)):
        what = f"tie_word_embeddings is true, but {head.name} differs from {embedding.name}"
        raise DanluError(what, where=head.file, fix="set tie_word_embeddings to false in config.json")
