"""Starting in parts: the same bits as a model made whole, in the memory of a part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from danlu.data.stream import Batch
from danlu.model.checkpoint import Checkpoint, StoredModel, save_checkpoint
from danlu.model.config import AnyConfig, Experts, ModelConfig
from danlu.model.gguf import write_gguf
from danlu.model.initialize import initialize, starts
from danlu.model.stored import without_memory
from danlu.model.transformer import Decoder, make_model
from danlu.plan.plan import Plan
from danlu.train.mesh import Mesh, make_mesh
from danlu.train.objective import next_token
from danlu.train.offloading import files as offloaded_files
from danlu.train.offloading.files import in_file
from danlu.train.offloading.offload import Offload, OffloadSettings
from danlu.train.optimizer import Optimizer
from danlu.train.optimizing.parts import local
from danlu.train.optimizing.settings import OptimizerSettings
from danlu.train.pipelined import TIED, can_zero_bubble
from danlu.train.replica import Replica
from danlu.train.storage import Box, held
from danlu.train.weights import masters_and_copies, start_weights
from tests.train.ranks import run_ranks

ROWS, LENGTH, WORDS = 8, 32, 67
SHAPE: dict[str, Any] = {
    "vocab_size": WORDS,  # no multiple of anything
    "width": 32,
    "layers": 4,
    "heads": 4,
    "kv_heads": 2,
    "head_width": 8,
    "feedforward_width": 48,
    "context": 64,
}
MIXTURE = Experts(4, 2, 24, normalised=True, shared_width=16, shared_gate=True, balance=0.02)
CONFIGS = {
    "dense": ModelConfig(**SHAPE, tied=True),
    "mixture": ModelConfig(**SHAPE, experts=MIXTURE),
    "running means": ModelConfig(**SHAPE, norm="batch"),
}
TWO = (
    ("dense", "shard=2"),
    ("dense", "shard=2,zero=1"),
    ("dense", "data=2"),
    ("dense", "tensor=2"),
    ("dense", "pipeline=2,micro_batches=4"),
    ("dense", "pipeline=2,micro_batches=4,schedule=zero-bubble,stages=2"),
    ("dense", "context=2"),
    ("mixture", "expert=2"),
    ("mixture", "shard=2"),
    ("running means", "shard=2"),
)
FOUR = (
    ("dense", "tensor=2,pipeline=2,micro_batches=2"),
    ("dense", "tensor=2,shard=2"),
    ("dense", "pipeline=2,shard=2,micro_batches=4,schedule=interleaved,stages=2"),
    ("dense", "pipeline=2,shard=2,micro_batches=4,schedule=zero-bubble"),
    ("dense", "pipeline=2,shard=2,micro_batches=4,schedule=zero-bubble,stages=2"),
    ("mixture", "expert=2,tensor=2"),
    ("mixture", "expert=2,shard=2"),
)


def batch(step: int) -> Batch:
    tokens = torch.randint(0, WORDS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(100 + step))
    segments = torch.ones(ROWS, LENGTH, dtype=torch.int32)
    return Batch(tokens, tokens.roll(-1, 1), segments, torch.arange(LENGTH).expand(ROWS, -1))


def replica_of(model: nn.Module, mesh: Mesh, **options: Any) -> Replica:
    return Replica(model, [next_token], mesh, rows=ROWS // mesh.plan.readers, length=LENGTH, batch=Batch, **options)


def in_parts(config: AnyConfig, mesh: Mesh, base: Path | None = None, **options: Any) -> Replica:
    """A replica that starts from the meta device."""
    model = without_memory(config)
    makers = starts(model, "xavier", 3) if base is None else StoredModel.open(base).makers()
    replica = replica_of(model, mesh, **options)
    assert all(weight.is_meta for weight in replica.parameters().values())
    start_weights(replica, makers)
    return replica


def at_once(config: AnyConfig, base: Path | None = None) -> nn.Module:
    if base is not None:
        return StoredModel.open(base).load()
    model = make_model(config)
    initialize(model, "xavier", 3)
    return model


def differing(found: Replica, wanted: nn.Module) -> list[str]:
    """The tensors of which a replica holds other bits than a whole model."""
    whole = dict(wanted.state_dict())
    wrong = []
    for learner in found.learners:
        for name, tensor in [*learner.named_parameters(), *learner.named_buffers()]:
            box, own = held(tensor)  # type: ignore[misc]
            name = name.removeprefix("model.")
            if not torch.equal(own, whole[name][box.within(Box((0,) * own.dim(), tuple(whole[name].shape)))]):
                wrong.append(name)
    return wrong


def compare(cases: list[tuple[str, str]], base: Path | None = None) -> dict[str, list[str]]:
    """What starts otherwise in parts, by case; and where its first loss and gradient are not those of one process."""
    wrong = {}
    for kind, text in cases:
        mesh = make_mesh(Plan.read(Plan.parse(text)))
        config = CONFIGS[kind] if base is None else StoredModel.open(base).config
        made = in_parts(config, mesh, base)
        found = differing(made, at_once(config, base))
        if kind != "running means":  # they are those of a process's own rows
            loss, norm = first_step(made)
            expected, expected_norm = first_step(replica_of(at_once(config, base), Mesh()))
            if abs(loss - expected) > 1e-5 or abs(norm - expected_norm) > 1e-4 * expected_norm:
                found.append(f"loss {loss}, not {expected}; norm {norm}, not {expected_norm}")
        if found:
            wrong[f"{kind}:{text}"] = found
    return wrong


def first_step(replica: Replica) -> tuple[float, float]:
    """Loss and norm of the gradient, which stays."""
    mesh, whole = replica.mesh, batch(0)
    share = ROWS // mesh.plan.readers
    own = slice(mesh.reader * share, (mesh.reader + 1) * share)
    rows = Batch(whole.tokens[own], whole.targets[own], whole.segments[own], whole.positions[own])
    loss = float(mesh.sum(replica.gradients(rows, whole.count))) / whole.count
    gradients = {name: weight.grad for name, weight in replica.parameters().items() if weight.grad is not None}
    return loss, replica.norm(gradients)


@pytest.mark.parametrize(("world", "cases"), [(1, (("dense", "data=1"),)), (2, TWO), (4, FOUR)], ids=["1", "2", "4"])
def test_a_start_in_parts_has_the_bits_of_one_at_once(world: int, cases: tuple[tuple[str, str], ...]) -> None:
    runs = [case for case in cases if "zero-bubble" not in case[1] or can_zero_bubble()]
    assert run_ranks(world, compare, runs) == [{}] * world if world > 1 else compare(runs) == {}


def test_a_stored_model_is_read_in_parts(tmp_path: Path) -> None:
    model = Decoder(CONFIGS["dense"])
    initialize(model, "normal", 9)
    save_checkpoint(model, None, tmp_path / "base")
    cases = [("dense", plan) for plan in ("shard=2,tensor=2", "tensor=2,pipeline=2,micro_batches=2")]
    assert run_ranks(4, compare, cases, tmp_path / "base") == [{}] * 4


def test_a_gguf_file_is_read_in_parts(tiny_model: Path, tmp_path: Path) -> None:
    base = Checkpoint.open(tiny_model)
    write_gguf(base.load(), base.tokenizer, tmp_path / "base.gguf", "bf16")
    assert run_ranks(2, compare, [("dense", "tensor=2")], tmp_path / "base.gguf") == [{}] * 2


LARGE = ModelConfig(
    vocab_size=8192, width=512, layers=8, heads=8, kv_heads=8, head_width=64, feedforward_width=2048, context=64
)


def peak(text: str, config: ModelConfig, base: Path | None) -> tuple[int, int, int]:
    """Bytes of memory of its own that a process comes to hold while it starts; of its weights; and of the largest."""
    mesh = make_mesh(Plan.read(Plan.parse(text)))
    in_parts(CONFIGS["dense"], mesh)  # what is loaded and set up once
    own = _own()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM counts from here
    replica = in_parts(config, mesh, base)
    most = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])
    kept = sum(local(weight).nbytes for weight in replica.parameters().values())
    return most * 1024 - own, kept, max(weight.nbytes for weight in without_memory(config).parameters())


def _own() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stored model of 168 MB."""
    model = Decoder(LARGE)
    for weight in model.parameters():
        nn.init.constant_(weight, 0.5)
    save_checkpoint(model, None, path := tmp_path_factory.mktemp("large") / "base")
    return path


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells the most that was held")
@pytest.mark.parametrize("plan", ["shard=4", "tensor=2,pipeline=2,micro_batches=2"])
@pytest.mark.parametrize("stored", [False, True], ids=["drawn", "stored"])
def test_a_start_takes_the_memory_of_a_part(plan: str, stored: bool, large: Path) -> None:
    for most, kept, largest in run_ranks(4, peak, plan, LARGE, large if stored else None):
        assert kept < 50e6, "a quarter of the model"
        assert most < kept + largest + 32e6


def offloaded(folder: Path, text: str) -> list[str]:
    """What is wrong with weights that are to start in files."""
    offloaded_files.SMALLEST = 2**10
    mesh = make_mesh(Plan.read(Plan.parse(text)))
    offload = Offload.start(OffloadSettings(state="parameters"), folder)
    with offload.making_weights():
        made = in_parts(CONFIGS["dense"], mesh)
    found = differing(made, at_once(CONFIGS["dense"]))
    sizes = {name: held(weight)[1].nbytes for name, weight in made.parameters().items()}  # type: ignore[index]
    return found + [name for name, weight in made.parameters().items() if sizes[name] >= 2**10 and not in_file(weight)]


@pytest.mark.parametrize("plan", ["shard=2", "tensor=2"])
def test_weights_start_in_files_where_they_are_to_rest(plan: str, tmp_path: Path) -> None:
    assert run_ranks(2, offloaded, tmp_path / "offload", plan) == [[], []]


def both_ends(dtype: torch.dtype) -> tuple[list[float], int]:
    """Losses under a V pipeline with split matrices; and the steps after which its ends hold other words' vectors."""
    mesh = make_mesh(Plan.read(Plan.parse("tensor=2,pipeline=2,micro_batches=4,schedule=zero-bubble,stages=2")))
    made = in_parts(CONFIGS["dense"], mesh, dtype=dtype)
    optimizer = Optimizer(*masters_and_copies(made, dtype), OptimizerSettings(learning_rate=3e-3))
    losses, apart = [], 0
    for _ in range(6):
        losses.append(first_step(made)[0])
        optimizer.step(3e-3)
        optimizer.zero()
        made.settle()
        ends = [local(model.word_weight) for model in made.models if mesh.place("pipeline") == 0]  # type: ignore[arg-type]
        apart += any(not torch.equal(end, local(optimizer.masters[TIED])) for end in ends)
    return losses, apart


@pytest.mark.skipif(not can_zero_bubble(), reason="this torch cannot run zero-bubble pipelines")
def test_the_ends_of_a_v_hold_one_weight() -> None:
    exact, rounded = (run_ranks(4, both_ends, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert [apart for _, apart in exact + rounded] == [0] * 8
    losses = rounded[0][0]
    assert losses[-1] < losses[0] - 0.2
    assert losses != exact[0][0], "it is computed in bf16"
    assert max(abs(one - other) for one, other in zip(losses, exact[0][0], strict=True)) < 0.02


def rounded_steps(plans: list[str], kind: str) -> dict[str, str]:
    """Plans under which bf16 gives another first loss or gradient than on one process, or no bf16 at all."""
    exact, alone = (first_step(rounding(kind, Mesh(), dtype)) for dtype in (torch.float32, torch.bfloat16))
    wrong = {}
    for text in plans:
        made = rounding(kind, make_mesh(Plan.read(Plan.parse(text))), torch.bfloat16)
        loss, norm = first_step(made)
        if loss == exact[0] or abs(loss - alone[0]) > 0.01 or abs(norm - exact[1]) > 0.03 * exact[1]:
            wrong[text] = f"loss {loss}, norm {norm}; alone {alone}; in fp32 {exact}"
    return wrong


def rounding(kind: str, mesh: Mesh, dtype: torch.dtype) -> Replica:
    """A replica whose weights are kept in fp32 and computed with in a dtype."""
    made = in_parts(CONFIGS[kind], mesh, dtype=dtype)
    masters, _ = masters_and_copies(made, dtype)
    assert all(master.dtype == torch.float32 for master in masters.values())
    return made


@pytest.mark.parametrize(
    ("kind", "plans"),
    [
        (
            "dense",
            (
                *("data=2", "shard=2", "tensor=2", "tensor=2,sequence=false", "context=2"),
                *("pipeline=2,micro_batches=4", "pipeline=2,micro_batches=4,schedule=zero-bubble"),
                "pipeline=2,micro_batches=4,schedule=zero-bubble,stages=2",
            ),
        ),
        ("mixture", ("expert=2", "tensor=2", "pipeline=2,micro_batches=4")),
    ],
)
def test_every_plan_computes_in_bf16(kind: str, plans: tuple[str, ...]) -> None:
    runs = [plan for plan in plans if "zero-bubble" not in plan or can_zero_bubble()]
    assert run_ranks(2, rounded_steps, runs, kind) == [{}, {}]
