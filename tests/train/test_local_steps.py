"""Local steps, the numbers: parity with plain training and with torch's Nesterov, late deliveries, rounding, plans."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

from danlu.data.stream import Stream
from danlu.model.config import ModelConfig
from danlu.model.initialize import initialize
from danlu.model.transformer import Decoder
from danlu.plan.plan import Plan
from danlu.train.exchange.ledger import Ledger, weigh
from danlu.train.exchange.rows import share_rows
from danlu.train.exchange.settings import ApartSettings, LocalSettings
from danlu.train.local_steps import LocalSteps
from danlu.train.loop import train
from danlu.train.mesh import make_mesh
from danlu.train.objective import next_token
from danlu.train.optimizer import Optimizer, masters_of
from danlu.train.optimizing.settings import OptimizerSettings
from danlu.train.replica import Replica
from tests.train.apart import (
    SHAPE,
    WINDOW,
    Apprentice,
    adam,
    apart,
    close,
    learner,
    lines,
    rounds,
    run_of,
    same,
    settings,
    shared,
    shares,
    synthetic,
    together,
)
from tests.train.ranks import run_ranks


def test_two_workers_with_the_same_rows_are_one(tmp_path: Path) -> None:
    alone = Apprentice(settings(tmp_path / "one"), "a")
    alone.learn(12)
    both = [Apprentice(settings(tmp_path / "two"), name) for name in ("a", "b")]
    together(*(lambda one=one: one.learn(12) for one in both))
    assert same(alone.weights(), both[0].weights()) and same(alone.weights(), both[1].weights())
    assert same(shared(tmp_path / "two"), alone.weights())
    assert [shares(made) for made in rounds(tmp_path / "two")] == [
        [],
        *([("a", number, 1.0), ("b", number, 1.0)] for number in range(4)),
    ]


def test_the_outer_step_is_torchs_nesterov_on_the_mean_of_what_was_learned(tmp_path: Path) -> None:
    chosen = settings(tmp_path, outer_learning_rate=0.6, outer_momentum=0.8)
    workers = [Apprentice(chosen, name, rows=place) for place, name in enumerate("abc")]
    theirs = {name: nn.Parameter(weight) for name, weight in workers[0].weights().items()}
    outer = torch.optim.SGD(theirs.values(), lr=0.6, momentum=0.8, nesterov=True)
    for _ in range(4):
        lone = []
        for place in range(3):
            copy = Apprentice(settings(tmp_path / f"lone{place}-{time.monotonic_ns()}"), "x", rows=place)
            copy.done = workers[place].done
            copy.optimizer.optimizer.load(workers[place].optimizer.optimizer.state())
            copy.optimizer.steps.fill_(-9)  # no exchange
            copy.learn(3)
            lone.append(copy.weights())
        for name, weight in theirs.items():
            weight.grad = weight.detach() - sum(one[name] for one in lone) / 3
        outer.step()
        together(*(lambda one=one: one.learn(3) for one in workers))
        for one in workers:
            assert close(one.weights(), {name: weight.detach() for name, weight in theirs.items()})
    assert all(same(one.weights(), shared(tmp_path)) for one in workers)


def test_what_comes_late_counts_less_and_nobody_waits_for_it(tmp_path: Path) -> None:
    chosen = settings(tmp_path, outer_learning_rate=1.0, outer_momentum=0.0, deadline=1.5, staleness_power=1.0)
    quick, slow = Apprentice(chosen, "a"), Apprentice(chosen, "b", rows=1)
    before = quick.weights()
    began = time.monotonic()
    quick.learn(3)
    assert 1.4 < time.monotonic() - began < 5  # b is waited for, until the deadline
    first = quick.weights()
    slow.learn(2)
    learned = slow.weights()
    slow.learn(1)
    assert int(slow.optimizer.round) == 1 and same(slow.weights(), first)  # at once: a round later is there already
    twin = Apprentice(settings(tmp_path / "twin", local_steps=9), "b", rows=1)
    twin.learn(3)
    assert not same(twin.weights(), learned)
    quick.learn(2)
    twin2 = quick.weights()
    began = time.monotonic()
    quick.learn(1)
    assert time.monotonic() - began < 1.2  # b has delivered
    assert [shares(made) for made in rounds(tmp_path)] == [[], [("a", 0, 1.0)], [("a", 1, 1.0), ("b", 0, 0.5)]]
    own = Apprentice(settings(tmp_path / "own", local_steps=99), "a")
    own.optimizer.optimizer.load(quick.optimizer.optimizer.state())
    assert not same(twin2, quick.weights())
    moved = {name: weight - before[name] for name, weight in twin.weights().items()}
    given = quick.optimizer.given.open(1)
    assert given is not None
    for name, weight in quick.weights().items():
        step = (given.read(f"weight.{name}") - first[name] + 0.5 * moved[name]) / 2
        torch.testing.assert_close(weight, first[name] + step, rtol=0, atol=1e-6)


def test_a_delivery_that_a_round_has_just_missed_is_seen_from_the_next(tmp_path: Path) -> None:
    """It was told against weights that are no longer the newest when it is counted."""
    chosen = settings(tmp_path, outer_learning_rate=1.0, outer_momentum=0.0, deadline=0.3, staleness_power=0.0)
    quick, slow = Apprentice(chosen, "a"), Apprentice(chosen, "b", rows=1)
    before = quick.weights()
    ledger, newest = slow.optimizer.ledger, slow.optimizer.ledger.newest
    quick.learn(3)
    first = quick.weights()
    ledger.newest = lambda: 0  # type: ignore[method-assign]  # b looks a moment too early
    slow.optimizer._meet = lambda: 1  # type: ignore[method-assign]
    slow.learn(3)
    ledger.newest = newest  # type: ignore[method-assign]
    assert ledger.notes().delivered[-1].seen_from == 0
    quick.learn(3)
    mine, others = quick.optimizer.given.open(1), slow.optimizer.given.open(0)
    assert mine is not None and others is not None
    for name, weight in quick.weights().items():
        steps = mine.read(f"weight.{name}") - first[name] + others.read(f"weight.{name}") - before[name]
        torch.testing.assert_close(weight, first[name] + steps / 2, rtol=0, atol=1e-6)


@given(order=st.lists(st.sampled_from("abc"), min_size=1, max_size=8), power=st.sampled_from([0.0, 0.5, 2.0]))
@hypothesis_settings(max_examples=8, deadline=None)
def test_whatever_the_order_everything_delivered_is_counted_once(
    tmp_path_factory: pytest.TempPathFactory, order: list[str], power: float
) -> None:
    home = tmp_path_factory.mktemp("home")
    chosen = settings(home, local_steps=1, deadline=0.02, staleness_power=power)
    workers = {name: Apprentice(chosen, name, rows=place) for place, name in enumerate("abc")}
    for name in order:
        workers[name].learn(1)
        assert same(workers[name].weights(), shared(home))  # whoever has exchanged has the newest
    counted = [(one.delivery, made) for made in rounds(home) for one in made.counted]
    left = Ledger(home, "", 0).pool(len(rounds(home)) - 1)
    dealt = [(one.worker, one.number) for one in [delivery for delivery, _ in counted] + left]
    assert sorted(dealt) == sorted((name, number) for name in set(order) for number in range(order.count(name)))
    for number, made in enumerate(rounds(home)):
        found = tuple(one.delivery for one in made.counted)
        assert made.counted == weigh(found, number - 1, power)


def test_finishing_delivers_what_is_left(tmp_path: Path) -> None:
    one = Apprentice(settings(tmp_path), "a")
    one.learn(4)
    one.optimizer.finish()
    assert [made.counted[0].delivery.steps for made in rounds(tmp_path)[1:]] == [3, 1]
    assert same(one.weights(), shared(tmp_path))


def test_rounding_is_made_up_for_later(tmp_path: Path) -> None:
    """Where weights move the same way all the time, bf16 loses nothing but the last rounding."""
    plain = settings(tmp_path / "fp32", outer_learning_rate=1.0, outer_momentum=0.0, local_steps=1)
    rounded = plain.model_copy(update={"home": tmp_path / "bf16", "compress": "bf16"})
    ends = []
    for chosen in (plain, rounded):
        one = Apprentice(chosen, "a", rule="sgd")
        for _ in range(16):
            for weight in one.model.parameters():
                weight.grad = torch.full_like(weight, 0.7531)
            one.optimizer.step(0.013)
        ends.append(one)
    apart = max(
        float((x - y).abs().max()) for x, y in zip(ends[0].weights().values(), ends[1].weights().values(), strict=True)
    )
    step = 0.7531 * 0.013
    assert apart < step * 2**-8  # one rounding
    lost = abs(float(torch.tensor(step).bfloat16()) - step)
    assert 16 * lost > 2 * step * 2**-8  # what would be lost if each were for good
    bytes_of = [max(file.stat().st_size for file in one.optimizer.given.home.rglob("part-*")) for one in ends]
    assert bytes_of[1] < bytes_of[0]


def test_a_worker_alone_is_plain_training_to_the_bit(tmp_path: Path) -> None:
    rows = synthetic(100, 1)
    plain, stream = learner(rows, 1, 0, 1, 4)
    train(run_of(plain, stream, adam(plain), tmp_path / "plain", 22))
    chosen = settings(tmp_path / "home", local_steps=5, outer_learning_rate=1.0, outer_momentum=0.0)
    ended = apart(tmp_path / "a", chosen, rows, 0, 1, 4, 22)
    assert same(ended, {name: weight.detach() for name, weight in plain.named_parameters()})
    assert [line["loss"] for line in lines(tmp_path / "a")] == [line["loss"] for line in lines(tmp_path / "plain")]
    assert len(rounds(tmp_path / "home")) == 6  # 4 of 5 steps and one of the last 2, after the start


def test_bf16_copies_follow_the_shared_masters(tmp_path: Path) -> None:
    chosen = settings(tmp_path, local_steps=2)
    model, stream = learner(synthetic(40, 1), 1, 0, 1, 4)
    optimizer = LocalSteps(Optimizer(*masters_of(model, torch.bfloat16), OptimizerSettings()), chosen, "a")
    train(run_of(model, stream, optimizer, tmp_path / "run", 4))
    for name, weight in model.named_parameters():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, shared(tmp_path)[name].bfloat16())


def sharded(name: str, chosen: LocalSettings, place: int, plan: str) -> tuple[dict[str, Tensor], int]:
    """A worker whose processes share its weights out; returns them whole, and where it ended."""
    mesh = make_mesh(Plan.model_validate(Plan.parse(plan)))
    model = Decoder(ModelConfig(**SHAPE))
    initialize(model, "normal", 5)
    readers = mesh.plan.readers
    wider = share_rows(mesh, ApartSettings(home=chosen.home, worker=place, workers=2))
    stream = Stream(synthetic(60, 1), 8, 1, wider.reader, wider.plan.readers)
    replica = Replica(model, [next_token], mesh, rows=4 // readers, length=WINDOW)
    with LocalSteps(Optimizer(dict(replica.parameters()), {}, OptimizerSettings()), chosen, name) as optimizer:
        for step in range(9):
            batch = stream.batch(step)
            replica.gradients(batch, batch.count * readers)
            optimizer.step(1e-3)
            optimizer.zero()
        optimizer.load(optimizer.state())
        weights = optimizer.masters
        whole = {key: w.full_tensor() if hasattr(w, "full_tensor") else w for key, w in weights.items()}
    return {key: weight.detach().clone() for key, weight in whole.items()}, int(optimizer.round)


@pytest.mark.parametrize("plan", ["shard=2", "tensor=2"])
def test_workers_may_have_different_plans(tmp_path: Path, plan: str) -> None:
    ends = []
    for home, plans in ((tmp_path / "alike", ("data=1", "data=1")), (tmp_path / "apart", ("data=1", plan))):
        chosen = settings(home, workers=2, local_steps=3)
        works = [
            lambda name=name, place=place, text=text, chosen=chosen: run_ranks(
                make_world(text), sharded, name, chosen, place, text
            )
            for place, (name, text) in enumerate(zip("ab", plans, strict=True))
        ]
        found = [one for ranks in together(*works) for one in ranks]
        assert all(close(found[0][0], weights, 0.0) and number == 3 for weights, number in found)
        ends.append(found[0][0])
    assert close(ends[0], ends[1], 1e-5)


def make_world(plan: str) -> int:
    return Plan.model_validate(Plan.parse(plan)).world
