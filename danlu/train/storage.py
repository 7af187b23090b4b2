"""A checkpoint on disk: boxes cut from tensors, each written once, and an index by which any other cut reads them.

A checkpoint is a folder with one safetensors file a rank (`part-00000.safetensors`) and `index.json`, which says for
every tensor its shape, its dtype and which box of it lies where, and for every file its bytes and SHA-256. The index
vouches for itself by a checksum too.

Where a DTensor's local part lies in the whole is worked out here: torch's own account of it (as of 2.13: its chunk
lists, on which torch.distributed.checkpoint builds) is wrong where FSDP2 and tensor parallelism cut one dimension
that does not divide, such as 9 rows over 4 x 2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from danlu.artifact import canonical, hash_file, sync, write_aside
from danlu.errors import DanluError

INDEX = "index.json"
FORMAT, VERSION = "danlu checkpoint", 1


@dataclass(frozen=True)
class Box:
    """A block of a tensor: where it begins and how long it is along each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    def overlap(self, other: Box) -> Box | None:
        """What both hold, or None."""
        starts = tuple(map(max, self.offsets, other.offsets))
        ends = tuple(map(min, self.ends, other.ends))
        sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return Box(starts, sizes) if all(size > 0 for size in sizes) else None

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(offset + size for offset, size in zip(self.offsets, self.sizes, strict=True))

    def within(self, outer: Box) -> tuple[slice, ...]:
        """How to index a tensor that holds `outer` to get this box."""
        return tuple(
            slice(start - origin, end - origin)
            for start, end, origin in zip(self.offsets, self.ends, outer.offsets, strict=True)
        )


def cut(shape: Sequence[int], degrees: Sequence[int], places: Sequence[int], placements: Sequence[Placement]) -> Box:
    """The box of a tensor that a rank holds.

    A cut into n gives each but the last the size rounded up, as torch.chunk does. Of several cuts along one dimension
    the left one of the mesh comes first, but a `_StridedShard` after as many as its split factor counts: FSDP2 cuts
    what tensor parallelism has left of a weight.

    Args:
        shape: of the whole tensor.
        degrees, places: the mesh's shape and the rank's coordinate in it.
        placements: one for each dimension of the mesh.

    Raises ValueError where what the rank holds is no box, or a sum still to be made.
    """
    offsets, sizes = [0] * len(shape), list(shape)
    done: dict[int, list[int]] = {}  # dimension -> the mesh's dimensions that have cut it
    for axis in sorted(range(len(placements)), key=lambda axis: _split_factor(placements[axis])):
        placement = placements[axis]
        if isinstance(placement, Replicate) or degrees[axis] == 1:
            continue
        if not isinstance(placement, (Shard, _StridedShard)):
            raise ValueError(f"a tensor placed as {placement} cannot be saved")
        before = done.setdefault(placement.dim, [])
        factor = _split_factor(placement)
        if factor > 1 and (math.prod(degrees[other] for other in before) != factor or min(before, default=0) < axis):
            raise ValueError(f"what a rank holds of a tensor placed as {tuple(placements)} is not in one block")
        before.append(axis)
        length = sizes[placement.dim]
        chunk = -(-length // degrees[axis])
        start = min(places[axis] * chunk, length)
        offsets[placement.dim] += start
        sizes[placement.dim] = min(start + chunk, length) - start
    return Box(tuple(offsets), tuple(sizes))


def _split_factor(placement: Placement) -> int:
    """How many parts a dimension is in before this placement cuts it; 1 for all but those of FSDP2."""
    return int(placement.split_factor) if isinstance(placement, _StridedShard) else 1


def held(tensor: Tensor) -> tuple[Box, Tensor] | None:
    """What this rank holds of a tensor: which box, and the data, sharing the tensor's memory; None where nothing.

    Raises ValueError where a DTensor's local part has not the shape that its placements give it.
    """
    if not isinstance(tensor, DTensor):
        return Box((0,) * tensor.dim(), tuple(tensor.shape)), tensor.detach()
    mesh = tensor.device_mesh
    places = mesh.get_coordinate()
    if places is None:
        return None
    box = cut(tensor.shape, mesh.shape, places, tensor.placements)
    with torch.no_grad():
        local = tensor.to_local()
    if tuple(local.shape) != box.sizes:
        raise ValueError(f"a part of shape {list(local.shape)} stands where {tensor.placements} puts {list(box.sizes)}")
    return box, local


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Piece(_Frozen):
    """A box of a tensor in a file of the checkpoint, where it is the tensor called `key`."""

    file: str = Field(pattern=r"^part-\d{5,}\.safetensors$")
    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def box(self) -> Box:
        return Box(self.offsets, self.sizes)


class Entry(_Frozen):
    """A tensor: its pieces cover it, and each element lies in one of them."""

    shape: tuple[int, ...]
    dtype: str = Field(description="torch's name, as in bfloat16")
    pieces: tuple[Piece, ...]


class File(_Frozen):
    """What the index knows of a file."""

    bytes: int
    sha256: str


class Index(_Frozen):
    """All that a checkpoint holds.

    Attributes:
        step: steps done.
        score: what decides whether it is among the best; lower is better.
        made: when, UTC; for people to read, nothing is decided by it.
        extra: the small things that came with the tensors, as JSON keeps them.
    """

    step: int
    score: float | None
    made: str
    extra: dict[str, Any]
    tensors: dict[str, Entry]
    files: dict[str, File]


def part_name(rank: int) -> str:
    """The file that a rank writes."""
    return f"part-{rank:05d}.safetensors"


Listing = dict[str, list[Any]]  # name -> dtype, shape, offsets, sizes: JSON-able


def describe(tensors: Mapping[str, Tensor], parts: Mapping[str, tuple[Box, Tensor]]) -> Listing:
    """What a rank holds, to be told to the others."""
    return {
        name: [dtype_name(local.dtype), list(tensors[name].shape), list(box.offsets), list(box.sizes)]
        for name, (box, local) in parts.items()
    }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def divide(listings: Sequence[Listing]) -> dict[str, Entry]:
    """Share out the writing: each box goes to the one that has least to write of those ranks that hold it.

    The same listings give the same answer on every rank.

    Args:
        listings: what each rank holds.

    Raises DanluError where ranks differ about a tensor, or do not hold all of it between them.
    """
    facts: dict[str, tuple[str, list[int]]] = {}
    holders: dict[str, dict[Box, list[int]]] = {}
    for rank, listing in enumerate(listings):
        for name, (dtype, shape, offsets, sizes) in listing.items():
            if facts.setdefault(name, (dtype, shape)) != (dtype, shape):
                one, other = facts[name], (dtype, shape)
                raise DanluError(f"is {_spell(*one)} on one rank and {_spell(*other)} on rank {rank}", where=name)
            holders.setdefault(name, {}).setdefault(Box(tuple(offsets), tuple(sizes)), []).append(rank)
    loads = [0] * len(listings)
    return {name: _assign(name, *facts[name], boxes, loads) for name, boxes in holders.items()}


def _assign(name: str, dtype: str, shape: list[int], boxes: dict[Box, list[int]], loads: list[int]) -> Entry:
    """Give each box of a tensor to one of its holders, and add its bytes to that rank's load."""
    pieces = []
    for box, ranks in boxes.items():
        if box.elements:
            owner = min(ranks, key=loads.__getitem__)
            loads[owner] += box.elements * getattr(torch, dtype).itemsize
            spans = ", ".join(f"{start}:{end}" for start, end in zip(box.offsets, box.ends, strict=True))
            key = name if box.sizes == tuple(shape) else f"{name}[{spans}]"
            pieces.append(Piece(file=part_name(owner), key=key, offsets=box.offsets, sizes=box.sizes))
    found, whole = sum(piece.box.elements for piece in pieces), math.prod(shape)
    if found != whole:
        raise DanluError(f"has {whole} elements, and the ranks hold {found} of it between them", where=name)
    return Entry(shape=tuple(shape), dtype=dtype, pieces=tuple(pieces))


def _spell(dtype: str, shape: Sequence[int]) -> str:
    return f"{dtype} {list(shape)}"


def write_part(file: Path, tensors: Mapping[str, Tensor]) -> File:
    """Write one rank's pieces and make them durable. Raises OSError or SafetensorError."""
    save_file(dict(tensors), file)
    sync(file)
    return File(bytes=file.stat().st_size, sha256=hash_file(file))


def write_index(folder: Path, index: Index) -> None:
    """Write the index, which makes a folder a checkpoint."""
    content = {"format": FORMAT, "version": VERSION, "content": index.model_dump()}
    write_aside(folder / INDEX, canonical(content | {"sha256": _digest(content)}) + "\n")


def read_index(folder: Path) -> Index:
    """Read a checkpoint's index.

    Raises ValueError where it is missing or damaged, and DanluError where a newer Danlu has written it.
    """
    try:
        read = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if read["format"] == FORMAT and read["version"] > VERSION:
            what = f"is of format {read['version']}, and this Danlu reads up to {VERSION}"
            raise DanluError(what, where=folder, fix="install the Danlu that wrote it, or a newer one")
        if read.pop("sha256") != _digest(read):
            raise ValueError(f"{INDEX} differs from its checksum")
        return Index.model_validate(read["content"])
    except FileNotFoundError:
        raise ValueError(f"{INDEX} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{INDEX} cannot be read: {error!r}") from None


def _digest(content: object) -> str:
    return sha256(canonical(content).encode()).hexdigest()


def check_files(folder: Path, files: Mapping[str, File], *, contents: bool = True) -> None:
    """Compare files with what the index says of them; raises ValueError naming the first that differs.

    Args:
        contents: whether their checksums are compared, which reads them whole, or their sizes alone.
    """
    for name, known in files.items():
        file = folder / name
        try:
            size = file.stat().st_size
            if size != known.bytes:
                raise ValueError(f"{name} has {size:,} bytes, the index says {known.bytes:,}")
            if contents and hash_file(file) != known.sha256:
                raise ValueError(f"{name} differs from its checksum")
        except FileNotFoundError:
            raise ValueError(f"{name} is missing") from None
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error}") from None


class Reader:
    """Reads boxes of a checkpoint's tensors; files are mapped into memory, and only what is asked for is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Any] = {}

    def fill(self, target: Tensor, box: Box, entry: Entry) -> None:
        """Copy a box of a tensor into `target`, which has its shape. Raises DanluError where the disk fails."""
        for piece in entry.pieces:
            shared = box.overlap(piece.box)
            if shared is not None:
                target[shared.within(box)].copy_(self._stored(piece)[shared.within(piece.box)])

    def _stored(self, piece: Piece) -> Tensor:
        file = self.folder / piece.file
        try:
            if piece.file not in self.files:
                self.files[piece.file] = safe_open(file, framework="pt")
            stored: Tensor = self.files[piece.file].get_tensor(piece.key)
        except (OSError, SafetensorError) as error:
            what = f"cannot be read: {error}"
            raise DanluError(what, where=file, fix="mend the disk, or use another checkpoint") from None
        return stored
