"""`kill -9` at random moments, then the same command: it goes on, and ends with the same bits as if left alone."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Project

KILLS = 20
# A process forked from one that has loaded the libraries starts in milliseconds instead of seconds, so what is killed
# is the work. Nothing was computed in that one: each child begins like the fresh process that the long test starts.
FORKED, FRESH = multiprocessing.get_context("forkserver"), multiprocessing.get_context("spawn")
LOADED = ["danlu.cli", "danlu.pipeline", "danlu.data.build", "danlu.train.stage", "datasketch", "tests.test_kill"]


def command(home: Path, words: list[str], log: Path) -> None:
    """The body of the child: `danlu ...` in a directory, what it says into a file."""
    os.chdir(home)
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["danlu", *words]
    from danlu.cli import main

    main()


class Attempt:
    """`danlu run recipe.yaml --out OUT --until tune ...` in a child process."""

    def __init__(self, start: Any, home: Path, out: str, *words: str) -> None:
        self.log = home / f"{out}.log"
        arguments = (home, ["run", "recipe.yaml", "--out", out, "--until", "tune", *words], self.log)
        self.process = start.Process(target=command, args=arguments)
        self.process.start()
        self.began = time.monotonic()

    def killed_after(self, seconds: float) -> bool:
        """Kill it then, unless it has ended by itself; whether it was killed."""
        self.process.join(seconds)
        if self.process.exitcode is None and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.join()
            return self.process.exitcode == -signal.SIGKILL
        return False

    def finish(self) -> float:
        """Let it end; the seconds it took."""
        self.process.join(1800)
        assert self.process.exitcode == 0, self.log.read_text(encoding="utf-8")
        return time.monotonic() - self.began


def contents(run: Path) -> dict[str, str]:
    """SHA-256 of every file that must come out the same: all but logs, which hold times."""
    files = [file for stage in ("data", "tune") for file in sorted(next(run.glob(f"{stage}-*")).rglob("*"))]
    timed = ("card.json", "metrics.jsonl")
    return {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file() and file.name not in timed and "tensorboard" not in file.parts
    }


def losses(run: Path) -> list[tuple[int, float]]:
    (file,) = run.glob("tune-*/metrics.jsonl")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def survive(start: Any, home: Path, kills: int, *words: str) -> None:
    """Kill a run so many times and go on with it each time; whenever it gets through, it is the undisturbed one."""
    whole = Attempt(start, home, "whole", *words).finish()
    chance = random.Random(f"炼丹 {words}")
    while kills:
        if Attempt(start, home, "broken", *words).killed_after(chance.uniform(0, 0.8 * whole)):
            kills -= 1
        else:
            assert_same(home)
            shutil.rmtree(home / "broken")
    Attempt(start, home, "broken", *words).finish()
    assert_same(home)


def assert_same(home: Path) -> None:
    """The run that was killed and gone on with is, file for file, the one that was left alone."""
    broken, whole = home / "broken", home / "whole"
    assert contents(broken) == contents(whole)
    assert losses(broken) == losses(whole)
    assert not list(broken.glob(".*.building")) and not list(broken.rglob("*.aside"))


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.soak)])
def test_a_killed_run_ends_with_the_same_bits(project: Project, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    FORKED.set_forkserver_preload(LOADED)
    words = ("--set", f"tune.method={method}", "--set", "tune.dropout=0.1", "--set", "tune.steps=8")
    Attempt(FORKED, project.home, "first", *words).finish()  # starts the server, so that the next one is timed fairly
    survive(FORKED, project.home, KILLS // 2, *words)


@pytest.mark.soak
def test_the_killed_demo_ends_with_the_same_bits(tmp_path: Path, smollm2: Path) -> None:
    demo = Path(__file__).parent.parent / "recipes" / "python-helper.yaml"
    shutil.copy(demo, tmp_path / "recipe.yaml")
    survive(FRESH, tmp_path, KILLS)
