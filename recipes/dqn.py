"""A model learns by trying to keep a pole upright on a cart: deep Q-learning (arXiv:1312.5602) on CartPole-v1.

    python recipes/dqn.py --out runs/dqn

What was lived through is a stream like any other, save that it grows while the model learns from it. Given again, the
command goes on where the run was stopped, in the middle of an episode.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from common import Examples, Out, Seed, Steps, Task, carry_out, chance, fit, mean, needed, take_turn
from torch import Tensor, nn
from torch.func import functional_call

from danlu.artifact import Figures
from danlu.cli import Json, command
from danlu.data.permutation import key_of
from danlu.model.module import save_weights
from danlu.train.ema import Average
from danlu.train.objective import Loss
from danlu.train.optimizing.settings import OptimizerSettings, ScheduleSettings
from danlu.train.replica import Replica

LONGEST, DISCOUNT = 500, 0.99  # moves of an episode; a mean of 475 in 100 of them counts as the task solved
ROWS, HELD, FIRST, MORE = 128, 50_000, 1_000, 4  # moves in a batch, remembered, before the first step, and at each
USUAL = torch.tensor([2.4, 3.0, 0.21, 3.0])  # how far place and speed of the cart, angle and speed of the pole go
app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Moves(Examples):
    """What was seen, what was done, and what came of it.

    Attributes:
        before, after: fp32 [B, 4], states in the units of `USUAL`.
        action: int64 [B], 0 pushes left, 1 right.
        fell: bool [B], whether the episode ended with it, other than by its length.
    """

    before: Tensor
    action: Tensor
    after: Tensor
    fell: Tensor


def cart_pole() -> Any:
    """Gymnasium's environment without its count of moves: all it remembers are the four numbers of `state`."""
    return needed("gymnasium", "gymnasium", "examples").make("CartPole-v1").unwrapped


@torch.no_grad()
def best(model: nn.Module, world: Any) -> int:
    """What the model would do now."""
    return int(model(torch.from_numpy(world.state).float() / USUAL).argmax())


class Life:
    """A replay buffer, and the environment where the model makes the moves that fill it.

    Chance comes from the seed with the step or the episode, so what is to be saved are tensors of fixed sizes.
    """

    def __init__(self, model: nn.Module, task: Task) -> None:
        self.model, self.steps, self.seed, self.world = model, task.steps, task.seed, cart_pole()
        fell, states = torch.zeros(HELD, dtype=torch.bool), torch.zeros(HELD, 4)
        self.moves = Moves(states, fell.long(), states.clone(), fell)
        self.counts = torch.zeros(3, dtype=torch.int64)  # moves in all, in this episode, and episodes ended
        self.world.reset(seed=key_of(self.seed, 0))
        self.now = torch.from_numpy(self.world.state)  # fp64 [4]

    def advance(self, step: int) -> None:
        """Make some moves: by chance, fewer and fewer over the first sixth of the run, else the model's best."""
        self.world.state, share = self.now.numpy().copy(), max(0.04, 1 - 6 * step / self.steps)
        for draw, push in torch.rand(MORE if step else FIRST, 2, generator=chance(self.seed, step)).tolist():
            self._move(int(push < 0.5) if draw < share else best(self.model, self.world))
        self.now.copy_(torch.from_numpy(self.world.state))

    def _move(self, action: int) -> None:
        before, fell = self.world.state, self.world.step(action)[2]
        place, states = int(self.counts[0]) % HELD, torch.from_numpy(np.stack((before, self.world.state)))
        self.moves.before[place], self.moves.after[place] = states.float() / USUAL
        self.moves.action[place], self.moves.fell[place] = action, fell
        self.counts += torch.tensor([1, 1, 0])
        if fell or self.counts[1] == LONGEST:
            self.counts += torch.tensor([0, -int(self.counts[1]), 1])
            self.world.reset(seed=key_of(self.seed, int(self.counts[2])))

    def batch(self, step: int) -> Moves:
        chosen = torch.randint(min(int(self.counts[0]), HELD), (ROWS,), generator=chance(self.seed, step, 1))
        return Moves(*(held[chosen] for held in vars(self.moves).values()))

    def state(self) -> dict[str, Tensor]:
        return vars(self.moves) | {"now": self.now, "counts": self.counts}


def surprise(slow: Average, model: nn.Module, batch: Moves) -> Loss:
    """The objective: how far what moves are worth is from what came of them, by Huber's loss.

    The next move is the one that the model would make, and worth what the weights' average says (arXiv:1509.06461).
    Rewards are scaled so that to go on for ever is worth 1.
    """
    with torch.no_grad():
        chosen = model(batch.after).argmax(-1, keepdim=True)
        later = functional_call(model, slow.averages, batch.after).gather(1, chosen)[:, 0]
        worth = (1 - DISCOUNT) + DISCOUNT * later * ~batch.fell
    said = model(batch.before).gather(1, batch.action[:, None])[:, 0]
    return Loss(F.smooth_l1_loss(said, worth, reduction="sum"), batch.count)


def play(model: nn.Module, seed: int, episodes: int = 100) -> Tensor:
    """How many moves episodes last in which the model always makes its best, fp32 [episodes]."""
    world, lengths = cart_pole(), torch.zeros(episodes)
    for episode in range(episodes):
        world.reset(seed=key_of(seed, episode, 2))
        lengths[episode] = next((n for n in range(1, LONGEST) if world.step(best(model, world))[2]), LONGEST)
    return lengths


def learn(task: Task) -> Figures:
    """Train on what the model itself lives through, and let it play."""
    torch.manual_seed(task.seed)
    model = nn.Sequential(nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
    settings = OptimizerSettings(name="adam", learning_rate=1e-3, betas=(0.9, 0.999), clip=10.0, ema=0.99)
    schedule = ScheduleSettings(kind="linear", warmup=0, final_share=0.05)
    turn, life = take_turn(dict(model.named_parameters()), task.steps, settings, schedule), Life(model, task)
    assert turn.average is not None
    figures = fit(task, "dqn", Replica(model, [partial(surprise, turn.average)]), [turn], life)
    with turn.average.swapped():
        save_weights(model, task.out / "dqn.safetensors")
        lengths = play(model, task.seed)
    return figures | {"return": mean(lengths, "moves", by=f"{len(lengths)} episodes; solved from 475 on")}


@partial(command, group=app)
def main(out: Out, steps: Steps = 10_000, seed: Seed = 0, as_json: Json = False) -> None:
    """Learn to balance a pole."""
    carry_out(Task(out, steps, seed), learn, as_json)


if __name__ == "__main__":
    app()
