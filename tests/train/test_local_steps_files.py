"""Local steps, what lies in the shared directory: damaged, of another model, of another home; who is alive."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from danlu.errors import DanluError
from danlu.train.exchange import roster
from danlu.train.exchange.ledger import Delivery, Ledger, Round
from danlu.train.exchange.roster import Roster
from danlu.train.local_steps import LocalSteps
from danlu.train.optimizer import Optimizer, masters_of
from danlu.train.optimizing.settings import OptimizerSettings
from tests.train.apart import Apprentice, rounds, settings, shares


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
