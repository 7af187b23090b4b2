"""What a step waits for: told apart from what it computes, seldom enough, and without changing a bit."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from danlu.plan.plan import Plan
from danlu.train.mesh import make_mesh
from danlu.train.waiting import SHARE, Lookout, without
from danlu.train.watch import Clock
from tests.train.ranks import run_ranks
from tests.train.test_weights import CONFIGS, first_step, in_parts

SPANS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)).map(lambda pair: (pair[0], pair[0] + pair[1])))


@given(SPANS, SPANS)
def test_what_is_left_of_time_is_what_nothing_else_covers(spans: list[Any], others: list[Any]) -> None:
    left = without(spans, others)
    assert all(start < end for start, end in left)
    assert all(one[1] <= other[0] for one, other in pairwise(left))

    def covered(some: list[Any], moment: int) -> bool:
        return any(start <= moment < end for start, end in some)

    for moment in range(40):
        assert covered(left, moment) == (covered(spans, moment) and not covered(others, moment))


class Late(torch.autograd.Function):
    """Asks another process for something on the way there and back; that one answers late."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, late: float) -> Tensor:
        ctx.late = late
        return ask(x, late)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ask(gradient, 2 * ctx.late), None


def ask(x: Tensor, late: float) -> Tensor:
    dist.barrier()  # however busy the machine is, the first process comes first
    if dist.get_rank() == 1:
        time.sleep(late)
    x = x.clone()
    dist.all_reduce(x)
    return x


def waited() -> dict[str, float]:
    """Phases of a step in which the first process waits 0.2 s forward and 0.4 s backward, and also computes."""
    clock = Clock()
    lookout = Lookout(clock, torch.device("cpu"))
    lookout.spent = 0.0  # it is time
    ask(torch.ones(1), 0.0)  # both are here
    with lookout.step():
        with clock.phase("forward"):
            weight = torch.randn(700, 700, requires_grad=True)
            y = Late.apply(weight @ weight, 0.2)
        with clock.phase("backward"):
            (y @ weight).sum().backward()
    return clock.take()


def test_waiting_is_told_apart_in_each_phase() -> None:
    phases = run_ranks(2, waited)[0]
    assert 0.1 < phases["waiting in forward"] < phases["forward"]
    assert 0.2 < phases["waiting in backward"] < phases["backward"]


def overlapped() -> dict[str, float]:
    """Phases of a step that computes while something is under way."""
    clock = Clock()
    lookout = Lookout(clock, torch.device("cpu"))
    lookout.spent = 0.0
    weight = torch.randn(1500, 1500)
    ask(torch.ones(1), 0.0)
    with lookout.step(), clock.phase("forward"):
        if dist.get_rank() == 1:
            time.sleep(0.05)
        sent = dist.all_reduce(torch.ones(3), async_op=True)
        if dist.get_rank() == 0:
            until = time.perf_counter() + 0.2
            while time.perf_counter() < until:
                weight @ weight
        sent.wait()
    return clock.take()


def test_what_is_hidden_by_computing_is_no_waiting() -> None:
    phases = run_ranks(2, overlapped)[0]
    assert phases["waiting in forward"] < 0.1 * phases["forward"]


def losses(plan: str, watched: bool) -> tuple[list[tuple[float, float]], list[str]]:
    """Losses and norms of a few steps, and what the last one's phases are."""
    made = in_parts(CONFIGS["dense"], make_mesh(Plan.read(Plan.parse(plan))))
    found = []
    for _ in range(3):
        if watched and made.lookout is not None:
            made.lookout.spent = 0.0
        made.clock.take()
        found.append(first_step(made))
    return found, sorted(made.clock.take())


@pytest.mark.parametrize("plan", ["shard=2", "tensor=2", "pipeline=2,micro_batches=4"])
def test_watching_changes_no_bit(plan: str) -> None:
    (plain, phases), (seen, more) = (run_ranks(2, losses, plan, watched)[0] for watched in (False, True))
    assert plain == seen
    names = ["forward and backward"] if "pipeline" in plan else ["backward", "forward"]
    assert set(more) - set(phases) == {f"waiting in {name}" for name in names}


def test_looks_take_their_share_of_the_time_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that the test turns: a step takes 2 s, and 3 s more when it is watched."""
    now = [0.0]
    monkeypatch.setattr("danlu.train.waiting.time.perf_counter", lambda: now[0])
    clock, looks = Clock(), []
    lookout = Lookout(clock, torch.device("cpu"))
    for step in range(5000):
        with lookout.step():
            watched = clock._marks
            now[0] += 5.0 if watched else 2.0
        if watched:
            looks.append(step)
    assert looks[0] == 15, "not at once"
    assert 7 <= len(looks) <= 10
    assert 3.0 * len(looks) <= SHARE * now[0]
