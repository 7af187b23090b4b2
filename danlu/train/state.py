"""Checkpoints of a run under way: written aside by all ranks, renamed when whole, resumed from under any plan.

A step's checkpoint is a folder, `step-00000100` (storage.py says what is in it). It is written as
`.step-00000100.aside`; the first rank renames it when every rank's part is on the disk, so it exists whole or not at
all. Order is that of the steps' numbers, never of clocks.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from danlu.artifact import canonical, sync
from danlu.console import say, warn
from danlu.errors import DanluError
from danlu.train.storage import (
    Box,
    Entry,
    File,
    Index,
    Reader,
    check_files,
    describe,
    divide,
    dtype_name,
    held,
    part_name,
    read_index,
    write_index,
    write_part,
)

CHECKPOINTS = "checkpoints"  # the folder of a run that they stand in
Result = TypeVar("Result")


@dataclass(frozen=True)
class Peers:
    """The ranks that share checkpoints, and how they agree. What they tell each other is JSON.

    Attributes:
        group: of their own, so that a thread may use it beside the training; None for a process alone.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def join(cls) -> Peers:
        """All ranks of the default group; every one of them must call this."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))

    def gather(self, value: Any) -> list[Any]:
        """What each rank says, in their order. Raises DanluError where one of them is gone."""
        if self.group is None:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        try:
            dist.all_gather(lengths, torch.tensor([len(own)]), group=self.group)
            longest = max(int(length) for length in lengths)
            said = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(said, torch.nn.functional.pad(own, (0, longest - len(own))), group=self.group)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise DanluError(f"another rank is gone: {reason}", fix="what that rank said last tells why") from None
        return [json.loads(text[:length].numpy().tobytes()) for text, length in zip(said, lengths, strict=True)]

    def together(self, work: Callable[[], Result]) -> Result:
        """Do something on every rank; where it fails on any, all raise the DanluError of the first that failed."""
        failure = None
        try:
            result = work()
        except DanluError as error:
            failure = [error.what, None if error.where is None else str(error.where), error.fix]
        for found in self.gather(failure):
            if found is not None:
                what, where, fix = found
                raise DanluError(what, where=where, fix=fix)
        return result

    def first(self, work: Callable[[], None]) -> None:
        """Let rank 0 do something; where it fails, all raise its DanluError."""
        self.together(work if self.rank == 0 else lambda: None)


@dataclass
class Saved:
    """A checkpoint that has been found whole. With several ranks, it is not to be read while a save is under way.

    Attributes:
        step: steps done.
        extra: the small things that were saved with the tensors.
        names: name -> shape and dtype of every tensor.
    """

    folder: Path
    index: Index
    peers: Peers = field(default_factory=Peers)

    @property
    def step(self) -> int:
        return self.index.step

    @property
    def extra(self) -> dict[str, Any]:
        return self.index.extra

    @property
    def names(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {name: (entry.shape, getattr(torch, entry.dtype)) for name, entry in self.index.tensors.items()}

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors in place, of a DTensor this rank's part. All ranks call this, each with what it holds.

        Raises DanluError on every rank, before anything is changed, where one of the tensors is not in the checkpoint
        or differs in shape or dtype; and where the disk fails.
        """
        self.peers.together(partial(self._compare, tensors))
        self.peers.together(partial(self._fill, tensors))

    def read(self, name: str) -> Tensor:
        """A tensor as a whole, on the CPU. Raises DanluError where there is none of that name."""
        entry = self._entry(name)
        whole = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        self._reader.fill(whole, Box((0,) * whole.dim(), entry.shape), entry)
        return whole

    @cached_property
    def _reader(self) -> Reader:
        return Reader(self.folder)

    def _entry(self, name: str) -> Entry:
        if name not in self.index.tensors:
            raise DanluError(f"holds no tensor {name}", where=self.folder, fix="is it a checkpoint of this model?")
        return self.index.tensors[name]

    def _compare(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            entry = self._entry(name)
            stored, wanted = f"{entry.dtype} {list(entry.shape)}", f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
            if stored != wanted:
                what = f"holds {name} as {stored}, and it is to be read as {wanted}"
                raise DanluError(what, where=self.folder, fix="is it a checkpoint of this model?")

    @torch.no_grad()
    def _fill(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            part = held(tensor)
            if part is not None:
                box, local = part
                self._reader.fill(local, box, self.index.tensors[name])


class Checkpoints:
    """The checkpoints of a run, as their one writer sees them. With several ranks, all make one and all call it alike.

    Making one removes what a killed run has left half-written.

    Args:
        home: where they are kept; seen by all ranks.
        keep_last: how many of the last are kept.
        keep_best: how many more are kept of those with the lowest scores.
        background: whether a thread writes while training goes on. It takes as much memory as a rank writes, for as
            long as this lives; call `wait` before the process group is destroyed.
    """

    def __init__(self, home: Path, keep_last: int, keep_best: int = 0, *, background: bool = True) -> None:
        self.home, self.keep_last, self.keep_best, self.background = home, keep_last, keep_best, background
        self.peers = Peers.join()
        self._layout: dict[str, Entry] = {}
        self._listed: list[str] = []  # digests of the ranks' listings that `_layout` is for
        self._rooms: dict[str, Tensor] = {}  # what is being written, by its key
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None
        self.peers.first(self._tidy)

    def save(
        self, step: int, tensors: Mapping[str, Tensor], extra: Mapping[str, Any], score: float | None = None
    ) -> float:
        """Save the state after `step` steps: what ranks hold alike is written once, by one of them.

        Later steps that lie in `home` are removed: they were damaged, or the run has gone back behind them.

        Args:
            tensors: name -> tensor. Plain tensors of one name are the same on every rank that has them.
            extra: small things that JSON can say; those of rank 0 are kept.
            score: lower is better; None never counts among the best.

        Returns: the seconds for which the caller stood still.
        Raises DanluError, on all ranks, where this (without `background`) or the save before could not be written; what
            was saved before stays as it was.
        """
        started = time.perf_counter()
        self.wait()
        parts = {name: part for name, tensor in tensors.items() if (part := held(tensor)) is not None}
        layout = self._plan(tensors, parts)
        mine = part_name(self.peers.rank)
        own = {
            piece.key: parts[name][1] for name, entry in layout.items() for piece in entry.pieces if piece.file == mine
        }
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        kept = json.loads(json.dumps(dict(extra)))
        index = Index(step=step, score=score, made=made, extra=kept, tensors=layout, files={})
        if self.background:
            self._under_way = self._writer.submit(self._write, index, self._stage(own))
        else:
            self._write(index, _plain(own))
        return time.perf_counter() - started

    def wait(self) -> None:
        """Until nothing is being written. Raises DanluError, on all ranks, where that could not be finished."""
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            under_way.result()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return _steps(self.home)

    def open(self, step: int | None = None) -> Saved | None:
        """As `open_checkpoint`, after waiting for what is being written."""
        self.wait()
        return open_checkpoint(self.home, step, self.peers)

    def _plan(self, tensors: Mapping[str, Tensor], parts: Mapping[str, tuple[Box, Tensor]]) -> dict[str, Entry]:
        """Who writes what; ranks tell each other what they hold only where that has changed since the last save."""
        listing = describe(tensors, parts)
        listed = self.peers.gather(sha256(canonical(listing).encode()).hexdigest())
        if listed != self._listed:
            self._layout = divide(self.peers.gather(listing))
            self._listed = listed
        return self._layout

    def _stage(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy what is to be written, so that training can change it. The memory serves for all saves to come."""
        self._rooms = {key: _room(tensor, self._rooms.get(key)) for key, tensor in own.items()}
        for key, tensor in own.items():
            self._rooms[key].copy_(tensor, non_blocking=tensor.is_cuda)
        if any(tensor.is_cuda for tensor in own.values()):
            torch.cuda.synchronize()
        return self._rooms

    def _write(self, index: Index, own: Mapping[str, Tensor]) -> None:
        """Write, together with the other ranks, one checkpoint, and remove what is no longer to be kept."""
        aside = self.home / f".{_folder(index.step)}.aside"
        try:
            part = self.peers.together(partial(self._write_part, aside, index.step, own))
            files: dict[str, Any] = {}
            for one in self.peers.gather({name: file.model_dump() for name, file in part.items()}):
                files |= one
            whole = index.model_copy(update={"files": {name: File(**about) for name, about in files.items()}})
            self.peers.first(partial(self._finish, aside, whole))
        except BaseException:
            if self.peers.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise

    def _write_part(self, aside: Path, step: int, own: Mapping[str, Tensor]) -> dict[str, File]:
        """This rank's file, if it has anything to write."""
        try:
            aside.mkdir(parents=True, exist_ok=True)
            name = part_name(self.peers.rank)
            return {name: write_part(aside / name, own)} if own else {}
        except (OSError, SafetensorError) as error:
            raise self._unwritten(step, error) from None

    def _finish(self, aside: Path, index: Index) -> None:
        """Make the checkpoint be, once every rank has written its part. Rank 0 alone does this."""
        try:
            check_files(aside, index.files, contents=False)
            write_index(aside, index)
            sync(aside)
            _put_in_place(aside, self.home / _folder(index.step))
        except (OSError, ValueError) as error:
            raise self._unwritten(index.step, error) from None
        for step in self._superfluous(index.step):
            try:
                _remove(self.home / _folder(step))
            except OSError as error:
                warn(f"{self.home}: the checkpoint of step {step} cannot be removed: {error}")

    def _unwritten(self, step: int, error: Exception) -> DanluError:
        earlier = [found for found in self.steps() if found < step]
        kept = f"the checkpoint of step {earlier[-1]} stays" if earlier else "there is no earlier checkpoint"
        return DanluError(
            f"the checkpoint of step {step} cannot be written ({error}); {kept}",
            where=self.home,
            fix="see that all ranks may write there and that the disk has room, and run the same command again",
        )

    def _superfluous(self, newest: int) -> list[int]:
        """The steps to remove, now that `newest` is whole."""
        later = [step for step in self.steps() if step > newest]
        if later:
            say(f"{self.home}: the run has gone back to step {newest}; removing its later checkpoints, {later}")
        earlier = [step for step in self.steps() if step <= newest]
        scored = sorted((score, step) for step in earlier if (score := _score(self.home / _folder(step))) is not None)
        kept = set(earlier[-self.keep_last :]) | {step for _, step in scored[: self.keep_best]}
        return later + [step for step in earlier if step not in kept]

    def _tidy(self) -> None:
        """Finish or undo what a killed writer was at."""
        for folder in sorted(self.home.glob(".step-*.before")):
            place = self.home / folder.name.removeprefix(".").removesuffix(".before")
            if not place.exists():
                folder.rename(place)
        for folder in [*self.home.glob(".step-*.aside"), *self.home.glob(".step-*.before")]:
            shutil.rmtree(folder)


def open_checkpoint(home: Path, step: int | None = None, peers: Peers | None = None) -> Saved | None:
    """The newest whole checkpoint, or None. Damaged ones are passed over, aloud. With `step`: that one.

    Every file's checksum is compared; with several ranks, which all call this, each takes its share of the files.

    Raises DanluError where the one asked for is missing or damaged, and where a newer Danlu has written it.
    """
    peers = peers or Peers()
    steps = peers.gather(_steps(home))[0]
    if step is not None and step not in steps:
        there = f"there are {', '.join(map(str, steps))}" if steps else "there is none"
        raise DanluError(f"there is no checkpoint of step {step}; {there}", where=home)
    for candidate in reversed(steps) if step is None else [step]:
        folder = home / _folder(candidate)
        found = peers.together(partial(_examine, folder, peers))
        problems = [problem for problem in peers.gather(found if isinstance(found, str) else None) if problem]
        if isinstance(found, Index) and not problems:
            return Saved(folder, found, peers)
        what = f"the checkpoint of step {candidate} is damaged ({problems[0]})"
        if step is not None:
            raise DanluError(what, where=folder, fix="use another one")
        if peers.rank == 0:
            warn(f"{folder}: {what}; using the one before")
    return None


@dataclass(frozen=True)
class Facts:
    """What there is to know of a checkpoint without reading its tensors.

    Attributes:
        bytes, files: on the disk, all files counted.
        made: when, UTC; None where the index cannot be read.
        problem: what is wrong with it, or None.
    """

    step: int
    bytes: int
    files: int
    made: str | None
    score: float | None
    problem: str | None


def list_checkpoints(home: Path, *, contents: bool = False) -> list[Facts]:
    """Every checkpoint of a run, ascending; the run may be under way.

    Args:
        contents: whether checksums are compared, which reads every byte, or only the index and the files' sizes.
    """
    found = (_facts(home / _folder(step), step, contents) for step in _steps(home))
    return [facts for facts in found if facts is not None]


def newest_index(home: Path) -> Index | None:
    """The index of the newest checkpoint whose files have their sizes; nothing else of it is read. None without one."""
    for step in reversed(_steps(home)):
        with suppress(ValueError, DanluError):
            index = read_index(home / _folder(step))
            check_files(home / _folder(step), index.files, contents=False)
            return index
    return None


def verify(home: Path) -> list[tuple[int, str | None]]:
    """Each checkpoint's step and what is wrong with it, if anything; every byte is read."""
    return [(facts.step, facts.problem) for facts in list_checkpoints(home, contents=True)]


def _facts(folder: Path, step: int, contents: bool) -> Facts | None:
    """None where it has just been removed."""
    index, problem = None, None
    try:
        index = read_index(folder)
        check_files(folder, index.files, contents=contents)
    except (ValueError, DanluError) as error:
        problem = error.what if isinstance(error, DanluError) else str(error)
    try:
        sizes = [file.stat().st_size for file in folder.iterdir()]
    except FileNotFoundError:
        return None
    made, score = (index.made, index.score) if index else (None, None)
    return Facts(step, sum(sizes), len(sizes), made, score, problem)


def _examine(folder: Path, peers: Peers) -> Index | str:
    """The index, or what is wrong, with it or with this rank's share of the files."""
    try:
        index = read_index(folder)
        share = sorted(index.files)[peers.rank :: peers.size]
        check_files(folder, {name: index.files[name] for name in share})
    except ValueError as error:
        return str(error)
    return index


def _score(folder: Path) -> float | None:
    """A checkpoint's score, if it can be read and is a number."""
    with suppress(ValueError, DanluError):
        score = read_index(folder).score
        return score if score is not None and math.isfinite(score) else None
    return None


def _steps(home: Path) -> list[int]:
    """The steps that have a folder, ascending."""
    found = (re.fullmatch(r"step-(\d{8,})", folder.name) for folder in home.glob("step-*") if folder.is_dir())
    return sorted(int(match.group(1)) for match in found if match)


def _folder(step: int) -> str:
    return f"step-{step:08d}"


def _put_in_place(aside: Path, place: Path) -> None:
    """Rename a finished folder, over an earlier one of the same step if there is one."""
    before = place.with_name(f".{place.name}.before")
    if place.exists():
        place.rename(before)
    aside.rename(place)
    sync(place.parent)
    shutil.rmtree(before, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Remove a checkpoint; from the first moment on there is none, however far the removing gets."""
    gone = folder.with_name(f".{folder.name}.aside")
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _room(tensor: Tensor, room: Tensor | None) -> Tensor:
    """Memory on the CPU for a copy of a tensor: what there is, if it fits; pinned where that makes copying faster."""
    if room is not None and room.shape == tensor.shape and room.dtype == tensor.dtype:
        return room
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def _plain(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors takes them: contiguous, on the CPU, no two sharing memory; copied only where that needs it."""
    plain, seen = {}, set()
    for key, tensor in own.items():
        made = tensor.cpu().contiguous()
        memory = made.untyped_storage().data_ptr()
        plain[key] = made.clone() if memory in seen else made
        seen.add(memory)
    return plain
