"""Two halves of a micro-batch by turns: the same losses and gradients, with sums on their way while others compute."""

from __future__ import annotations

import pytest
import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from danlu.errors import DanluError
from danlu.plan.plan import Plan, Work, check
from danlu.train.mesh import Mesh, make_mesh
from danlu.train.optimizer import Optimizer
from danlu.train.optimizing.settings import OptimizerSettings
from danlu.train.pipelined import can_zero_bubble
from danlu.train.weights import masters_and_copies
from tests.train.ranks import run_ranks
from tests.train.test_weights import CONFIGS, LENGTH, ROWS, batch, first_step, in_parts

TWO = ("tensor=2,sequence=false", "tensor=2", "tensor=2,micro_batches=4")
FOUR = (
    *("tensor=2,shard=2", "tensor=2,context=2", "tensor=2,expert=2"),
    "tensor=2,pipeline=2,micro_batches=4",
    "tensor=2,pipeline=2,micro_batches=4,schedule=zero-bubble,stages=2",
)
STEPS = 4


def curve(kind: str, mesh: Mesh) -> list[tuple[float, float]]:
    made = in_parts(CONFIGS[kind], mesh)
    optimizer = Optimizer(*masters_and_copies(made, torch.float32), OptimizerSettings(learning_rate=1e-3))
    found = []
    for _ in range(STEPS):
        found.append(first_step(made))
        optimizer.step(1e-3)
        optimizer.zero()
        made.settle()
    return found


def curves(kinds: tuple[str, ...], plans: list[str]) -> dict[str, str]:
    """What is more than rounding away from one process that computes all rows at once."""
    wrong = {}
    for kind in kinds:
        alone = curve(kind, Mesh())
        for text in plans:
            if kind == "dense" and "expert" in text:
                continue
            found = curve(kind, make_mesh(Plan.read(Plan.parse(text + ",overlap=true"))))
            for (loss, norm), (expected, expected_norm) in zip(found, alone, strict=True):
                if abs(loss - expected) > 1e-5 or abs(norm - expected_norm) > 1e-5 * max(1.0, expected_norm):
                    wrong[f"{kind}:{text}"] = f"{found}, not {alone}"
    return wrong


@pytest.mark.parametrize(("world", "plans"), [(2, TWO), pytest.param(4, FOUR, marks=pytest.mark.soak)])
def test_halves_follow_one_process(world: int, plans: tuple[str, ...]) -> None:
    runs = [plan for plan in plans if "zero-bubble" not in plan or can_zero_bubble()]
    assert run_ranks(world, curves, ("dense", "mixture"), runs) == [{}] * world


def order(text: str) -> tuple[str, str]:
    """What happens in a step, forward and backward: a(ttention) of some rows, w(aiting) for what is under way."""
    made = in_parts(CONFIGS["dense"], make_mesh(Plan.read(Plan.parse(text))))
    seen: list[str] = []
    for block in made.models[0].blocks:  # type: ignore[union-attr]
        block.attention.register_forward_pre_hook(lambda *_: seen.append("a"))
        block.attention.register_full_backward_pre_hook(lambda *_: seen.append("a"))
    wait = AsyncCollectiveTensor.trigger_wait

    def noted(tensor: AsyncCollectiveTensor) -> torch.Tensor:
        if not tensor.completed:
            seen.append("w")
        return wait(tensor)

    AsyncCollectiveTensor.trigger_wait = noted  # type: ignore[method-assign]
    loss, _ = made.learners[0](batch(0), 0)
    forward = "".join(seen)
    seen.clear()
    loss.backward()
    return forward, "".join(seen)


def test_the_second_half_computes_before_the_first_is_waited_for() -> None:
    layers = CONFIGS["dense"].layers
    forward, backward = run_ranks(2, order, "tensor=2,sequence=false,overlap=true")[0]
    assert forward == "aawwww" * layers, "two sums of attention, two of the feed-forward"
    assert backward == "wwaaww" * layers
    assert run_ranks(2, order, "tensor=2,sequence=false")[0] == ("a" * layers, "a" * layers)


def test_overlap_without_an_effect_is_refused() -> None:
    with pytest.raises(DanluError, match="overlap is for matrices that are cut"):
        Plan.read({"overlap": True, "data": 2})
    plan = Plan.read({"overlap": True, "tensor": 2, "micro_batches": 8})
    with pytest.raises(DanluError, match=r"there is one\n.*--plan tensor=2,overlap=true"):
        check(plan, Work(CONFIGS["dense"], ROWS, LENGTH), 2)
