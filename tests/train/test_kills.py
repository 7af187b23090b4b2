"""Ranks killed at random while `danlu train` works: the end has the same bits as a run left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.train.tiny_run import command, curve, environment, newest, run, write_recipe

KILLS = 30


@pytest.mark.parametrize(
    ("kills", "nproc", "plan", "patience"),
    [(KILLS, 2, "shard=2", 240), pytest.param(100, 4, "tensor=2,shard=2", 1800, marks=pytest.mark.soak)],
)
def test_random_kills_of_random_ranks_change_nothing(
    kills: int, nproc: int, plan: str, patience: float, tmp_path: Path
) -> None:
    """Every kill restarts the group from the last checkpoint; the end has the same bits as a run left alone."""
    recipe = write_recipe(tmp_path)
    words = ("--nproc", str(nproc), "--plan", plan, "--set", "checkpoints.every=2", "--set", "validation.every=50")
    long = (*words, "--set", f"steps={40 * kills // 3}")
    run(recipe, tmp_path / "calm", *long, timeout=patience)
    killed, chance = 0, random.Random(11)
    with subprocess.Popen(
        command(recipe, tmp_path / "wild", *long), env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        reached = 0
        while killed < kills and process.poll() is None:
            time.sleep(chance.uniform(0.05, 0.4))
            done = newest(tmp_path / "wild")
            if done <= reached:  # every kill comes after some progress, as failures of machines do
                continue
            ranks = _ranks(tmp_path / "wild")
            victims = [pid for pid in ranks if psutil.pid_exists(pid)]
            if len(victims) < nproc:
                continue
            reached = done
            os.kill(chance.choice(victims), signal.SIGKILL)
            killed += 1
        _, told = process.communicate(timeout=patience)
    assert process.returncode == 0, told[-4000:]
    assert killed == kills, f"the run ended after {killed} kills"
    assert curve(tmp_path / "wild") == curve(tmp_path / "calm")


def _ranks(out: Path) -> list[int]:
    """The processes that train now."""
    found = []
    for file in sorted((out / "ranks").glob("rank-*.alive")):
        text = file.read_text(errors="ignore").strip("\0 \n")
        if text:
            found.append(json.loads(text)["pid"])
    return found
