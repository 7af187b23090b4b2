"""Whatever the loop trains, a run killed in the middle ends with the same bits as one left alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from common import Pictures, Task

from danlu.artifact import Figures
from danlu.train.state import open_checkpoint

STEPS, DEATH = 20, 14  # steps of a run, and the one that is not reached at first; the last checkpoint is of step 12
STREAMS = {"resnet": "Augmented", "vae": "Drawing", "gan": "Ring", "dqn": "Life"}
# Processes are forked from one that has imported what takes seconds; nothing was computed in that one.
START = multiprocessing.get_context("forkserver")


def shades(count: int, side: int) -> Pictures:
    """Random pictures that are lighter, the higher their label."""
    chance = torch.Generator().manual_seed(1)
    labels = torch.randint(10, (count,), generator=chance)
    pixels = torch.rand(count, 1, side, side, generator=chance) * 50 + 20 * labels[:, None, None, None]
    return Pictures(pixels.to(torch.uint8), labels)


def learn(name: str, out: Path) -> Figures:
    """What the recipe's command does, on few and small pictures."""
    task, recipe = Task(out, STEPS), import_module(name)
    if name in ("resnet", "vae"):
        return recipe.learn(task, shades(300, 8), shades(256, 8))
    return recipe.learn(task)


def learn_until(name: str, out: Path) -> None:
    """The same in a process that dies by SIGKILL, as soon as a checkpoint is whole."""
    torch.set_num_threads(1)
    stream = getattr(import_module(name), STREAMS[name])
    batch: Callable[[Any, int], Any] = stream.batch

    def deadly(self: Any, step: int) -> Any:
        if step == DEATH:
            while not (out / "checkpoints" / "step-00000012").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return batch(self, step)

    stream.batch = deadly
    learn(name, out)


def contents(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint: weights, moments, buffers and what a stream remembers."""
    saved = open_checkpoint(out / "checkpoints", STEPS)
    assert saved is not None
    return {name: saved.read(name) for name in saved.names}


@pytest.mark.parametrize("name", STREAMS)
def test_a_killed_run_ends_with_the_same_bits(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "dqn":
        pytest.importorskip("gymnasium", reason="gymnasium is not installed: pip install 'danlu[examples]'")
    START.set_forkserver_preload(["tests.recipes.test_resume", *STREAMS])
    process = START.Process(target=learn_until, args=(name, tmp_path / "broken"))
    process.start()
    whole = learn(name, tmp_path / "whole")
    process.join(60)
    assert process.exitcode == -signal.SIGKILL

    broken = learn(name, tmp_path / "broken")
    assert "goes on after step 12" in capsys.readouterr().err
    assert {name: one["value"] for name, one in whole.items() if name != "seconds"} == {
        name: one["value"] for name, one in broken.items() if name != "seconds"
    }
    one, other = contents(tmp_path / "whole"), contents(tmp_path / "broken")
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    weights = [(tmp_path / home / f"{name}.safetensors").read_bytes() for home in ("whole", "broken")]
    assert weights[0] == weights[1]
