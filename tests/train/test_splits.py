"""Every way to split the work makes the run that one process makes: losses and gradient norms of 20 steps."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from danlu.data.stream import Batch
from danlu.model.config import Experts, ModelConfig
from danlu.model.initialize import initialize
from danlu.model.transformer import Decoder
from danlu.plan.plan import Plan, Work, check
from danlu.train.compiling import can_compile
from danlu.train.mesh import make_mesh
from danlu.train.objective import next_token
from danlu.train.optimizer import Optimizer
from danlu.train.optimizing.settings import OptimizerSettings
from danlu.train.pipelined import can_zero_bubble
from danlu.train.replica import Replica
from danlu.train.worker import masters_and_copies
from tests.train.ranks import run_ranks

ROWS, LENGTH, WORDS, STEPS = 8, 32, 67, 20
TOLERANCE = 1e-5
SHAPE: dict[str, Any] = {
    "vocab_size": WORDS,  # no multiple of anything
    "width": 32,
    "layers": 4,
    "heads": 4,
    "kv_heads": 2,
    "head_width": 8,
    "feedforward_width": 48,
    "context": 64,
    "qk_norm": True,
}
MIXTURE = Experts(4, 2, 24, normalised=True, shared_width=16, shared_gate=True, balance=0.02, z=0.001)
CONFIGS = {"dense": ModelConfig(**SHAPE, tied=True), "mixture": ModelConfig(**SHAPE, experts=MIXTURE)}
# With eight of what eight processes split. Twice the layers make 2e-5 of a gradient's norm of a first rounding of 1e-7.
EIGHT = SHAPE | {"heads": 8, "kv_heads": 8}
CONFIGS |= {
    "eight": ModelConfig(**EIGHT, tied=True),
    "eight experts": ModelConfig(**EIGHT, experts=replace(MIXTURE, count=8)),
}
PLANS: dict[str, tuple[str, ...]] = {
    "both": (
        "micro_batches=2",
        "data=2",
        "shard=2,zero=1,micro_batches=2",
        "shard=2,zero=2,micro_batches=2",
        "shard=2,zero=3,micro_batches=2",
        "data=2,shard=2",
        "tensor=2",
        "tensor=2,sequence=false",
        "pipeline=2,micro_batches=4",
        "pipeline=2,micro_batches=4,schedule=interleaved,stages=2",
        "pipeline=2,micro_batches=4,schedule=zero-bubble",
        "pipeline=2,micro_batches=4,schedule=zero-bubble,stages=2",
        "context=2",
        "context=2,shard=2",
        "tensor=2,pipeline=2,shard=2,micro_batches=2",
        "tensor=2,context=2,data=2",
    ),
    "mixture": (
        "expert=2",
        "expert=4",
        "expert=2,shard=2",
        "expert=2,tensor=2",
        "expert=2,context=2",
        "expert=2,tensor=2,shard=2",
        "expert=2,pipeline=2,micro_batches=2",
    ),
}
CASES = [(kind, plan) for kind in ("dense", "mixture") for plan in PLANS["both"]] + [
    ("mixture", plan) for plan in PLANS["mixture"]
]


def batch(step: int) -> Batch:
    """Packed rows of two documents and some padding, [ROWS, LENGTH]; only every third word occurs, which is learned."""
    chance = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, WORDS // 3, (ROWS, LENGTH), generator=chance) * 3
    cuts = torch.randint(5, 25, (ROWS, 1), generator=chance)
    places = torch.arange(LENGTH)[None]
    segments = ((places >= cuts).int() + 1) * (places < LENGTH - 3)
    learned = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    targets = torch.full_like(tokens, -100)
    targets[:, :-1] = torch.where(learned, tokens[:, 1:], -100)
    return Batch(tokens, targets, segments, places - torch.where(places >= cuts, cuts, 0))


def curve(kind: str, text: str, **options: Any) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step, as one process of the plan sees them. Args: options: of `Replica`."""
    plan, config = Plan.read(Plan.parse(text)), CONFIGS[kind]
    check(plan, Work(config, ROWS, LENGTH), plan.world)
    mesh, model = make_mesh(plan), Decoder(config)
    initialize(model, "xavier", 3)
    model.train()
    share = ROWS // plan.readers
    replica = Replica(model, [next_token], mesh, rows=share, length=LENGTH, batch=Batch, **options)
    optimizer = Optimizer(*masters_and_copies(replica, torch.float32), OptimizerSettings(learning_rate=1e-3))
    found = []
    for step in range(STEPS):
        whole = batch(step)
        own = slice(mesh.reader * share, (mesh.reader + 1) * share)
        rows = Batch(whole.tokens[own], whole.targets[own], whole.segments[own], whole.positions[own])
        loss = float(mesh.sum(replica.gradients(rows, whole.count))) / whole.count
        found.append((loss, replica.norm(optimizer.gradients())))
        optimizer.step(1e-3)
        optimizer.zero()
    return found


@cache
def alone(kind: str) -> list[tuple[float, float]]:
    return curve(kind, "data=1")


# Of 4 and 8 processes; each two of what they split by stay, with others.
LONG = [(kind, "tensor=2,context=2,data=2") for kind in ("dense", "mixture")] + [
    ("mixture", "expert=2,tensor=2,shard=2")
]
# One way alone on 4 and on 8 processes; what stays on 2 goes the same way through the code.
ALONE = ("data=4", "data=8", "shard=4,zero=2", "shard=4", "shard=8", "pipeline=4,micro_batches=4", "context=4")
ALONE += ("context=8", "tensor=4", "tensor=8")
HIGH = [(kind, plan) for kind in ("eight", "eight experts") for plan in ALONE] + [("eight experts", "expert=8")]


@pytest.mark.parametrize(
    ("kind", "plan"),
    [pytest.param(*case, marks=pytest.mark.soak) if case in LONG + HIGH else case for case in CASES + HIGH],
    ids=[f"{kind}:{plan}" for kind, plan in CASES + HIGH],
)
def test_a_plan_follows_one_process(kind: str, plan: str) -> None:
    if "zero-bubble" in plan and not can_zero_bubble():
        pytest.skip("this torch cannot run zero-bubble pipelines")
    world = Plan.read(Plan.parse(plan)).world
    _follows_alone(kind, run_ranks(world, curve, kind, plan) if world > 1 else [curve(kind, plan)])


@pytest.mark.soak
@pytest.mark.skipif(not can_compile(), reason="no C++ compiler with Python's headers")
def test_compiled_blocks_follow_one_process() -> None:
    _follows_alone("dense", run_ranks(2, compiled_curve, timeout=240))


def compiled_curve() -> list[tuple[float, float]]:
    """With blocks that FSDP gathers and that are computed again for the backward pass."""
    found = curve("dense", "shard=2,micro_batches=2", compiled=True, recompute="full")
    assert counters["stats"]["unique_graphs"] == 1, "blocks do not share one program"
    return found


def _follows_alone(kind: str, curves: list[list[tuple[float, float]]]) -> None:
    """All processes of a plan see the curve of one process alone."""
    assert all(found == curves[0] for found in curves), "the processes do not agree"
    for (loss, norm), (expected, expected_norm) in zip(curves[0], alone(kind), strict=True):
        assert abs(loss - expected) < TOLERANCE
        assert abs(norm - expected_norm) < TOLERANCE * max(1.0, expected_norm)
    assert alone(kind)[-1][0] < alone(kind)[0][0]
