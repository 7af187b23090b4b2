"""A variational autoencoder (arXiv:1312.6114) learns what clothes look like, and draws some of its own.

    python recipes/vae.py --out runs/vae

The folder that DANLU_DATA names holds the pictures. Given again, the command goes on where the run was stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from common import Examples, Out, Pictures, Seed, Steps, Task, carry_out, chance, fit, needed, read_pictures, take_turn
from torch import Tensor, nn

from danlu.artifact import Figures, figure, sync
from danlu.cli import Json, command
from danlu.data.memory import MemoryStream
from danlu.model.module import save_weights
from danlu.train.loop import Validation
from danlu.train.objective import Loss
from danlu.train.optimizing.settings import OptimizerSettings, ScheduleSettings
from danlu.train.replica import Replica

ROWS, LATENT = 128, 20  # pictures a step; numbers that a picture is told by
app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Drawings(Examples):
    """Pictures in black and white, and the noise that their codes get: all chance is in the batch.

    Attributes:
        pixels: fp32 [B, height * width], 0 or 1.
        noise: fp32 [B, LATENT], standard normal.
    """

    pixels: Tensor
    noise: Tensor


class Drawing:
    """Batches of pictures drawn anew each time: a pixel is white with a probability of its grey value.

    Black and white have a likelihood under the model; grey values have none.
    """

    def __init__(self, pictures: Pictures, seed: int) -> None:
        self.stream, self.seed = MemoryStream(pictures, ROWS, seed), seed

    def batch(self, step: int) -> Drawings:
        drawn = chance(self.seed, step)
        pixels = torch.bernoulli(self.stream.batch(step).inputs.flatten(1), generator=drawn)
        return Drawings(pixels, torch.randn(ROWS, LATENT, generator=drawn))


class Autoencoder(nn.Module):
    """Pictures to codes and back, by one hidden layer each way."""

    def __init__(self, pixels: int, width: int = 500) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, width), nn.ReLU(), nn.Linear(width, pixels))


def bound(model: Autoencoder, batch: Drawings) -> Loss:
    """The objective: minus the evidence lower bound (section 2.3, one code a picture), in nat.

    No less than what a picture costs in the model's own best code.
    """
    mean, log_variance = model.encoder(batch.pixels).chunk(2, -1)
    pixels = model.decoder(mean + (log_variance / 2).exp() * batch.noise)
    drawing = F.binary_cross_entropy_with_logits(pixels, batch.pixels, reduction="sum")
    coding = (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 2
    return Loss(drawing + coding, batch.count)


@torch.no_grad()
def draw(model: Autoencoder, seed: int, side: int, across: int = 10) -> Tensor:
    """New pictures beside one another, grey values from 0 to 1, [across * side, across * side]."""
    grey = model.decoder(torch.randn(across * across, LATENT, generator=chance(seed))).sigmoid()
    return grey.view(across, across, side, side).transpose(1, 2).reshape(across * side, across * side)


def write_picture(path: Path, pixels: Tensor) -> None:
    """A PNG of grey values from 0 to 1, [height, width], written aside and renamed."""
    aside = path.with_name(f".{path.name}.aside")
    needed("matplotlib.image", "matplotlib", "report").imsave(
        aside, pixels.numpy(), cmap="gray", vmin=0, vmax=1, format="png"
    )
    sync(aside)
    aside.replace(path)


def learn(task: Task, learned: Pictures, tested: Pictures) -> Figures:
    """Train, draw new pictures, and measure on those that were not learned from."""
    torch.manual_seed(task.seed)
    side = learned.pixels.shape[-1]
    model = Autoencoder(side * side)
    settings = OptimizerSettings(name="adam", learning_rate=1e-3, betas=(0.9, 0.999), clip=None)
    schedule = ScheduleSettings(kind="wsd", fall=0.3)
    turn = take_turn(dict(model.named_parameters()), task.steps, settings, schedule)
    replica, test = Replica(model, [bound]), Drawing(tested, task.seed)
    batches = [test.batch(number) for number in range(len(tested) // ROWS)]
    validation = Validation(max(1, task.steps // 5), lambda: replica.measure(batches))
    figures = fit(task, "vae", replica, [turn], Drawing(learned, task.seed), validation)
    save_weights(model, task.out / "vae.safetensors")
    write_picture(task.out / "samples.png", draw(model, task.seed, side))
    return figures | {"elbo": figure(-replica.measure(batches), "nat/image", by=f"{len(batches) * ROWS:,} test images")}


@partial(command, group=app)
def main(out: Out, steps: Steps = 5000, seed: Seed = 0, as_json: Json = False) -> None:
    """Learn what clothes look like, and draw some."""
    learned, tested = read_pictures("fashion")
    carry_out(Task(out, steps, seed), lambda task: learn(task, learned, tested), as_json)


if __name__ == "__main__":
    app()
