"""A stream that grows while the model learns from it: a replay buffer filled by CartPole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from common import Task
from torch import nn

from danlu.train.ema import Average
from danlu.train.optimizer import Optimizer
from danlu.train.optimizing.settings import OptimizerSettings

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed: pip install 'danlu[examples]'")

import dqn  # noqa: E402

from danlu.data.permutation import key_of  # noqa: E402


def test_it_learns_to_balance(tmp_path: Path) -> None:
    figures = dqn.learn(Task(tmp_path, 1500))
    print(figures)
    assert figures["return"]["low"] > 60  # moves made by chance last 22


@pytest.mark.soak
@pytest.mark.parametrize("seed", [0, 1])
def test_it_solves_the_task(seed: int, tmp_path: Path) -> None:
    assert dqn.learn(Task(tmp_path, 10_000, seed))["return"]["value"] >= 475


def test_moves_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gymnasium's own CartPole, with its own limit of an episode's length, does the same given the same actions."""
    monkeypatch.setattr(dqn, "LONGEST", 15)
    monkeypatch.setattr(dqn, "FIRST", 40)
    life = dqn.Life(nn.Linear(4, 2), Task(Path(), 100, seed=3))
    for step in range(40):
        life.advance(step)
    made, episodes = int(life.counts[0]), 0
    kinds: set[bool] = set()  # of ends: by a fall, or by the limit
    assert made == 40 + 39 * dqn.MORE
    world = gymnasium.make("CartPole-v1", max_episode_steps=15)
    seen, _ = world.reset(seed=key_of(3, 0))
    for before, action, after, fell in zip(*(held[:made] for held in vars(life.moves).values()), strict=True):
        torch.testing.assert_close(before * dqn.USUAL, torch.from_numpy(seen))
        seen, _, ended, too_long, _ = world.step(int(action))
        torch.testing.assert_close(after * dqn.USUAL, torch.from_numpy(seen))
        assert bool(fell) == ended
        if ended or too_long:
            episodes, kinds = episodes + 1, kinds | {ended}
            seen, _ = world.reset(seed=key_of(3, episodes))
    assert episodes == int(life.counts[2]) and kinds == {True, False}
    torch.testing.assert_close(life.now.float(), torch.from_numpy(seen))


def test_the_oldest_moves_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dqn, "FIRST", 30)
    torch.manual_seed(0)
    model, task = nn.Linear(4, 2), Task(Path(), 100, seed=3)
    whole = dqn.Life(model, task)
    whole.advance(0)
    monkeypatch.setattr(dqn, "HELD", 16)
    short = dqn.Life(model, task)
    short.advance(0)
    kept = torch.arange(30 - 16, 30)
    assert torch.equal(short.moves.before[kept % 16], whole.moves.before[kept])
    assert torch.equal(short.moves.action[kept % 16], whole.moves.action[kept])


def test_the_objective_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    slow = Average(Optimizer(dict(model.named_parameters()), {}, OptimizerSettings()), 0.9)
    slow.averages["weight"].mul_(-2)
    moves = dqn.Moves(torch.randn(5, 4), torch.tensor([0, 1, 1, 0, 1]), torch.randn(5, 4), torch.arange(5) == 2)
    wanted = 0.0
    for before, action, after, fell in zip(*vars(moves).values(), strict=True):
        chosen = model(after).argmax()
        later = (slow.averages["weight"] @ after + slow.averages["bias"])[chosen]
        error = abs((0.01 + (0.0 if fell else 0.99 * later)) - model(before)[action])
        wanted = wanted + (error**2 / 2 if error < 1 else error - 0.5)
    loss = dqn.surprise(slow, model, moves)
    torch.testing.assert_close(loss.sum, wanted)
    assert loss.count == 5
    loss.sum.backward()
    assert all(average.grad is None for average in slow.averages.values())
