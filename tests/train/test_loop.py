"""What the loop does besides stepping: bad numbers, bad steps, turns, streams that remember, stopping early."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.errors import DanluError
from danlu.train.guard import Guard, GuardSettings
from danlu.train.loop import Run, Turn, Validation, train
from danlu.train.objective import Loss
from danlu.train.optimizer import Optimizer, masters_of
from danlu.train.optimizing.settings import OptimizerSettings
from danlu.train.replica import Replica
from danlu.train.state import Checkpoints


@dataclass
class Pairs:
    """x [N, 3] and what is to be made of it, [N]."""

    x: Tensor
    y: Tensor

    @property
    def count(self) -> int:
        return len(self.y)

    size = count

    def split(self, parts: int) -> list[Pairs]:
        return [Pairs(*both) for both in zip(self.x.chunk(parts), self.y.chunk(parts), strict=True)]


class Lines:
    """Points of a plane; a step may be spoilt by a factor on what is to be made of it."""

    def __init__(self, spoilt: Mapping[int, float] | None = None) -> None:
        self.spoilt = dict(spoilt or {})

    def batch(self, step: int) -> Pairs:
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
        return Pairs(x, x @ torch.tensor([1.0, -2.0, 0.5]) * self.spoilt.get(step, 1.0))


def square(model: nn.Module, part: Pairs) -> Loss:
    return Loss(F.mse_loss(model(part.x)[:, 0], part.y, reduction="sum"), part.count)


def make(out: Path, steps: int = 20, **changes: Any) -> Run:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = Optimizer(*masters_of(model, torch.float32), OptimizerSettings())
    run = Run(
        Replica(model, [square]),
        [Turn(optimizer, lambda step: 0.05)],
        Lines(),
        steps=steps,
        seed=0,
        checkpoints=Checkpoints(out / "checkpoints", 2),
        checkpoint_steps=4,
        out=out,
    )
    return replace(run, **changes)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weight(run: Run) -> Tensor:
    return run.replica.parameters()["weight"].detach().clone()


def test_numbers_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(DanluError, match=r"step 6: y of row 0 in this process's batch holds NaN"):
        train(make(tmp_path, stream=Lines({5: float("nan")})))
    assert lines(tmp_path)[-1]["step"] == 5


def test_a_spike_is_skipped_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guard = Guard(GuardSettings(spike=50), tmp_path / "one")
    one = make(tmp_path / "one", stream=Lines({15: 1000.0}), guard=guard)
    train(one)
    skipped = lines(tmp_path / "one")[15]
    assert "times the median" in skipped["skipped"] and "step 16 is skipped" in capsys.readouterr().err
    without = make(tmp_path / "two", stream=Lines({15: 1000.0}), guard=Guard(GuardSettings(spike=50), tmp_path / "two"))
    without.guard.left_out.add(15)
    train(without)
    assert torch.equal(weight(one), weight(without))


def test_going_back_leaves_the_batch_out_and_stays_so_after_a_kill(tmp_path: Path) -> None:
    settings = GuardSettings(spike=50, on_spike="back", batches=2)
    run = make(tmp_path / "back", stream=Lines({15: 1000.0}), guard=Guard(settings, tmp_path / "back"))
    done = train(run)
    assert done.steps == 20 and json.loads((tmp_path / "back" / "skipped.json").read_text())["steps"] == [14, 15]
    told = {line["step"]: line.get("skipped") for line in lines(tmp_path / "back")}
    assert told[15] and told[16] and not told[14] and not told[17]
    expected = make(tmp_path / "left", guard=Guard(settings))
    expected.guard.left_out |= {14, 15}
    train(expected)
    assert torch.equal(weight(run), weight(expected))
    assert Guard(settings, tmp_path / "back").left_out == {14, 15}


def test_by_default_a_bad_step_ends_the_run(tmp_path: Path) -> None:
    def burst(model: nn.Module, part: Pairs) -> Loss:
        loss = square(model, part)
        return replace(loss, sum=loss.sum * float("inf")) if float(part.x[0, 0]) == mark else loss

    mark = float(Lines().batch(7).x[0, 0])
    run = make(tmp_path)
    broken = replace(run, replica=Replica(run.replica.models[0], [burst]))
    with pytest.raises(DanluError, match="step 8: loss inf"):
        train(broken)
    assert [saved.step for saved in [Checkpoints(tmp_path / "checkpoints", 2).open()] if saved] == [4]


def test_too_many_wrong_steps_in_a_row_stop_it(tmp_path: Path) -> None:
    guard = Guard(GuardSettings(spike=50, most=3), tmp_path)
    spoilt = Lines({step: 1000.0 for step in range(12, 20)})
    with pytest.raises(DanluError, match=r"step 15: .* 3 steps in a row went wrong"):
        train(make(tmp_path, stream=spoilt, guard=guard))


def test_turns_update_their_own_weights_only(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pair = nn.ModuleDict({"one": nn.Linear(3, 1), "other": nn.Linear(1, 1)})

    def both(model: nn.ModuleDict, part: Pairs) -> Loss:
        made = model["other"](model["one"](part.x))
        return Loss(made.square().sum(), part.count)

    def of(name: str) -> Turn:
        named = {f"{name}.{key}": value for key, value in pair[name].named_parameters()}
        return Turn(Optimizer(named, {}, OptimizerSettings()), rates[name])

    def run(rate: float) -> dict[str, Tensor]:
        rates["other"] = lambda step: rate
        start = {name: weight.detach().clone() for name, weight in pair.named_parameters()}
        made = make(tmp_path / str(rate), 1, replica=Replica(pair, [both, both]), turns=[of("one"), of("other")])
        train(made)
        return {name: weight.detach() - start[name] for name, weight in pair.named_parameters()}

    rates: dict[str, Callable[[int], float]] = {"one": lambda step: 0.05, "other": lambda step: 0.0}
    moved = run(0.0)
    assert moved["one.weight"].abs().sum() > 0 and not moved["other.weight"].any()
    assert run(0.05)["other.weight"].abs().sum() > 0
    assert [set(turn) for turn in lines(tmp_path / "0.05")[0]["turns"]] == [{"loss", "learning_rate", "gradient_norm"}]


def test_it_ends_early_when_nothing_gets_better(tmp_path: Path) -> None:
    measured = iter([3.0, 2.0, 2.5, 2.4, 9.0])
    run = make(tmp_path, validation=Validation(2, lambda: next(measured), patience=1))
    done = train(run)
    assert (done.steps, done.why, done.validated, done.best) == (8, "early", 2.4, 2.0)


def test_asked_to_stop_it_saves_and_goes_on_later(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole")
    train(whole)
    asked = iter([False] * 5 + [True])
    assert train(make(tmp_path / "cut", stopping=lambda: next(asked))).why == "stopped"
    again = make(tmp_path / "cut")
    assert train(again).why == "finished"
    assert torch.equal(weight(whole), weight(again))


def test_what_is_to_be_finished_is_before_the_last_measurement_and_checkpoint(tmp_path: Path) -> None:
    """As workers want it, whose last exchange changes the weights."""
    measured: list[float] = []

    def finish() -> None:
        with torch.no_grad():
            run.turns[0].optimizer.masters["weight"].fill_(7.0)

    def measure() -> float:
        measured.append(float(weight(run).mean()))
        return 1.0

    run = make(tmp_path, 6, validation=Validation(3, measure), finish=finish)
    train(run)
    assert measured[0] != 7.0 and measured[1] == 7.0
    saved = Checkpoints(tmp_path / "checkpoints", 2).open()
    assert saved is not None and bool((saved.read("master.weight") == 7.0).all())


def test_another_seed_or_data_is_refused(tmp_path: Path) -> None:
    train(make(tmp_path, 4, identity={"seed": 0}))
    with pytest.raises(DanluError, match="made with seed 0, and this run has 1"):
        train(make(tmp_path, 8, identity={"seed": 1}))
