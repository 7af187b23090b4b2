"""Local steps where workers are slow, leave, join, are stopped or killed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from danlu.train.exchange.ledger import Delivery
from danlu.train.loop import train
from tests.train.apart import (
    PATIENT,
    Apprentice,
    adam,
    apart,
    learner,
    measured,
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
