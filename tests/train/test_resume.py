"""A run that is cut short and goes on, under the same plan or another, is the run that nobody disturbed."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

from danlu.data.stream import Batch
from danlu.errors import DanluError
from danlu.model.initialize import initialize
from danlu.model.transformer import Decoder
from danlu.plan.plan import Plan
from danlu.train.ema import Average
from danlu.train.loop import Done, Run, Turn, Validation, train
from danlu.train.mesh import Mesh, make_mesh
from danlu.train.objective import next_token
from danlu.train.optimizer import Optimizer
from danlu.train.optimizing.settings import OptimizerSettings, ScheduleSettings
from danlu.train.pipelined import can_zero_bubble
from danlu.train.replica import Replica
from danlu.train.schedule import Schedule
from danlu.train.state import Checkpoints
from danlu.train.worker import masters_and_copies
from tests.train.ranks import run_ranks
from tests.train.test_splits import CONFIGS, LENGTH, ROWS, batch

STEPS, BREAK = 12, 7
PAIRS = [
    ("dense", "shard=4", "tensor=2,pipeline=2,micro_batches=2"),
    ("dense", "pipeline=2,micro_batches=4,schedule=zero-bubble,stages=2", "data=1"),
    ("dense", "data=1", "context=2,tensor=2"),
    ("mixture", "data=2", "expert=4"),
    ("mixture", "expert=2,shard=2", "tensor=2,pipeline=2,shard=2,micro_batches=2"),
]
LONG = [
    ("dense", "tensor=2,pipeline=2,micro_batches=2", "data=2,shard=2"),
    ("mixture", "expert=2,tensor=2", "shard=2"),
]
# Of these the long checks take every ordered pair.
PLANS = {
    "dense": (
        "data=1",
        "shard=4",
        "tensor=2,pipeline=2,micro_batches=2",
        "context=2,shard=2",
        "data=2,tensor=2",
        "pipeline=2,micro_batches=4,schedule=interleaved,stages=2",
    ),
    "mixture": (
        "data=1",
        "expert=4",
        "expert=2,tensor=2",
        "expert=2,context=2",
        "data=2,shard=2",
        "pipeline=2,micro_batches=2",
    ),
}
ALL_PAIRS = [*LONG, *((kind, *pair) for kind, plans in PLANS.items() for pair in permutations(plans, 2))]
CASES = [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.soak) for pair in ALL_PAIRS if pair not in PAIRS)]


class Rows:
    """The rows of a step that a process reads."""

    def __init__(self, mesh: Mesh) -> None:
        self.share = ROWS // mesh.plan.readers
        self.own = slice(mesh.reader * self.share, (mesh.reader + 1) * self.share)

    def batch(self, step: int) -> Batch:
        whole = batch(step)
        return Batch(*(getattr(whole, name)[self.own] for name in ("tokens", "targets", "segments", "positions")))


def go(kind: str, text: str, home: str, steps: int, optimizing: dict[str, Any] | None = None) -> Done:
    """Train until so many steps are done, as one process of a plan."""
    mesh, model = make_mesh(Plan.read(Plan.parse(text))), Decoder(CONFIGS[kind])
    initialize(model, "xavier", 3)
    replica = Replica(model, [next_token], mesh, rows=ROWS // mesh.plan.readers, length=LENGTH, batch=Batch)
    settings = OptimizerSettings(learning_rate=1e-3, **(optimizing or {}))
    optimizer = Optimizer(*masters_and_copies(replica, torch.float32), settings)
    schedule = Schedule(ScheduleSettings(kind="plateau", patience=0, threshold=0.01), 1e-3, STEPS)
    rows = Rows(mesh)
    run = Run(
        replica,
        [Turn(optimizer, schedule.rate, 1.0, Average(optimizer, 0.9))],
        rows,
        steps=steps,
        seed=1,
        checkpoints=Checkpoints(Path(home) / "checkpoints", 2, 1),
        checkpoint_steps=3,
        out=Path(home),
        validation=Validation(
            2,
            lambda: replica.measure([rows.batch(1000)]),
            schedule.observe,
            observed=(schedule.state, schedule.load),
        ),
    )
    return train(run)


def start(kind: str, plan: str, home: Path, steps: int, **optimizing: Any) -> Done:
    world = Plan.read(Plan.parse(plan)).world
    arguments = (kind, plan, str(home), steps, optimizing)
    return go(*arguments) if world == 1 else run_ranks(world, go, *arguments)[0]


def lines(home: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("kind", "before", "after"), CASES)
def test_another_plan_takes_up_the_run(kind: str, before: str, after: str, tmp_path: Path) -> None:
    if "zero-bubble" in before and not can_zero_bubble():
        pytest.skip("this torch cannot run zero-bubble pipelines")
    whole = start(kind, "data=1", tmp_path / "whole", STEPS)
    start(kind, before, tmp_path / "cut", BREAK)
    done = start(kind, after, tmp_path / "cut", STEPS)
    assert done.steps == STEPS and done.why == "finished"
    for mine, expected in zip(lines(tmp_path / "cut"), lines(tmp_path / "whole"), strict=True):
        assert mine["batch"] == expected["batch"]
        assert mine["learning_rate"] == expected["learning_rate"]
        assert abs(mine["loss"] - expected["loss"]) < 1e-5
        if "validation" in expected:  # what is measured because a run ends there, it alone has
            assert abs(mine["validation"] - expected["validation"]) < 1e-5
    assert done.best is not None and whole.best is not None and abs(done.best - whole.best) < 1e-5


@pytest.mark.parametrize(
    ("kind", "plan"),
    [
        ("dense", "data=1"),
        ("dense", "tensor=2,pipeline=2,micro_batches=2"),
        ("mixture", "data=1"),
        pytest.param("dense", "context=2,shard=2", marks=pytest.mark.soak),
        pytest.param("mixture", "tensor=2,pipeline=2,micro_batches=2", marks=pytest.mark.soak),
        pytest.param("mixture", "context=2,shard=2", marks=pytest.mark.soak),
    ],
)
def test_the_same_plan_gives_the_same_bits(kind: str, plan: str, tmp_path: Path) -> None:
    whole = start(kind, plan, tmp_path / "whole", STEPS)
    start(kind, plan, tmp_path / "cut", BREAK)
    assert start(kind, plan, tmp_path / "cut", STEPS) == whole
    told = ("loss", "gradient_norm", "learning_rate", "batch")
    mine, expected = (
        [{name: line.get(name) for name in told} for line in lines(tmp_path / name)] for name in ("cut", "whole")
    )
    assert mine == expected
    one, other = (Checkpoints(tmp_path / name / "checkpoints", 2, 1).open(STEPS) for name in ("whole", "cut"))
    assert one is not None and other is not None
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.names)


def test_another_model_is_refused_by_its_first_tensor(tmp_path: Path) -> None:
    start("dense", "data=1", tmp_path, 3)
    with pytest.raises(DanluError, match=r"head\.weight|blocks\.0"):
        start("mixture", "data=1", tmp_path, 6)
