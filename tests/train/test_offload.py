"""Offloading: the same bits with what is not computed with in files; a third of the memory is enough to train in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor

from danlu.data.stream import Batch
from danlu.errors import DanluError
from danlu.model.config import Experts, ModelConfig
from danlu.model.transformer import Decoder
from danlu.plan.plan import Plan
from danlu.train.ema import Average
from danlu.train.mesh import make_mesh
from danlu.train.objective import next_token
from danlu.train.offloading import files as module
from danlu.train.offloading.blocks import Host, offload_activations
from danlu.train.offloading.files import Files, in_file, release
from danlu.train.offloading.offload import Offload, OffloadSettings
from danlu.train.offloading.optimizer import FiledOptimizer
from danlu.train.optimizer import Optimizer, clip, masters_of
from danlu.train.optimizing.settings import OptimizerSettings
from danlu.train.recompute import Recompute, recompute_blocks
from danlu.train.replica import Replica
from danlu.train.state import Checkpoints
from danlu.train.weights import masters_and_copies
from tests.train.ranks import run_ranks

DENSE = ModelConfig(
    vocab_size=128, context=16, width=32, layers=2, heads=4, kv_heads=2, head_width=8, feedforward_width=64, tied=True
)
MIXTURE = replace(DENSE, experts=Experts(4, 2, 32, balance=0.5))
KINDS: list[dict[str, Any]] = [
    {"name": "sgd", "momentum": 0.9},
    {"name": "adamw", "weight_decay": 0.1, "l2": 0.01, "thaw_steps": 1},
    {"name": "adamw", "state": "8bit"},
    {"name": "adafactor"},
    {"name": "muon"},
]
NAMES = [f"{kind['name']}{kind.get('state', '')}" for kind in KINDS]


@pytest.fixture(autouse=True)
def small_things_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALLEST", 2**12)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path / "offload")


def batch(step: int, rows: int = 4) -> Batch:
    tokens = torch.randint(0, 128, (rows, 16), generator=torch.Generator().manual_seed(step))
    return Batch(tokens, tokens.roll(-1, 1), torch.ones(rows, 16, dtype=torch.int32), torch.arange(16).expand(rows, -1))


class Training:
    """A model that learns under some settings of offloading."""

    def __init__(
        self,
        offload: Offload,
        config: ModelConfig = DENSE,
        dtype: torch.dtype = torch.float32,
        plan: Plan | None = None,
        **optimizer: Any,
    ) -> None:
        with offload.making_weights():
            torch.manual_seed(1)
            model = Decoder(config)
            mesh = make_mesh(plan or Plan(micro_batches=2))
            self.replica = Replica(model, [next_token], mesh, rows=4, length=16, dtype=dtype, recompute="full")
            masters, copies = (self.replica.parameters(), {}) if plan else masters_of(model, dtype)
        self.optimizer = offload.make_optimizer(masters, copies, OptimizerSettings(**optimizer))
        with offload.making_state():
            self.average = Average(self.optimizer, 0.9)
        offload.follow(self.replica.models[0])

    def follow(self, steps: range) -> list[float]:
        losses = []
        for step in steps:
            losses.append(float(self.replica.gradients(batch(step), batch(step).count)))
            gradients = self.optimizer.gradients()
            clip(gradients, self.replica.norm(gradients), 0.5)
            self.optimizer.step(1e-2)
            self.optimizer.zero()
            self.average.update()
        return losses

    def state(self) -> dict[str, Tensor]:
        return self.optimizer.state() | self.average.state()


def offload_to(folder: Path, state: str, activations: str = "none") -> Offload:
    return Offload.start(OffloadSettings(state=state, activations=activations), folder)  # type: ignore[arg-type]


def assert_same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        both = [t.to_local() if isinstance(t, DTensor) else t for t in (found[name], tensor)]
        assert torch.equal(*both), name


# --- Files ----------------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.int64]


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from(DTYPES), st.booleans())
def test_what_is_moved_is_the_same(tmp_path_factory, rows: int, columns: int, dtype: torch.dtype, turned: bool) -> None:
    files = Files(tmp_path_factory.getbasetemp() / "moved")
    tensor = torch.randint(0, 200, (rows, columns)).to(dtype)
    tensor = tensor.T if turned else tensor
    moved = files.move(tensor)
    release([moved])
    assert torch.equal(moved, tensor)
    assert moved.stride() == tensor.stride() and moved.dtype == dtype
    assert in_file(moved) == (tensor.nbytes >= module.SMALLEST)
    if in_file(moved):
        before = tensor.clone()
        moved.zero_()
        assert torch.equal(tensor, before), "it is a copy"


def test_what_is_changed_survives_letting_go(files: Files) -> None:
    tensor = files.move(torch.zeros(300, 300))
    tensor.normal_(generator=torch.Generator().manual_seed(0))
    files.ahead([tensor])
    release([tensor, tensor[5:9]])
    assert torch.equal(tensor, torch.zeros(300, 300).normal_(generator=torch.Generator().manual_seed(0)))


def test_memory_that_is_no_file_is_left_alone() -> None:
    tensor = torch.arange(2**16)
    release([tensor, tensor[3:]])
    assert torch.equal(tensor, torch.arange(2**16))


def test_inside_all_that_is_made_lies_in_files(files: Files) -> None:
    with files.keeping():
        layer = nn.Linear(300, 300)
        like = [torch.zeros_like(layer.weight), layer.weight.detach().bfloat16(), layer.weight.detach().clone()]
    made = [layer.weight, *like, layer.weight.detach().view(-1)]
    assert all(in_file(tensor) for tensor in made)
    assert not in_file(layer.bias), "too small"
    assert not in_file(torch.zeros(300, 300))
    torch.manual_seed(3)
    plain = nn.Linear(300, 300)
    with files.keeping():
        torch.manual_seed(3)
        kept = nn.Linear(300, 300)
    assert torch.equal(plain.weight, kept.weight)


def test_files_have_no_names_and_give_their_room_back(files: Files) -> None:
    def mapped() -> bool:
        return str(files.folder) in Path("/proc/self/maps").read_text(encoding="utf-8")

    tensor = files.move(torch.ones(2**16))
    assert list(files.folder.iterdir()) == []
    assert mapped()
    del tensor
    assert not mapped(), "the last that holds the file"


def test_a_full_disk_is_an_error_and_no_crash(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of a mapping that finds no room on the disk ends the process, so room is taken beforehand."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DanluError, match=r"4 MB cannot be put there .*No space left on device"):
        files.move(torch.zeros(10**6))
    assert list(files.folder.iterdir()) == []


def test_more_than_the_disk_has_is_an_error(files: Files) -> None:
    with pytest.raises(DanluError, match="cannot be put there"):
        files.new(torch.Size([2**50]), (1,), torch.uint8)


def test_memory_is_no_disk(tmp_path: Path) -> None:
    if module._file_system(Path("/dev/shm")) != "tmpfs":
        pytest.skip("no tmpfs at /dev/shm")
    folder = Path("/dev/shm") / tmp_path.name
    try:
        with pytest.raises(DanluError, match="lies in memory"):
            Files(folder)
    finally:
        folder.rmdir()


def test_a_folder_without_effect_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder has no effect"):
        OffloadSettings(folder=tmp_path)
    with pytest.raises(ValueError, match="folder has no effect"):
        OffloadSettings(activations="host", folder=tmp_path)


def test_the_host_is_offloaded_to_by_accelerators_alone(tmp_path: Path) -> None:
    for asked in (OffloadSettings(state="host"), OffloadSettings(activations="host")):
        with pytest.raises(DanluError, match="the host computes"):
            Offload.start(asked, tmp_path)
        Offload.start(asked, tmp_path, torch.device("cuda"))


def test_on_accelerators_weights_rest_on_the_host(tmp_path: Path) -> None:
    for state, pinned in (("host", True), ("optimizer", True), ("parameters", False)):
        offload = Offload.start(OffloadSettings(state=state), tmp_path, torch.device("cuda"))
        assert offload.policy(2**20) == CPUOffloadPolicy(pin_memory=pinned)
        with pytest.raises(DanluError, match="the weights rest on the accelerator"):
            offload.make_optimizer({"far": torch.zeros(3, device="meta")}, {}, OptimizerSettings())
    assert not isinstance(offload_to(tmp_path, "parameters").policy(2**20), CPUOffloadPolicy)


def test_pinned_memory_is_bounded(tmp_path: Path) -> None:
    for held, pinned in ((500_000, True), (500_001, False)):  # as much again for the gradients
        settings = OffloadSettings(state="host", activations="host", pinned="1MB")
        offload = Offload.start(settings, tmp_path, torch.device("cuda"))
        assert offload.policy(held) == CPUOffloadPolicy(pin_memory=pinned)
        assert offload.host.take(1_000_000) is not pinned  # and what is left is for activations
    host = Host(100)
    assert host.take(60) and not host.take(60) and host.take(40)
    host.give(60)
    assert host.take(60) and not host.take(1)
    with pytest.raises(ValueError, match="pinned has no effect"):
        OffloadSettings(state="parameters", pinned="1MB")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_pinned_memory_is_given_back_with_what_lies_in_it() -> None:
    host, x = Host(1000), torch.zeros(200, device="cuda")
    kept = [host(x), host(x)]
    assert [one.is_pinned() for one in kept] == [True, False]
    kept.clear()
    assert host.room == 1000


# --- Learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_every_rule_makes_the_same_bits(kind: dict[str, Any], tmp_path: Path) -> None:
    plain = Training(offload_to(tmp_path, "none"), **kind)
    filed = Training(offload_to(tmp_path, "parameters", "files"), **kind)
    assert plain.follow(range(3)) == filed.follow(range(3))
    assert_same_bits(filed.state(), plain.state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=["dense", "mixture"])
@pytest.mark.parametrize("state", ["optimizer", "parameters"])
def test_every_choice_makes_the_same_bits(state: str, config: ModelConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    plain = Training(offload_to(tmp_path, "none"), config, dtype)
    filed = Training(offload_to(tmp_path, state), config, dtype)
    assert plain.follow(range(3)) == filed.follow(range(3))
    assert_same_bits(filed.state(), plain.state())


def test_what_lies_where(tmp_path: Path) -> None:
    for state, dtype, weights in (
        ("optimizer", torch.bfloat16, False),
        ("optimizer", torch.float32, False),
        ("parameters", torch.bfloat16, True),
        ("parameters", torch.float32, True),
    ):
        training = Training(offload_to(tmp_path, state), dtype=dtype)
        training.follow(range(1))
        training.replica.gradients(batch(1), 100)
        large = {name for name, weight in training.replica.parameters().items() if weight.nbytes >= 2 * module.SMALLEST}
        assert large
        for name in large:
            assert in_file(training.replica.parameters()[name]) == weights
            gradient = training.optimizer.masters[name].grad
            assert gradient is not None and in_file(gradient)
        kept = {name for name, tensor in training.state().items() if in_file(tensor)}
        kinds = ("exp_avg", "exp_avg_sq", "average") + (("master",) if weights or dtype == torch.bfloat16 else ())
        assert kept >= {f"{kind}.{name}" for kind in kinds for name in large}


def test_buckets_change_nothing(files: Files) -> None:
    def learn(bucket: int | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(150, 200), nn.Tanh(), nn.Linear(200, 130))
        masters, copies = masters_of(model, torch.bfloat16)
        chosen = OptimizerSettings()
        optimizer = (
            Optimizer(masters, copies, chosen)
            if bucket is None
            else FiledOptimizer(masters, copies, chosen, files=files, bucket=bucket)
        )
        for step in range(3):
            x = torch.randn(8, 150, generator=torch.Generator().manual_seed(step)).bfloat16()
            model(x).square().sum().backward()
            optimizer.step(1e-2)
            optimizer.zero()
        return optimizer.state()

    wanted = learn(None)
    for bucket in (1, 130_000, 2**30):
        assert_same_bits(learn(bucket), wanted)


def test_a_run_goes_on_from_either_kind_of_checkpoint(tmp_path: Path) -> None:
    whole = Training(offload_to(tmp_path, "none"))
    whole.follow(range(2))
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1, background=False)
    checkpoints.save(2, whole.state(), {})
    losses = whole.follow(range(2, 4))
    for state in ("optimizer", "parameters"):
        filed = Training(offload_to(tmp_path, state))
        saved = checkpoints.open()
        assert saved is not None
        saved.read_into(filed.state())
        filed.optimizer.refresh()
        assert filed.follow(range(2, 4)) == losses
        other = Checkpoints(tmp_path / state, 1, background=False)
        other.save(4, filed.state(), {})
        again = other.open()
        assert again is not None
        assert all(torch.equal(again.read(name), tensor) for name, tensor in whole.state().items())


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_activations_elsewhere_change_nothing(recompute: Recompute, files: Files) -> None:
    """To files and to the host: here that is a copy in the same memory, so that it is the copies that are compared."""

    def gradients(away: Callable[[Tensor], Tensor] | None) -> list[Tensor]:
        torch.manual_seed(1)
        model = Decoder(replace(MIXTURE, dropout=0.1))
        recompute_blocks(list(model.blocks), recompute)
        if away is not None:
            offload_activations(list(model.blocks), away)
        loss = next_token(model, batch(0))
        (loss.sum + loss.penalty).backward()
        return [weight.grad for weight in model.parameters() if weight.grad is not None]

    kept: list[Tensor] = []

    def to_files(tensor: Tensor) -> Tensor:
        kept.append(files.move(tensor))
        return kept[-1]

    wanted = gradients(None)
    for away in (Host(2**20), to_files):
        found = gradients(away)
        assert len(found) == len(wanted)
        assert all(map(torch.equal, found, wanted))
    inputs = 4 * 16 * 32 * 4
    assert sum(in_file(tensor) and tensor.nbytes == inputs for tensor in kept) >= MIXTURE.layers


def test_activations_come_back_as_they_were() -> None:
    x = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)).T
    assert torch.equal(Host(0)(x), x)
    assert Host(0)(x).stride() == x.stride()


def spread(home: str) -> None:
    module.SMALLEST = 2**12
    for plan in ({"shard": 2}, {"tensor": 2}, {"data": 2, "zero": 1}):
        runs = []
        for state in ("none", "optimizer", "parameters"):
            offload = offload_to(Path(home), state)
            training = Training(offload, DENSE, torch.float32, Plan(**plan))
            runs.append((training.follow(range(2)), training))
        (wanted, plain), *others = runs
        for losses, training in others:
            assert losses == wanted, plan
            assert_same_bits(training.state(), plain.state())
        if plan != {"data": 2, "zero": 1}:
            moments = [tensor for name, tensor in training.state().items() if name.startswith("exp_avg.")]
            assert any(in_file(tensor) for tensor in moments)
        assert any(in_file(weight) for weight in training.replica.parameters().values()), plan


def test_on_two_processes_too(tmp_path: Path) -> None:
    run_ranks(2, spread, str(tmp_path))


def on_the_host(config: ModelConfig, dtype: torch.dtype, policy: OffloadPolicy) -> tuple[list[Any], set[type]]:
    """Losses and norms of a group of one, whose weights come from where the policy says; and the weights' kinds."""
    torch.manual_seed(1)
    mesh = make_mesh(Plan(micro_batches=2))
    replica = Replica(
        Decoder(config), [next_token], mesh, rows=4, length=16, dtype=dtype, recompute="full", offload=policy
    )
    optimizer = Optimizer(*masters_and_copies(replica, dtype), OptimizerSettings())
    curve = []
    for step in range(3):
        loss = float(replica.gradients(batch(step), batch(step).count))
        gradients = optimizer.gradients()
        norm = replica.norm(gradients)
        clip(gradients, norm, 0.5)
        optimizer.step(1e-2)
        optimizer.zero()
        curve.append((loss, float(norm)))
    return curve, set(map(type, replica.parameters().values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_weights_that_rest_on_the_host_make_the_same_bits_in_one_process(
    config: ModelConfig, dtype: torch.dtype
) -> None:
    """As on one accelerator; here the processor plays both."""
    [(plain, _)] = run_ranks(1, on_the_host, config, dtype, OffloadPolicy())
    [(moved, kinds)] = run_ranks(1, on_the_host, config, dtype, CPUOffloadPolicy(pin_memory=False))
    assert moved == plain and kinds == {DTensor}


# --- The proof ------------------------------------------------------------------------------------------------------

# In its own process: what is held depends on all that was before. RLIMIT_DATA bounds the memory that a process may
# have for itself; mappings of files do not count, since the system takes their memory back whenever it runs short.
SCRIPT = """
import json, resource, sys, threading
from pathlib import Path
import torch
from danlu.data.stream import Batch
from danlu.model.config import ModelConfig
from danlu.model.transformer import Decoder
from danlu.plan.plan import Plan
from danlu.train.mesh import Mesh
from danlu.train.objective import next_token
from danlu.train.offloading.offload import Offload, OffloadSettings
from danlu.train.optimizer import clip, masters_of
from danlu.train.optimizing.settings import OptimizerSettings
from danlu.train.replica import Replica

state, recompute, allowance, folder = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
torch.set_num_threads(1)

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name + ":"))

def watch():
    while not ended.wait(0.002):
        most["own"], most["files"] = max(most["own"], kilobytes("RssAnon")), max(most["files"], kilobytes("RssFile"))

def batch(step):
    tokens = torch.randint(0, 2048, (2, 128), generator=torch.Generator().manual_seed(step))
    return Batch(tokens, tokens.roll(-1, 1), torch.ones(2, 128, dtype=torch.int32), torch.arange(128).expand(2, -1))

most, ended = {"own": 0, "files": 0}, threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
torch.nn.Linear(64, 64)(torch.ones(1, 64)).sum().backward()  # starts autograd's threads
before = {"own": kilobytes("RssAnon"), "files": kilobytes("RssFile")}
if allowance:
    limit = kilobytes("VmData") * 1024 + allowance
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    offload = Offload.start(OffloadSettings(state=state), folder)
    config = ModelConfig(vocab_size=2048, context=128, width=512, layers=4, heads=8, kv_heads=4, head_width=64,
                         feedforward_width=1536, tied=True)
    with offload.making_weights():
        torch.manual_seed(1)
        model = Decoder(config)
        replica = Replica(model, [next_token], Mesh(Plan(micro_batches=2)), rows=2, length=128, recompute=recompute)
        masters, copies = masters_of(model, torch.bfloat16)
    optimizer = offload.make_optimizer(masters, copies, OptimizerSettings())
    del masters
    offload.follow(model)
    losses = []
    for step in range(2):
        losses.append(float(replica.gradients(batch(step), 256)))
        gradients = optimizer.gradients()
        clip(gradients, replica.norm(gradients), 1.0)
        optimizer.step(1e-3)
        optimizer.zero()
    print(json.dumps({"losses": losses, **{name: 1024 * (most[name] - before[name]) for name in most}}))
finally:
    ended.set()
"""


def train_apart(folder: Path, state: str, recompute: str, allowance: int = 0) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", SCRIPT, state, recompute, str(allowance), str(folder)]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much memory is a process's own")
def test_a_third_of_the_memory_is_enough(tmp_path: Path) -> None:
    """With the state in files and blocks recomputed the same losses come out of a third of what training takes."""
    plain = train_apart(tmp_path, "none", "none")
    assert plain.returncode == 0, plain.stderr
    told = json.loads(plain.stdout)
    third = told["own"] // 3
    refused = train_apart(tmp_path, "none", "full", third)
    assert refused.returncode != 0 and "memory" in refused.stderr, "the allowance is held"
    filed = train_apart(tmp_path, "parameters", "full", third)
    assert filed.returncode == 0, filed.stderr
    found = json.loads(filed.stdout)
    assert found["losses"] == told["losses"]
    assert found["own"] <= third
    print(f"training took {told['own'] / 1e6:.0f} MB, and now {found['own'] / 1e6:.0f} MB")
