"""Boxes of tensors on disk: any cut tiles the whole, any other cut reads it back, and damage is found."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from danlu.errors import DanluError
from danlu.train.storage import (
    INDEX,
    Box,
    Entry,
    File,
    Index,
    Listing,
    Reader,
    check_files,
    cut,
    divide,
    dtype_name,
    part_name,
    read_index,
    write_index,
    write_part,
)
from tests.train.test_state import damage

Cut = tuple[tuple[int, ...], tuple[Placement, ...]]  # a mesh's shape, and a placement for each of its dimensions
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool]


def places(degrees: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, degrees)))


@st.composite
def cuts(draw: st.DrawFn, dims: int) -> Cut:
    """As FSDP2 over tensor parallelism cuts a weight, or as several plain placements do."""
    degree = st.integers(1, 4)
    if not dims or draw(st.booleans()):
        kinds = draw(st.lists(st.sampled_from([Replicate(), *map(Shard, range(dims))]), min_size=1, max_size=3))
        return tuple(draw(degree) for _ in kinds), tuple(kinds)
    dim, copies, shards, tensor = draw(st.integers(0, dims - 1)), draw(degree), draw(degree), draw(degree)
    return (copies, shards, tensor), (Replicate(), _StridedShard(dim, split_factor=tensor), Shard(dim))


@st.composite
def shapes_and_cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], Cut, Cut]:
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    return shape, draw(cuts(len(shape))), draw(cuts(len(shape)))


def boxes(shape: tuple[int, ...], how: Cut) -> list[Box]:
    """What each rank of a mesh holds."""
    degrees, placements = how
    return [cut(shape, degrees, place, placements) for place in places(degrees)]


@settings(deadline=None)
@given(shapes_and_cuts())
def test_every_element_is_in_one_box_of_each_copy(case: tuple[tuple[int, ...], Cut, Cut]) -> None:
    shape, how, _ = case
    seen = torch.zeros(shape, dtype=torch.int64)
    whole = Box((0,) * len(shape), shape)
    for box in boxes(shape, how):
        seen[box.within(whole)] += 1
    copies = math.prod(degree for degree, placement in zip(*how, strict=True) if isinstance(placement, Replicate))
    assert torch.all(seen == copies)


@settings(deadline=None)
@given(shapes_and_cuts(), st.data())
def test_where_sizes_divide_it_is_torchs_own_cut(case: tuple[tuple[int, ...], Cut, Cut], data: st.DataObject) -> None:
    shape, (degrees, placements), _ = case
    if any(isinstance(placement, _StridedShard) for placement in placements):
        shape = tuple(size * math.prod(degrees) for size in shape)
    place = data.draw(st.sampled_from(places(degrees)))
    box = cut(shape, degrees, place, placements)
    sizes, offsets = _compute_local_shape_and_global_offset(shape, degrees, list(place), placements)
    assert box.sizes == sizes
    assert not box.elements or box.offsets == offsets


def test_fsdp_over_a_tensor_cut_that_does_not_divide() -> None:
    """9 rows over 4 x 2: rows 0-4 and 5-8 by tensor parallelism, then each over 4, as FSDP2 lays them."""
    held = boxes((9,), ((4, 2), (_StridedShard(0, split_factor=2), Shard(0))))
    rows = [list(range(box.offsets[0], box.ends[0])) for box in held]
    assert rows == [[0, 1], [5], [2, 3], [6], [4], [7], [], [8]]


@pytest.mark.parametrize(
    ("placements", "complaint"),
    [
        ((Shard(0), Partial()), "cannot be saved"),
        ((Shard(0), _StridedShard(0, split_factor=2)), "not in one block"),
        ((_StridedShard(0, split_factor=2), Replicate()), "not in one block"),
    ],
)
def test_what_is_no_box_is_refused(placements: tuple[Placement, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        cut((8,), (2, 2), (0, 1), placements)


def make(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul(50).to(dtype)


def store(folder: Path, whole: Tensor, how: Cut) -> Entry:
    """Write a tensor as the ranks of a mesh would."""
    everything = Box((0,) * whole.dim(), tuple(whole.shape))
    fact: list[Any] = [dtype_name(whole.dtype), list(whole.shape)]
    held = boxes(tuple(whole.shape), how)
    listings: list[Listing] = [{"w": [*fact, list(box.offsets), list(box.sizes)]} for box in held]
    entry = divide(listings)["w"]
    for rank in range(len(held)):
        own = {
            piece.key: whole[piece.box.within(everything)].contiguous()
            for piece in entry.pieces
            if piece.file == part_name(rank)
        }
        if own:
            write_part(folder / part_name(rank), own)
    return entry


@settings(deadline=None, max_examples=60)
@given(shapes_and_cuts(), st.sampled_from(DTYPES))
def test_one_cut_reads_what_another_wrote(case: tuple[tuple[int, ...], Cut, Cut], dtype: torch.dtype) -> None:
    shape, written, wanted = case
    whole = make(shape, dtype)
    everything = Box((0,) * len(shape), shape)
    with TemporaryDirectory() as home:
        entry = store(Path(home), whole, written)
        assert sum(piece.box.elements for piece in entry.pieces) == whole.numel()
        reader = Reader(Path(home))
        for box in boxes(shape, wanted):
            found = torch.ones(box.sizes, dtype=dtype)
            reader.fill(found, box, entry)
            assert torch.equal(found, whole[box.within(everything)])


def test_copies_are_written_once_and_by_turns() -> None:
    """Six tensors of one size that three ranks hold alike: two each."""
    listing = {f"w{number}": ["float32", [8, 4], [0, 0], [8, 4]] for number in range(6)}
    files = [piece.file for entry in divide([listing] * 3).values() for piece in entry.pieces]
    assert sorted(files) == [part_name(rank) for rank in range(3) for _ in range(2)]


def test_a_name_that_some_ranks_hold_is_written_by_one_of_them() -> None:
    listings: list[Listing] = [{"first": ["float32", [4], [0], [4]]}, {"second": ["int8", [], [], []]}, {}]
    found = {name: [piece.file for piece in entry.pieces] for name, entry in divide(listings).items()}
    assert found == {"first": [part_name(0)], "second": [part_name(1)]}


def test_ranks_that_differ_about_a_tensor_are_told() -> None:
    one, other = {"w": ["float32", [4], [0], [4]]}, {"w": ["float32", [5], [0], [5]]}
    with pytest.raises(DanluError, match=r"w: is float32 \[4\] on one rank and float32 \[5\] on rank 1"):
        divide([one, other])
    with pytest.raises(DanluError, match="w: has 4 elements, and the ranks hold 2 of it"):
        divide([{"w": ["float32", [4], [0], [2]]}])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two files."""
    whole = make((6, 5), torch.float32)
    entry = store(tmp_path, whole, ((2,), (Shard(0),)))
    files = {name: write_part(tmp_path / name, {"x": whole}) for name in (part_name(0), part_name(1))}
    extra = {"data": "炼丹", "plateau": {"best": 0.1 + 0.2}}
    write_index(tmp_path, Index(step=7, score=1e-3, made="now", extra=extra, tensors={"w": entry}, files=files))
    return tmp_path


def test_an_index_comes_back_as_it_was(folder: Path) -> None:
    index = read_index(folder)
    assert (index.step, index.score, index.extra["plateau"]["best"], index.extra["data"]) == (
        7,
        1e-3,
        0.1 + 0.2,
        "炼丹",
    )
    write_index(folder, index)
    assert read_index(folder) == index


def test_any_flipped_bit_in_an_index_is_found(folder: Path) -> None:
    content = (folder / INDEX).read_bytes()
    for place in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        (folder / INDEX).write_bytes(damaged)
        with pytest.raises((ValueError, DanluError)):
            read_index(folder)


@pytest.mark.parametrize("content", ["", "null", "[]", "{}", '{"format": 1', '"text"'])
def test_what_is_no_index_is_damaged(folder: Path, content: str) -> None:
    (folder / INDEX).write_text(content)
    with pytest.raises(ValueError, match=f"{INDEX} cannot be read"):
        read_index(folder)


def test_a_newer_format_is_no_damage(folder: Path) -> None:
    read = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(read | {"version": 2, "content": "something else"}))
    with pytest.raises(DanluError, match="is of format 2, and this Danlu reads up to 1"):
        read_index(folder)


def test_an_index_names_no_file_elsewhere(folder: Path) -> None:
    index = read_index(folder)
    piece = index.tensors["w"].pieces[0].model_copy(update={"file": "../part-00000.safetensors"})
    entry = index.tensors["w"].model_copy(update={"pieces": (piece,)})
    write_index(folder, index.model_copy(update={"tensors": {"w": entry}}))
    with pytest.raises(ValueError, match="String should match pattern"):
        read_index(folder)


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ("cut", r"has \d+ bytes, the index says \d+"),
        ("flipped", "differs from its checksum"),
        ("missing", "is missing"),
    ],
)
def test_damaged_files_are_named(folder: Path, how: str, complaint: str) -> None:
    files: dict[str, File] = read_index(folder).files
    check_files(folder, files)
    damage(folder / part_name(1), how)
    with pytest.raises(ValueError, match=f"{part_name(1)} {complaint}"):
        check_files(folder, files)
