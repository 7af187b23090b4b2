"""Local steps: parity with plain training and with torch's Nesterov, late and damaged deliveries, kills and joins."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

from danlu.data.stream import Rows, Stream
from danlu.errors import DanluError
from danlu.model.config import ModelConfig
from danlu.model.initialize import initialize
from danlu.model.transformer import Decoder
from danlu.plan.plan import Plan
from danlu.train.exchange import roster
from danlu.train.exchange.ledger import Delivery, Ledger, Round, weigh
from danlu.train.exchange.roster import Roster
from danlu.train.exchange.settings import LocalSettings
from danlu.train.local_steps import LocalSteps, shared_weights
from danlu.train.loop import Run, Turn, train
from danlu.train.mesh import make_mesh
from danlu.train.objective import next_token
from danlu.train.optimizer import Optimizer, masters_of
from danlu.train.optimizing.settings import OptimizerSettings
from danlu.train.replica import Replica
from danlu.train.state import Checkpoints
from tests.train.ranks import run_ranks

PATIENT = 60.0  # a deadline that no test reaches


# --- Workers in this process ----------------------------------------------------------------------------------------


class Apprentice:
    """A small network that learns to copy another, whose gradients depend on the number of the step alone."""

    def __init__(self, settings: LocalSettings, worker: str, rows: int = 0, rule: str = "adamw") -> None:
        torch.manual_seed(4)
        self.model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        inner = Optimizer(*masters_of(self.model, torch.float32), OptimizerSettings(name=cast(Any, rule)))
        self.optimizer = LocalSteps(inner, settings, worker)
        self.rows, self.done = rows, 0

    def learn(self, steps: int) -> None:
        for _ in range(steps):
            chance = torch.Generator().manual_seed(1000 * self.rows + self.done)
            x = torch.randn(16, 6, generator=chance)
            (self.model(x) - x[:, :3] * x[:, 3:]).square().mean().backward()
            self.optimizer.step(0.05)
            self.optimizer.zero()
            self.done += 1

    def weights(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.model.named_parameters()}


def settings(home: Path, **changes: Any) -> LocalSettings:
    return LocalSettings(**{"home": home, "local_steps": 3, "deadline": PATIENT} | changes)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-6) -> bool:
    return all(torch.allclose(one[name], other[name], rtol=0, atol=tolerance) for name in one)


def together(*works: Callable[[], Any]) -> list[Any]:
    """Call all at once, each in a thread of its own."""
    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(work) for work in works]]


def shared(home: Path) -> dict[str, Tensor]:
    found = shared_weights(home)
    names = [name.removeprefix("shared.") for name in found.names if name.startswith("shared.")]
    return {name: found.read(f"shared.{name}") for name in names}


def rounds(home: Path) -> list[Round]:
    ledger = Ledger(home, "", 0)
    newest = ledger.newest()
    assert newest is not None
    return [ledger.round(number) for number in range(newest + 1)]


def shares(made: Round) -> list[tuple[str, int, float]]:
    return [(one.delivery.worker, one.delivery.number, one.weight) for one in made.counted]


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


def test_who_leaves_is_not_waited_for_and_may_come_back(tmp_path: Path) -> None:
    one, other = Apprentice(settings(tmp_path), "a"), Apprentice(settings(tmp_path), "b", rows=1)
    together(lambda: one.learn(3), lambda: other.learn(3))
    other.optimizer.leave()
    began = time.monotonic()
    one.learn(6)
    assert time.monotonic() - began < PATIENT / 4
    back = Apprentice(settings(tmp_path), "b", rows=1)
    back.optimizer.load(other.optimizer.state())
    together(lambda: one.learn(3), lambda: back.learn(3))
    late = [share for share in shares(rounds(tmp_path)[4]) if share[0] == "b"]
    assert late == [("b", 1, 3**-0.5)]  # it went on from round 1, and the others were at round 3


def test_the_first_round_waits_for_those_who_are_expected(tmp_path: Path) -> None:
    expected = settings(tmp_path, workers=2)

    def later() -> None:
        time.sleep(0.5)
        Apprentice(expected, "b", rows=1).learn(3)

    together(lambda: Apprentice(expected, "a").learn(3), later)
    assert [share[0] for share in shares(rounds(tmp_path)[1])] == ["a", "b"]


def test_who_is_asked_to_stop_waits_no_longer(tmp_path: Path) -> None:
    one, other = Apprentice(settings(tmp_path), "a"), Apprentice(settings(tmp_path), "b", rows=1)
    began = time.monotonic()
    one.optimizer.stopping = lambda: time.monotonic() - began > 0.5
    one.learn(3)
    assert 0.4 < time.monotonic() - began < PATIENT / 4
    assert [shares(made) for made in rounds(tmp_path)] == [[], [("a", 0, 1.0)]]
    other.learn(3)
    assert int(other.optimizer.round) == 1


def test_a_round_that_others_made_meanwhile_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A worker is stopped while it makes a round, for so long that what it reads is gone when it goes on."""
    chosen = settings(tmp_path, deadline=0.2, local_steps=1)
    slow, quick = Apprentice(chosen, "a"), Apprentice(chosen, "b", rows=1)
    make = slow.optimizer._make

    def stopped(pool: list[Delivery]) -> None:
        with torch.enable_grad():
            quick.learn(6)
        quick.optimizer.stopping = lambda: True
        make(pool)

    monkeypatch.setattr(slow.optimizer, "_make", stopped)
    slow.learn(1)
    assert int(slow.optimizer.round) == 6 and same(slow.weights(), shared(tmp_path))
    assert len(rounds(tmp_path)) == 7


def test_who_joins_starts_from_the_newest_weights(tmp_path: Path) -> None:
    one = Apprentice(settings(tmp_path), "a")
    one.learn(6)
    new = Apprentice(settings(tmp_path), "z", rows=2)
    assert int(new.optimizer.round) == 2 and same(new.weights(), one.weights())
    together(lambda: one.learn(3), lambda: new.learn(3))
    assert same(new.weights(), one.weights())
    assert shares(rounds(tmp_path)[3]) == [("a", 2, 1.0), ("z", 0, 1.0)]


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


# --- What is wrong --------------------------------------------------------------------------------------------------


def test_a_damaged_delivery_is_left_out_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = settings(tmp_path, deadline=0.3)
    quick, slow = Apprentice(chosen, "a"), Apprentice(chosen, "b", rows=1)
    quick.learn(3)
    slow.learn(3)
    [part] = slow.optimizer.given.home.rglob("part-*")
    content = bytearray(part.read_bytes())
    content[-3] ^= 1
    part.write_bytes(content)
    quick.learn(3)
    made = rounds(tmp_path)[2]
    assert shares(made) == [("a", 1, 1.0)] and [one.worker for one in made.left_out] == ["b"]
    assert "delivery 0 of worker b is left out" in capsys.readouterr().err
    quick.learn(3)
    assert all(one.worker != "b" for one in rounds(tmp_path)[3].left_out)  # once is enough


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    one = Apprentice(settings(tmp_path), "a")
    with pytest.raises(DanluError, match="another danlu"):
        Apprentice(settings(tmp_path), "a")
    with pytest.raises(DanluError, match=r"outer_momentum 0\.9, and this worker has 0\.5"):
        Apprentice(settings(tmp_path, outer_momentum=0.5), "b")
    with pytest.raises(DanluError, match="no name for a worker"):
        Apprentice(settings(tmp_path), "../b")
    for changed, message in (
        (nn.Linear(6, 5), "holds 0.bias, which this worker does not train"),
        (nn.Sequential(nn.Linear(6, 5), nn.Tanh()), "which this worker does not train"),
        (nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), r"2\.(weight|bias)"),
    ):
        with pytest.raises(DanluError, match=message):
            LocalSteps(
                Optimizer(*masters_of(changed, torch.float32), OptimizerSettings()),
                settings(tmp_path),
                f"x{id(changed)}",
            )
    one.learn(1)
    with torch.no_grad():
        one.model[0].weight[1, 2] = float("nan")
    with pytest.raises(DanluError, match=r"0\.weight: worker a has weights that are no numbers"):
        one.optimizer.finish()
    assert len(rounds(tmp_path)) == 1


def test_a_checkpoint_from_another_home_is_refused(tmp_path: Path) -> None:
    one = Apprentice(settings(tmp_path / "one"), "a")
    one.learn(6)
    other = Apprentice(settings(tmp_path / "other"), "a")
    other.optimizer.load(one.optimizer.state())
    with pytest.raises(DanluError, match="other: has no round 2, from which worker a goes on"):
        other.learn(3)


def test_damaged_shared_weights_end_a_worker(tmp_path: Path) -> None:
    one = Apprentice(settings(tmp_path), "a")
    one.learn(3)
    for part in one.optimizer.made.home.rglob("part-*"):
        part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(DanluError, match="damaged"):
        Apprentice(settings(tmp_path), "b")


def test_signs_of_life_are_judged_by_the_own_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr(roster.time, "monotonic", lambda: now[0])
    monkeypatch.delattr(roster.time, "time")
    for name in "ab":
        (tmp_path / name).mkdir()
    one, other = Roster(tmp_path, "a", 10.0), Roster(tmp_path, "b", 10.0)
    assert one.live() == {"a", "b"}
    now[0] += 9.9
    assert one.live() == {"a", "b"}
    now[0] += 0.2
    assert one.live() == {"a"}
    other.beat()
    assert one.live() == {"a", "b"}
    now[0] += 1000.0  # a was stopped itself, and b went on
    other.beat()
    assert one.live() == {"a", "b"}
    other.leave()
    assert one.live() == {"a"}
    assert Roster(tmp_path, "b", 10.0).live() == {"a", "b"} and one.live() == {"a", "b"}


def test_a_round_is_made_once(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "workers" / name).mkdir(parents=True)
    one, other = Ledger(tmp_path, "a", 4), Ledger(tmp_path, "b", 4)
    assert one.newest() is None
    assert one.publish(0, Round(maker="a", terms={})) and not other.publish(0, Round(maker="b", terms={}))
    assert other.newest() == 0 and other.round(0).maker == "a"
    assert one.claim(1) and not other.claim(1)
    assert other.publish(1, Round(maker="b", terms={}, through={"b": 0}))
    other.deliver(Delivery(worker="b", number=0, started=0, seen_from=0, steps=1))
    one.deliver(Delivery(worker="a", number=0, started=0, seen_from=0, steps=1))
    assert [(one.worker, one.number) for one in one.pool(1)] == [("a", 0)]


# --- Workers that are processes, with the loop ----------------------------------------------------------------------

SHAPE: dict[str, Any] = {
    "vocab_size": 65,
    "width": 48,
    "layers": 2,
    "heads": 4,
    "kv_heads": 4,
    "head_width": 12,
    "feedforward_width": 96,
    "context": 64,
    "tied": True,
}
WINDOW = 32


def rows_of(ids: np.ndarray) -> Rows:
    """Rows of `WINDOW` tokens that follow one another, all learned."""
    tokens = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW).astype(np.int32)
    whole = cast(Any, np.ones_like)
    return Rows(cast(Any, tokens), whole(tokens), whole(tokens, dtype=bool))


def synthetic(count: int, seed: int) -> Rows:
    """Text whose next character follows from the last two, most of the time."""
    chance = np.random.default_rng(seed)
    table = np.random.default_rng(0).integers(0, 65, (65, 65))
    ids = [1, 2]
    for noise in chance.random(count * WINDOW):
        ids.append(int(table[ids[-1] % 8, ids[-2] % 8]) if noise < 0.9 else int(noise * 1e6) % 65)
    return rows_of(np.array(ids))


def learner(rows: Rows, seed: int, rank: int, world: int, batch: int) -> tuple[Decoder, Stream]:
    model = Decoder(ModelConfig(**SHAPE))
    initialize(model, "normal", 5)
    return model, Stream(rows, batch, seed, rank, world)


def run_of(model: Decoder, stream: Stream, optimizer: Any, out: Path, steps: int, **more: Any) -> Run:
    return Run(
        Replica(model, [next_token]),
        [Turn(optimizer, lambda step: 3e-3 * min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps), clip=1.0)],
        stream,
        steps=steps,
        seed=2,
        checkpoints=Checkpoints(out / "checkpoints", 2, background=False),
        out=out,
        **{"checkpoint_steps": 7} | more,
    )


def adam(model: nn.Module) -> Optimizer:
    return Optimizer(*masters_of(model, torch.float32), OptimizerSettings())


def apart(
    out: Path, chosen: LocalSettings, rows: Rows, rank: int, world: int, batch: int, steps: int, pause: float = 0.0
) -> dict[str, Tensor]:
    """One worker's whole run; what it ends with."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "pid").write_text(str(os.getpid()))
    model, stream = learner(rows, 1, rank, world, batch)

    def alive(step: int, phase: str) -> None:
        if phase == "data":
            time.sleep(pause)

    waits = []

    def timed(began: float) -> Any:
        due = wait(began)
        waits.append(time.monotonic() - began)
        return due

    with LocalSteps(adam(model), chosen, out.name) as optimizer:
        wait, optimizer._until_due = optimizer._until_due, timed  # type: ignore[method-assign]
        train(run_of(model, stream, optimizer, out, steps, alive=alive))
        optimizer.finish()
    (out / "waits.json").write_text(json.dumps(waits))
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def measured(weights: dict[str, Tensor], rows: Rows) -> float:
    """The mean loss of rows, in nat/token."""
    model, stream = learner(rows, 0, 0, 1, 64)
    model.load_state_dict(weights, strict=False)
    return Replica(model, [next_token]).measure([stream.batch(0), stream.batch(1)])


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


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


class Team:
    """Workers in processes of their own, to be stopped and killed."""

    def __init__(self, home: Path, timeout: float = 100) -> None:
        self.home, self.timeout = home, timeout
        self.pool = ThreadPoolExecutor(8)
        self.ended: dict[str, Future[list[Any]]] = {}

    def start(self, name: str, *args: Any) -> None:
        (self.home / name / "pid").unlink(missing_ok=True)
        self.ended[name] = self.pool.submit(run_ranks, 1, apart, self.home / name, *args, timeout=self.timeout)

    def signal(self, name: str, number: signal.Signals) -> None:
        while not (self.home / name / "pid").exists():
            time.sleep(0.01)
        os.kill(int((self.home / name / "pid").read_text()), number)

    def kill(self, name: str) -> None:
        """Kill a worker, and wait until it is dead; where it had just ended, that is as well."""
        self.signal(name, signal.SIGKILL)
        with suppress(AssertionError):
            self.result(name)

    def until(self, number: int, home: Path) -> None:
        """Wait for a round."""
        until = time.monotonic() + self.timeout
        while not (home / "rounds" / f"{number:08d}.json").exists():
            assert time.monotonic() < until, f"round {number} was not made"
            time.sleep(0.01)

    def until_step(self, name: str, step: int) -> None:
        """Wait until a worker has done a step."""
        until, file = time.monotonic() + self.timeout, self.home / name / "metrics.jsonl"
        while not file.exists() or file.read_bytes().count(b"\n") < step:
            assert time.monotonic() < until, f"{name} has not done step {step}"
            time.sleep(0.001)

    def result(self, name: str) -> dict[str, Tensor]:
        [found] = self.ended[name].result(self.timeout)
        return cast(dict[str, Tensor], found)


@pytest.fixture
def team(tmp_path: Path) -> Iterator[Team]:
    made = Team(tmp_path / "runs")
    yield made
    for name, ended in made.ended.items():
        if not ended.done():
            made.signal(name, signal.SIGKILL)
    made.pool.shutdown()


def disturb(tmp_path: Path, team: Team, compress: str, steps: int, kills: list[tuple[str, int, float]]) -> None:
    """Two workers left alone and two with kills (whom, after which round, seconds later) end with the same bits."""
    rows = synthetic(100, 1)
    calm = settings(tmp_path / "calm", workers=2, local_steps=5, compress=compress)
    rough = calm.model_copy(update={"home": tmp_path / "rough"})
    undisturbed = Team(tmp_path / "calm-runs")
    for place, name in enumerate("ab"):
        undisturbed.start(name, calm, rows, place, 2, 8, steps)
    wanted = [undisturbed.result(name) for name in "ab"]
    assert same(*wanted)
    undisturbed.pool.shutdown()
    for place, name in enumerate("ab"):
        team.start(name, rough, rows, place, 2, 8, steps, 0.01)
    for name, number, wait in kills:
        team.until(number, rough.home)
        time.sleep(wait)
        team.kill(name)
        team.start(name, rough, rows, "ab".index(name), 2, 8, steps, 0.01)
    assert all(same(team.result(name), wanted[0]) for name in "ab")
    assert [shares(made) for made in rounds(rough.home)] == [shares(made) for made in rounds(calm.home)]


@pytest.mark.parametrize(
    ("compress", "kills"), [("none", [("b", 1, 0.0), ("a", 3, 0.05)]), ("bf16", [("a", 1, 0.03), ("b", 3, 0.0)])]
)
def test_a_killed_worker_goes_on_as_if_nothing_had_been(
    tmp_path: Path, team: Team, compress: str, kills: list[tuple[str, int, float]]
) -> None:
    disturb(tmp_path, team, compress, 25, kills)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_kills_at_any_moment_change_nothing(tmp_path: Path, team: Team, seed: int) -> None:
    chance = np.random.default_rng(seed)
    kills = [("ab"[chance.integers(2)], 1 + 2 * number, float(chance.uniform(0, 0.3))) for number in range(8)]
    disturb(tmp_path, team, ["none", "bf16"][seed % 2], 100, kills)


def test_workers_that_stop_die_and_join_hold_nobody_up(tmp_path: Path, team: Team) -> None:
    train_rows, rest, home = synthetic(1500, 1), synthetic(128, 2), tmp_path / "home"
    chosen = settings(home, workers=3, local_steps=10, deadline=1.0, outer_learning_rate=1.0, outer_momentum=0.3)
    for place, name in enumerate("abc"):
        team.start(name, chosen, train_rows, place, 4, 16, 120)
    team.until_step("b", 22)  # in the midst of its third stretch
    team.signal("b", signal.SIGSTOP)
    team.until(4, home)
    team.signal("c", signal.SIGKILL)
    team.until(5, home)
    team.start("d", chosen, train_rows, 3, 4, 16, 60)
    team.until(7, home)
    team.signal("b", signal.SIGCONT)
    for name in "abd":
        team.result(name)
    waits = json.loads((team.home / "a" / "waits.json").read_text())
    assert 0.2 < max(waits) < chosen.deadline + 1
    late = [one for made in rounds(home) for one in made.counted if one.delivery.worker == "b" and one.weight < 1]
    assert late, "b was never late"
    assert {one.delivery.worker for one in rounds(home)[-1].counted} <= set("abd")
    model, stream = learner(train_rows, 1, 0, 1, 16)
    train(run_of(model, stream, adam(model), tmp_path / "plain", 120, checkpoint_steps=120))
    plain = measured({name: weight.detach() for name, weight in model.named_parameters()}, rest)
    found = measured(shared(home), rest)
    print(f"together {plain:.4f}, apart and disturbed {found:.4f} nat/token, longest wait {max(waits):.2f} s")
    assert found < plain + 0.35


# --- Workers of several processes -----------------------------------------------------------------------------------


def sharded(name: str, chosen: LocalSettings, place: int, plan: str) -> tuple[dict[str, Tensor], int]:
    """A worker whose processes share its weights out; returns them whole, and where it ended."""
    mesh = make_mesh(Plan.model_validate(Plan.parse(plan)))
    model = Decoder(ModelConfig(**SHAPE))
    initialize(model, "normal", 5)
    readers = mesh.plan.readers
    stream = Stream(synthetic(60, 1), 8, 1, place * readers + mesh.reader, 2 * readers)
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
