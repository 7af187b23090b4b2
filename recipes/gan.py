"""Two models learn against each other (arXiv:1406.2661): one makes points, the other tells them from real ones.

    python recipes/gan.py --out runs/gan

The real ones come from eight narrow Gaussians on a ring, on which such pairs often fail: the points that are made
gather on a few of the eight. Given again, the command goes on where the run was stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import typer
from common import Examples, Out, Seed, Steps, Task, carry_out, chance, fit, take_turn
from torch import Tensor, nn

from danlu.artifact import Figures, figure
from danlu.cli import Json, command
from danlu.model.module import save_weights
from danlu.train.objective import Loss
from danlu.train.optimizing.settings import OptimizerSettings, ScheduleSettings
from danlu.train.replica import Replica

ROWS, NOISE = 256, 2  # points a step; numbers that one is made from
MODES, RADIUS, SPREAD = 8, 2.0, 0.02  # as in arXiv:1611.02163
BLUR = 1.0  # standard deviation that points are blurred by at the start
app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Points(Examples):
    """Real points, and the noise to make as many from.

    Attributes:
        real: fp32 [B, 2].
        noise: fp32 [B, NOISE], standard normal.
        blur: fp32 [B, 2], that is added to real and to made points before they are judged.
    """

    real: Tensor
    noise: Tensor
    blur: Tensor


def centres() -> Tensor:
    """Of the Gaussians, [MODES, 2]."""
    angles = torch.arange(MODES) * (2 * math.pi / MODES)
    return RADIUS * torch.stack((angles.cos(), angles.sin()), -1)


class Ring:
    """Batches of points, no two the same; blurred at first, so that all modes are one to begin with, and sharp after
    half of the steps (arXiv:1610.04490)."""

    def __init__(self, seed: int, steps: int) -> None:
        self.seed, self.steps = seed, steps

    def batch(self, step: int) -> Points:
        drawn = chance(self.seed, step)
        which = torch.randint(MODES, (ROWS,), generator=drawn)
        real = centres()[which] + SPREAD * torch.randn(ROWS, 2, generator=drawn)
        blur = BLUR * max(0.0, 1 - 2 * step / self.steps) * torch.randn(ROWS, 2, generator=drawn)
        return Points(real, torch.randn(ROWS, NOISE, generator=drawn), blur)


def layers(inputs: int, outputs: int, width: int = 128) -> nn.Sequential:
    """Three linear layers."""
    activation = nn.LeakyReLU(0.2)
    hidden = [nn.Linear(inputs, width), activation, nn.Linear(width, width), activation]
    return nn.Sequential(*hidden, nn.Linear(width, outputs))


def judging(models: nn.ModuleDict, batch: Points, penalty: float = 0.005) -> Loss:
    """The judge's objective: cross-entropy of real points and of made ones, in nat a pair.

    Its slope at real points is held down (arXiv:1801.04406), or the two would circle each other for ever.
    """
    real = (batch.real + batch.blur).detach().requires_grad_()
    verdict = models["judge"](real)
    made = models["judge"](models["maker"](batch.noise).detach() + batch.blur.flip(0))
    wrong = F.softplus(-verdict).sum() + F.softplus(made).sum()
    [slope] = torch.autograd.grad(verdict.sum(), real, create_graph=True)
    return Loss(wrong, batch.count, penalty / 2 * slope.square().sum())


def making(models: nn.ModuleDict, batch: Points) -> Loss:
    """The maker's objective: that its points pass for real (section 3's second form, which does not saturate)."""
    return Loss(F.softplus(-models["judge"](models["maker"](batch.noise) + batch.blur.flip(0))).sum(), batch.count)


@torch.no_grad()
def quality(maker: Callable[[Tensor], Tensor], seed: int) -> tuple[float, int]:
    """The share of 10,000 points within three spreads of a centre, and how many modes have a quarter of theirs there.

    Of real points 98.9 % are that near.
    """
    points = maker(torch.randn(10_000, NOISE, generator=chance(seed)))
    distance, mode = torch.cdist(points, centres()).min(-1)
    near = distance < 3 * SPREAD
    return float(near.float().mean()), int((mode[near].bincount() > len(points) / MODES / 4).sum())


def learn(task: Task) -> Figures:
    """Train, each model in its turn at every step, and measure what the average of the maker's weights makes."""
    torch.manual_seed(task.seed)
    models = nn.ModuleDict({"judge": layers(2, 1), "maker": layers(NOISE, 2)})
    adam = {"name": "adam", "learning_rate": 3e-3, "betas": (0.5, 0.99), "clip": None}
    settings = {"judge": OptimizerSettings(**adam), "maker": OptimizerSettings(**adam, ema=0.99, ema_warmup=True)}
    schedule = ScheduleSettings(kind="linear", warmup=0, final_share=0.02)
    judge, maker = (
        take_turn(dict(models[name].named_parameters(name)), task.steps, settings[name], schedule)
        for name in ("judge", "maker")
    )
    figures = fit(task, "gan", Replica(models, [judging, making]), [judge, maker], Ring(task.seed, task.steps))
    assert maker.average is not None
    with maker.average.swapped():
        save_weights(models, task.out / "gan.safetensors")
        near, covered = quality(models["maker"], task.seed)
    return figures | {
        "modes": figure(covered, "modes", by=f"of {MODES}"),
        "near": figure(near, "share", by="10,000 points; of real ones 0.989"),
    }


@partial(command, group=app)
def main(out: Out, steps: Steps = 10_000, seed: Seed = 0, as_json: Json = False) -> None:
    """Learn to make points that pass for real ones."""
    carry_out(Task(out, steps, seed), learn, as_json)


if __name__ == "__main__":
    app()
