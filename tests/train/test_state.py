"""Checkpoints of one process and of several: any plan reads any other's, and nothing whole is ever lost."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from danlu.errors import DanluError
from danlu.train import state
from danlu.train.state import Checkpoints, list_checkpoints, open_checkpoint, verify
from danlu.train.storage import INDEX, VERSION, File, part_name
from tests.train.ranks import PRELOADED, run_ranks

SMALL = {"x": torch.arange(10.0)}


def folder(home: Path, step: int) -> Path:
    return home / f"step-{step:08d}"


def hidden(home: Path) -> list[str]:
    return [file.name for file in home.iterdir() if file.name.startswith(".")]


def damage(file: Path, how: str) -> None:
    """Cut a file short, flip one of its bits, or take it away."""
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
        return
    if how == "flipped":
        content[len(content) // 2] ^= 4
    file.write_bytes(content[:-9] if how == "cut" else content)


# --- One process ----------------------------------------------------------------------------------------------------


def everything() -> dict[str, Tensor]:
    """One tensor of every kind."""
    made = torch.randn(7, 5, generator=torch.Generator().manual_seed(3)) * 50
    kinds = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool)
    tensors = {str(dtype): made.to(dtype) for dtype in kinds}
    return tensors | {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "turned": made.t(),
        "tied": made,
        "again": made,
        "炼丹": torch.tensor([-0.0, float("nan"), float("inf")]),
    }


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("background", [True, False])
def test_everything_comes_back_bit_for_bit(tmp_path: Path, background: bool) -> None:
    tensors = everything()
    checkpoints = Checkpoints(tmp_path, 2, background=background)
    assert checkpoints.open() is None
    checkpoints.save(3, tensors, {"plateau": {"best": 0.1 + 0.2}, "text": "丹"})
    saved = checkpoints.open()
    assert saved is not None and saved.step == 3 and saved.extra == {"plateau": {"best": 0.1 + 0.2}, "text": "丹"}
    assert saved.names == {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    found = {name: torch.ones_like(tensor) for name, tensor in tensors.items()}
    saved.read_into(found)
    for name, tensor in tensors.items():
        assert bits(found[name]) == bits(saved.read(name)) == bits(tensor)
    assert sorted(file.name for file in folder(tmp_path, 3).iterdir()) == [INDEX, part_name(0)]
    assert load_file(folder(tmp_path, 3) / part_name(0)).keys() == tensors.keys() - {"empty"}


def test_what_changes_after_save_is_saved_as_it_was(tmp_path: Path) -> None:
    """The optimizer goes on while a thread writes: neither tensors nor the small things follow it."""
    weight, small = torch.zeros(2_000_000), {"losses": [1.0]}
    checkpoints = Checkpoints(tmp_path, 5)
    for step in range(1, 4):
        checkpoints.save(step, {"w": weight}, small)
        weight += 1
        small["losses"].append(0.0)
    for step in range(1, 4):
        saved = checkpoints.open(step)
        assert saved is not None and torch.equal(saved.read("w"), torch.full((2_000_000,), step - 1.0))
        assert len(saved.extra["losses"]) == step


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=2)
    scores = [3.0, 1.0, None, 2.0, float("nan"), 5.0, 6.0]
    for step, score in enumerate(scores, 1):
        checkpoints.save(step, SMALL, {}, score)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 6, 7]
    assert [(facts.step, facts.score) for facts in list_checkpoints(tmp_path)] == [(2, 1), (4, 2), (6, 5), (7, 6)]
    assert not hidden(tmp_path)


def test_order_is_by_number_whatever_the_clock_says(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 3)
    for step in (1, 2, 100_000_000):
        checkpoints.save(step, SMALL, {})
        checkpoints.wait()
        os.utime(folder(tmp_path, step), (1e9 / step, 1e9 / step))
    saved = checkpoints.open()
    assert saved is not None and saved.step == 100_000_000
    checkpoints.save(100_000_001, SMALL, {})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 100_000_000, 100_000_001]


def test_a_run_that_goes_back_leaves_its_later_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Else the next start would go on with a course that was given up."""
    checkpoints = Checkpoints(tmp_path, 3)
    for step in (2, 4, 6):
        checkpoints.save(step, SMALL, {})
    assert checkpoints.open(2) is not None
    checkpoints.save(3, SMALL, {})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3]
    assert "removing its later checkpoints, [4, 6]" in capsys.readouterr().err


def test_a_step_saved_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 3)
    for value in (1.0, 2.0):
        checkpoints.save(5, {"x": torch.tensor(value)}, {})
    saved = checkpoints.open()
    assert saved is not None and saved.read("x") == 2 and not hidden(tmp_path)


def test_what_a_killed_writer_left_is_tidied(tmp_path: Path) -> None:
    """Between the two renames that replace a checkpoint, the old one has no name of its own: it gets it back."""
    checkpoints = Checkpoints(tmp_path, 3)
    for step in (1, 2):
        checkpoints.save(step, SMALL, {})
    checkpoints.wait()
    folder(tmp_path, 2).rename(tmp_path / ".step-00000002.before")
    (tmp_path / ".step-00000003.aside").mkdir()
    (tmp_path / ".step-00000003.aside" / part_name(0)).write_bytes(b"half")
    (tmp_path / ".step-00000001.before").mkdir()
    assert open_checkpoint(tmp_path) is not None and len(hidden(tmp_path)) == 3, "looking changes nothing"
    assert Checkpoints(tmp_path, 3).steps() == [1, 2] and not hidden(tmp_path)
    assert verify(tmp_path) == [(1, None), (2, None)]


@pytest.mark.parametrize("what", [INDEX, part_name(0)])
@pytest.mark.parametrize("how", ["cut", "flipped", "missing"])
def test_a_damaged_one_is_passed_over_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, how: str
) -> None:
    checkpoints = Checkpoints(tmp_path, 3)
    for step in (1, 2, 3):
        checkpoints.save(step, SMALL, {"step": step})
    checkpoints.wait()
    damage(folder(tmp_path, 3) / what, how)
    saved = checkpoints.open()
    assert saved is not None and (saved.step, saved.extra) == (2, {"step": 2})
    assert "the checkpoint of step 3 is damaged" in capsys.readouterr().err
    found = verify(tmp_path)
    assert found[:2] == [(1, None), (2, None)] and what in str(found[2][1])
    with pytest.raises(DanluError, match=f"the checkpoint of step 3 is damaged.*{what}"):
        checkpoints.open(3)
    checkpoints.save(3, SMALL, {})
    checkpoints.wait()
    assert verify(tmp_path) == [(1, None), (2, None), (3, None)]


def test_the_list_says_what_is_there(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 3)
    for step in (1, 2):
        checkpoints.save(step, SMALL, {}, score=step / 2)
    checkpoints.wait()
    damage(folder(tmp_path, 2) / part_name(0), "flipped")
    one, two = list_checkpoints(tmp_path)
    assert (one.step, one.files, one.score, one.problem, two.problem) == (1, 2, 0.5, None, None)
    assert one.bytes == sum(file.stat().st_size for file in folder(tmp_path, 1).iterdir())
    assert one.made is not None and one.made.endswith("Z")
    assert list_checkpoints(tmp_path, contents=True)[1].problem == f"{part_name(0)} differs from its checksum"
    assert list_checkpoints(tmp_path / "nowhere") == [] and open_checkpoint(tmp_path / "nowhere") is None


def test_one_that_is_not_there_or_too_new_is_an_error(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 3)
    with pytest.raises(DanluError, match="there is no checkpoint of step 9; there is none"):
        checkpoints.open(9)
    for step in (1, 2):
        checkpoints.save(step, SMALL, {})
    with pytest.raises(DanluError, match="there is no checkpoint of step 9; there are 1, 2"):
        checkpoints.open(9)
    index = folder(tmp_path, 2) / INDEX
    index.write_text(json.dumps(json.loads(index.read_text()) | {"version": VERSION + 1}))
    with pytest.raises(DanluError, match=f"is of format {VERSION + 1}"):
        checkpoints.open()
    assert "is of format" in str(verify(tmp_path)[1][1])


@pytest.mark.parametrize(
    ("tensor", "complaint"),
    [
        (torch.ones(3), r"holds w as float32 \[2, 2\], and it is to be read as float32 \[3\]"),
        (torch.ones(2, 2, dtype=torch.bfloat16), r"holds w as float32 \[2, 2\], and .* bfloat16 \[2, 2\]"),
        (None, "holds no tensor other"),
    ],
)
def test_another_models_checkpoint_is_refused_untouched(tmp_path: Path, tensor: Tensor | None, complaint: str) -> None:
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(1, {"fine": torch.zeros(2), "w": torch.zeros(2, 2)}, {})
    saved = checkpoints.open()
    assert saved is not None
    fine = torch.ones(2)
    with pytest.raises(DanluError, match=complaint):
        saved.read_into({"fine": fine} | ({"other": torch.ones(1)} if tensor is None else {"w": tensor}))
    assert torch.equal(fine, torch.ones(2))
    with pytest.raises(DanluError, match="holds no tensor other"):
        saved.read("other")


# --- A disk that is full --------------------------------------------------------------------------------------------


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond 500 kB: the error comes from the kernel, in the midst of writing."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def assert_survives(home: Path, checkpoints: Checkpoints, large: dict[str, Tensor]) -> None:
    """A save that does not fit is an error, loses nothing, leaves nothing, and is not the last."""
    checkpoints.save(1, SMALL, {})
    with pytest.raises(DanluError, match=r"step 2 cannot be written.*the checkpoint of step 1 stays"):
        checkpoints.save(2, large, {})
        checkpoints.wait()
    assert verify(home) == [(1, None)] and not hidden(home)
    checkpoints.save(3, SMALL, {})
    checkpoints.wait()
    assert verify(home) == [(1, None), (3, None)]


@pytest.mark.parametrize("background", [True, False])
def test_a_file_that_cannot_grow_loses_nothing(tmp_path: Path, small_files: None, background: bool) -> None:
    assert_survives(tmp_path, Checkpoints(tmp_path, 3, background=background), {"x": torch.zeros(1_000_000)})


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_loses_nothing(tmp_path: Path, background: bool) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system of a size can be mounted here: {mounted.stderr.strip()}")
    try:
        assert_survives(disk, Checkpoints(disk, 3, background=background), {"x": torch.zeros(1_000_000)})
    finally:
        subprocess.run(["umount", disk], check=True)


def test_what_fails_behind_is_said_at_the_next_save(tmp_path: Path, small_files: None) -> None:
    checkpoints = Checkpoints(tmp_path, 3)
    checkpoints.save(1, {"x": torch.zeros(1_000_000)}, {})
    with pytest.raises(DanluError, match="step 1 cannot be written"):
        checkpoints.save(2, SMALL, {})
    checkpoints.save(2, SMALL, {})
    checkpoints.wait()
    assert verify(tmp_path) == [(2, None)]


def test_home_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    checkpoints = Checkpoints(tmp_path / "home", 1)
    checkpoints.save(1, SMALL, {})
    with pytest.raises(DanluError, match=r"cannot be written.*there is no earlier checkpoint"):
        checkpoints.wait()


# --- Several processes ----------------------------------------------------------------------------------------------

Plan = tuple[int, int, int]  # replicate, shard, tensor
ROWS = (7, 9, 1)  # of 7 over 3 x 2 the last rank of one half has a row, and that of the other has none


def weight(rows: int) -> Tensor:
    return torch.arange(rows * 3.0).view(rows, 3) + rows / 16


def spread(plan: Plan, fill: bool) -> dict[str, Tensor]:
    """A model's tensors under a plan: cut by FSDP2 over tensor parallelism, and plain."""
    replicate, _, tensor = plan
    mesh = init_device_mesh("cpu", plan, mesh_dim_names=("replicate", "shard", "tensor"))
    tensors: dict[str, Tensor] = {}
    for rows in ROWS:
        for dim in (0, 1):
            layer = nn.Linear(3, rows, bias=False)
            layer.weight = nn.Parameter(weight(rows) if fill else torch.full((rows, 3), -1.0))
            if tensor > 1:
                split = distribute_tensor(layer.weight.detach(), mesh["tensor"], [Shard(dim)])
                layer.weight = nn.Parameter(split)
            fully_shard(layer, mesh=mesh["replicate", "shard"] if replicate > 1 else mesh["shard"])
            tensors[f"w{rows}.{dim}"] = layer.weight
    return tensors | {"step": torch.tensor(5.0 if fill else 0.0)}


def save_under(plan: Plan, home: Path) -> None:
    checkpoints = Checkpoints(home, 2)
    stage = dist.get_rank() // 2
    only = {f"only.{stage}": torch.full((2, 2), float(stage))}  # as a pipeline's stages have
    checkpoints.save(1, spread(plan, fill=True) | only, {"rank": dist.get_rank()})
    checkpoints.wait()


def read_under(plan: Plan, home: Path) -> None:
    """Compare each of this rank's parts with a fresh cut of the same values."""
    saved = Checkpoints(home, 2).open()
    assert saved is not None and saved.extra == {"rank": 0}
    found, right = spread(plan, fill=False), spread(plan, fill=True)
    saved.read_into(found)
    for name in right:
        assert torch.equal(local(found[name]), local(right[name])), (plan, name)


def save_and_read(home: Path, writers: list[Plan], readers: list[Plan]) -> None:
    for number, writer in enumerate(writers):
        save_under(writer, home / str(number))
        for reader in readers:
            read_under(reader, home / str(number))


def local(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def test_any_plan_reads_what_another_wrote(tmp_path: Path) -> None:
    plans = [(1, 2, 2), (2, 1, 2), (1, 4, 1)]
    run_ranks(4, save_and_read, tmp_path, plans[:2], plans)
    for number in range(2):
        assert_written_once(tmp_path / str(number), stages=2)


def test_halves_that_do_not_divide(tmp_path: Path) -> None:
    run_ranks(6, save_and_read, tmp_path, [(1, 3, 2)], [(1, 3, 2), (3, 2, 1)])
    assert_written_once(tmp_path / "0", stages=3)


def assert_written_once(home: Path, stages: int) -> None:
    """One process reads every tensor whole, and the files hold each element one time."""
    saved = open_checkpoint(home)
    assert saved is not None and saved.extra == {"rank": 0}
    for rows, dim in itertools.product(ROWS, (0, 1)):
        assert torch.equal(saved.read(f"w{rows}.{dim}"), weight(rows))
    for stage in range(stages):
        assert torch.equal(saved.read(f"only.{stage}"), torch.full((2, 2), float(stage)))
    written = [tensor for file in folder(home, 1).glob("*.safetensors") for tensor in load_file(file).values()]
    sizes = [torch.Size(shape).numel() for shape, _ in saved.names.values()]
    assert sum(tensor.numel() for tensor in written) == sum(sizes)


def full_on_one_rank(home: Path, background: bool) -> list[str]:
    """Saves of which the second does not fit, on rank 1 alone; what this rank was told, and what was left then."""
    rank = dist.get_rank()
    checkpoints = Checkpoints(home, 3, background=background)
    tensors = {f"w{rank}": torch.full((50_000,), float(rank))}
    checkpoints.save(1, tensors, {})
    checkpoints.wait()
    write_part, told = state.write_part, []

    def fills_the_disk(file: Path, tensors: Mapping[str, Tensor]) -> File:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if rank == 1:
        state.write_part = fills_the_disk
    try:
        checkpoints.save(2, tensors, {})
        checkpoints.wait()
    except DanluError as error:
        told.append(str(error))
    state.write_part = write_part
    if rank == 0:
        told += hidden(home)
    checkpoints.save(3, tensors, {})
    checkpoints.wait()
    return told


def differ_about_a_tensor(home: Path) -> str:
    """What is said where two ranks hold different tensors of one name."""
    with pytest.raises(DanluError) as told:
        Checkpoints(home, 3).save(1, {"w": torch.ones(2 + dist.get_rank())}, {})
    return str(told.value)


def open_and_mismatch(home: Path) -> tuple[int, str, float]:
    """Damage that only rank 1 finds, then a shape that only rank 1 finds wrong: the step opened, and what is said."""
    rank = dist.get_rank()
    checkpoints = Checkpoints(home, 3)
    for step in (1, 2):
        checkpoints.save(step, {"x": torch.ones(3), "other": torch.ones(2)}, {})
    checkpoints.wait()
    if rank == 1:
        damage(folder(home, 2) / part_name(1), "flipped")
    dist.barrier()
    saved = checkpoints.open()
    assert saved is not None
    room = torch.zeros(3)
    with pytest.raises(DanluError) as told:
        saved.read_into({"x": room, "other": torch.zeros(2 + rank)})
    return saved.step, str(told.value), float(room.sum())


def fail_in_turn(home: Path) -> dict[str, Any]:
    return {
        "full": full_on_one_rank(home / "full", background=False),
        "full behind": full_on_one_rank(home / "behind", background=True),
        "differ": differ_about_a_tensor(home / "differ"),
        "damage": open_and_mismatch(home / "damage"),
    }


def test_ranks_fail_together(tmp_path: Path) -> None:
    """Whatever goes wrong on one rank, all say the same and none is left waiting."""
    one, other = run_ranks(2, fail_in_turn, tmp_path)
    assert one == other
    for found in (one["full"], one["full behind"]):
        assert len(found) == 1
        assert (
            "step 2 cannot be written ([Errno 28] No space left on device); the checkpoint of step 1 stays" in found[0]
        )
    assert verify(tmp_path / "full") == verify(tmp_path / "behind") == [(1, None), (3, None)]
    assert one["differ"] == "w: is float32 [2] on one rank and float32 [3] on rank 1"
    step, said, changed = one["damage"]
    assert step == 1 and "holds other as float32 [2], and it is to be read as float32 [3]" in said and not changed


# --- kill -9 --------------------------------------------------------------------------------------------------------

KILLS = 10
COUNT = 2


def value(step: int) -> Tensor:
    return torch.arange(500_000.0).view(1000, 500) + step


def keep_saving(home: Path, store: Path, rank: int) -> None:
    """A run that checkpoints after every step: check what it finds, go on from there, until it is killed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=COUNT)
    mesh = init_device_mesh("cpu", (COUNT,))
    weight = distribute_tensor(torch.zeros(1000, 500), mesh, [Shard(0)])
    count = torch.zeros(())
    checkpoints = Checkpoints(home, keep_last=2)
    saved = checkpoints.open()
    step = 0
    if saved is not None:
        saved.read_into({"w": weight, "count": count})
        step = saved.step
        assert torch.equal(weight.to_local(), value(step).chunk(COUNT)[rank]) and count == step
    while True:
        step += 1
        weight.to_local().copy_(value(step).chunk(COUNT)[rank])
        count.fill_(step)
        checkpoints.save(step, {"w": weight, "count": count}, {"step": step})


def test_kill_at_any_moment_loses_nothing_whole(tmp_path: Path) -> None:
    """One rank killed and then the rest, or all at once: the newest checkpoint is whole, and no older than it was."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    home, chance, newest = tmp_path / "home", random.Random("炉"), 0
    home.mkdir()
    torn = 0
    for kill in range(KILLS):
        ranks = [
            context.Process(target=keep_saving, args=(home, tmp_path / f"store{kill}", rank)) for rank in range(COUNT)
        ]
        for process in ranks:
            process.start()
        wait_for_step(home, newest + 2, ranks)
        time.sleep(chance.uniform(0, 0.1))
        chance.shuffle(ranks)
        for process in ranks:
            process.kill()
            time.sleep(chance.choice([0, 0.05]))
        for process in ranks:
            process.join()
        assert ranks[0].exitcode == -signal.SIGKILL
        torn += len(hidden(home))
        facts = list_checkpoints(home, contents=True)
        assert [one.problem for one in facts] == [None] * len(facts)
        assert facts[-1].step >= newest + 2
        newest = facts[-1].step
        saved = open_checkpoint(home)
        assert saved is not None and saved.extra == {"step": newest} and torch.equal(saved.read("w"), value(newest))
    assert torn, "none of the kills came in the midst of a save"
    Checkpoints(home, keep_last=2)
    assert not hidden(home)


def wait_for_step(home: Path, step: int, ranks: list[Any]) -> None:
    """Until a run has got so far."""
    deadline = time.monotonic() + 60
    while all(one.step < step for one in list_checkpoints(home)):
        assert time.monotonic() < deadline and all(process.exitcode is None for process in ranks)
        time.sleep(0.002)
