"""What the recipes for other things than text share: a run and its command, pictures, batches of rows, and chance."""

from __future__ import annotations

import json
import math
import os
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from torch import Tensor

from danlu.artifact import Figures, figure, only_writer, sync, write_json
from danlu.console import result, table
from danlu.data.batch import RowBatch
from danlu.data.labelled import LabelBatch
from danlu.data.permutation import key_of
from danlu.errors import DanluError, need_extra
from danlu.show import figure_rows
from danlu.train.ema import Average
from danlu.train.loop import Run, Turn, Validation, train
from danlu.train.optimizer import Optimizer
from danlu.train.optimizing.settings import OptimizerSettings, ScheduleSettings
from danlu.train.replica import Replica
from danlu.train.schedule import Schedule
from danlu.train.signals import Stopping
from danlu.train.state import Checkpoints

Name = Literal["fashion", "cifar10"]
FILES: dict[Name, str] = {"fashion": "fashion_mnist_20k_10k.npz", "cifar10": "cifar10_jpg_10k_2k.tar.xz"}

Out = Annotated[Path, typer.Option(help="The run's directory.")]
Steps = Annotated[int, typer.Option(min=1, help="Batches to learn from.")]
Seed = Annotated[int, typer.Option(help="Decides the start and all chance.")]


@dataclass(frozen=True)
class Task:
    """What is asked of a recipe.

    Attributes:
        out: the run's directory.
        steps: batches to learn from.
        seed: decides the start and all chance.
        stop: asked at each step whether to save and leave.
    """

    out: Path
    steps: int
    seed: int = 0
    stop: Callable[[], bool] = lambda: False


def carry_out(task: Task, learn: Callable[[Task], Figures], as_json: bool) -> None:
    """Learn in a directory that nobody else writes in; print the figures and leave them in figures.json.

    SIGTERM and Ctrl-C let the run save what it has: the figures are then those of the steps that were done.
    """
    with only_writer(task.out, wait=False), Stopping() as stopping:
        figures = learn(replace(task, stop=lambda: stopping.asked))
        write_json(task.out / "figures.json", figures)
    if as_json:
        result(json.dumps(figures, ensure_ascii=False))
    else:
        table(str(task.out), ("figure", "value", "95 % interval"), list(figure_rows(figures)))


def take_turn(
    weights: Mapping[str, Tensor], steps: int, settings: OptimizerSettings, schedule: ScheduleSettings
) -> Turn:
    """An update of these weights at every step, of so many."""
    optimizer = Optimizer(dict(weights), {}, settings)
    average = None if settings.ema is None else Average(optimizer, settings.ema, settings.ema_warmup)
    return Turn(optimizer, Schedule(schedule, settings.learning_rate, steps).rate, settings.clip, average)


def fit(
    task: Task, name: str, replica: Replica, turns: Sequence[Turn], stream: Any, validation: Validation | None = None
) -> Figures:
    """Let the loop do a task, or the rest of it."""
    started = time.perf_counter()
    run = Run(
        replica,
        turns,
        stream,
        steps=task.steps,
        seed=task.seed,
        checkpoints=Checkpoints(task.out / "checkpoints", keep_last=2),
        checkpoint_steps=max(1, min(500, task.steps // 5)),
        out=task.out,
        identity={"recipe": name, "seed": task.seed},
        validation=validation,
        stopping=task.stop,
        label=name,
    )
    done = train(run)
    seconds = time.perf_counter() - started
    return {
        "steps": figure(done.steps, "steps"),
        "seconds": figure(seconds, "s", by="this process; time before a restart is not in it"),
    }


def mean(values: Tensor, unit: str, by: str) -> Figures:
    """The mean of independent measurements, and the interval that holds the true one 95 times in 100."""
    middle, margin = float(values.mean()), 1.96 * float(values.std()) / math.sqrt(len(values))
    return figure(middle, unit, middle - margin, middle + margin, by)


def needed(module: str, package: str, extra: str) -> Any:
    """A module of an optional library. Raises DanluError where that is not installed."""
    try:
        return import_module(module)
    except ImportError:
        raise need_extra(package, extra) from None


def chance(*numbers: int) -> torch.Generator:
    """A source of random numbers that depends on these alone, say a seed and a step."""
    return torch.Generator().manual_seed(key_of(*numbers))


class Examples(RowBatch):
    """The base of batches in which every row is one target."""

    @property
    def count(self) -> int:
        return len(next(iter(vars(self).values())))

    size = count


@dataclass(frozen=True)
class Pictures:
    """A data set in memory.

    Attributes:
        pixels: uint8 [N, channels, height, width].
        labels: int64 [N], from 0 to 9.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: Any) -> LabelBatch:
        """The batch of the pictures with these numbers, values from 0 to 1."""
        return LabelBatch(self.pixels[chosen].float() / 255, self.labels[chosen])


def read_pictures(name: Name) -> tuple[Pictures, Pictures]:
    """Those to learn from and those to test with, out of the folder that DANLU_DATA names.

    Raises DanluError where the file is not there.
    """
    path = Path(os.environ.get("DANLU_DATA", "../shared/data")) / FILES[name]
    if not path.exists():
        raise DanluError("is not there", where=path, fix="name the folder that holds it in DANLU_DATA")
    return _read_arrays(path) if name == "fashion" else _read_archive(path)


def _read_arrays(path: Path) -> tuple[Pictures, Pictures]:
    """x_train, y_train, x_test and y_test, as Fashion-MNIST (arXiv:1708.07747) is often packed."""
    with np.load(path, allow_pickle=False) as held:
        learned, tested = (
            Pictures(torch.from_numpy(held[f"x_{part}"])[:, None], torch.from_numpy(held[f"y_{part}"]).long())
            for part in ("train", "test")
        )
    return learned, tested


def _read_archive(path: Path) -> tuple[Pictures, Pictures]:
    """train/KIND/NUMBER.jpg and test/KIND/NUMBER.jpg."""
    image = needed("PIL.Image", "pillow", "examples")
    found: dict[str, list[tuple[str, np.ndarray]]] = {"train": [], "test": []}
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None and member.name.endswith(".jpg"):
                part, kind, _ = member.name.split("/")
                found[part].append((kind, np.asarray(image.open(file).convert("RGB")).transpose(2, 0, 1)))
    kinds = sorted({kind for kind, _ in found["train"]})
    learned, tested = (
        Pictures(
            torch.from_numpy(np.stack([pixels for _, pixels in rows])),
            torch.tensor([kinds.index(kind) for kind, _ in rows]),
        )
        for rows in (found["train"], found["test"])
    )
    return learned, tested


def write_picture(path: Path, pixels: Tensor) -> None:
    """A PNG of grey values from 0 to 1, [height, width], written aside and renamed."""
    try:
        from matplotlib.image import imsave
    except ImportError:
        raise need_extra("matplotlib", "report") from None
    aside = path.with_name(f".{path.name}.aside")
    imsave(aside, pixels.numpy(), cmap="gray", vmin=0, vmax=1, format="png")
    sync(aside)
    aside.replace(path)
