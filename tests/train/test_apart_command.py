"""`danlu train` as one of several workers: killed, slow, leaving and joining late, through the real command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from pydantic import ValidationError

from danlu.train.exchange.ledger import Ledger, Round
from danlu.train.local_steps import shared_weights
from danlu.train.recipe import TrainRecipe
from danlu.train.state import open_checkpoint
from tests.train.tiny_run import here

RECIPE = """
name: tiny
model:
  architecture: LlamaForCausalLM
  shape: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2,
          intermediate_size: 32, max_position_embeddings: 16}
data: {sources: text.txt, vocabulary: bytes, heldout: 10%, heldout_from: end}
batch: {rows: 6, window: 16}
steps: 10
optimizer: {learning_rate: 3e-3}
precision: fp32
compile: off
checkpoints: {every: 2, background: off}
validation: {every: 100, rows: 12}
apart: {home: shared, workers: 3, local_steps: 4, deadline: 60}
"""


class Worker:
    """One run of the command."""

    def __init__(self, home: Path, number: int, out: str, *words: str) -> None:
        self.out = home / out
        settings = [f"apart.worker={number}", *words]
        line = ["--out", str(self.out), "--json", *(part for setting in settings for part in ("--set", setting))]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "danlu", "train", str(home / "tiny.yaml"), *line],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def until_step(self, step: int) -> None:
        """Wait until it has done a step."""
        file, until = self.out / "metrics.jsonl", time.monotonic() + 100
        while not file.exists() or file.read_bytes().count(b"\n") < step:
            assert time.monotonic() < until and self.process.poll() is None, self.process.communicate()[1][-3000:]
            time.sleep(0.01)

    def end(self, code: int = 0) -> dict[str, Any]:
        said, told = self.process.communicate(timeout=100)
        assert self.process.returncode == code, told[-3000:]
        self.told = told
        return json.loads(said) if code == 0 else {}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "text.txt").write_text("the furnace 丹炉 turns ore into silver, slowly. " * 400, encoding="utf-8")
    (tmp_path / "tiny.yaml").write_text(RECIPE, encoding="utf-8")
    yield tmp_path
    for child in psutil.Process().children():
        if child.is_running() and "danlu" in child.cmdline():
            child.kill()


def rounds(home: Path) -> list[Round]:
    ledger = Ledger(home, "", 0)
    newest = ledger.newest()
    assert newest is not None
    return [ledger.round(number) for number in range(newest + 1)]


def ends(out: Path) -> dict[str, Any]:
    """A worker's weights in its last checkpoint."""
    saved = open_checkpoint(out / "checkpoints")
    assert saved is not None
    names = [name.removeprefix("master.") for name in saved.names if name.startswith("master.")]
    return {name: saved.read(f"master.{name}") for name in names}


def same_as_shared(home: Path, out: Path) -> bool:
    shared, own = shared_weights(home), ends(out)
    return bool(own) and all(torch.equal(weight, shared.read(f"shared.{name}")) for name, weight in own.items())


def hashes(out: Path) -> list[str]:
    return [json.loads(line)["batch"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.soak
def test_a_killed_worker_goes_on_by_the_same_command_as_if_nothing_had_been(home: Path) -> None:
    words = [["apart.workers=2", f"apart.home={home / name}"] for name in ("calm", "rough")]
    calm = [Worker(home, number, f"calm-{number}", *words[0]) for number in range(2)]
    assert {worker.end()["ended"] for worker in calm} == {"finished"}
    made = [[(one.delivery.worker, one.delivery.steps) for one in each.counted] for each in rounds(home / "calm")]
    assert made == [[], *[[("0", steps), ("1", steps)] for steps in (4, 4, 2)]]
    assert all(same_as_shared(home / "calm", worker.out) for worker in calm)
    assert len({digest for worker in calm for digest in hashes(worker.out)}) == 20  # each has rows of its own

    rough = [Worker(home, number, f"rough-{number}", *words[1]) for number in range(2)]
    rough[1].until_step(6)
    rough[1].process.kill()
    rough[1].process.communicate()
    rough[1] = Worker(home, 1, "rough-1", *words[1])
    assert [worker.end()["steps"] for worker in rough] == [10, 10]
    wanted = ends(calm[0].out)
    for one, other in zip(rough, calm, strict=True):
        assert hashes(one.out) == hashes(other.out)
        assert all(torch.equal(weight, wanted[name]) for name, weight in ends(one.out).items())


@pytest.mark.soak  # tests/train/test_local_steps_faults.py has the same without the command
def test_nobody_is_held_up_by_who_is_slow_leaves_or_joins_late(home: Path) -> None:
    words = ("apart.local_steps=10", "apart.deadline=4", "checkpoints.every=100")
    first, second = (Worker(home, number, f"run-{number}", "steps=100000", *words) for number in range(2))
    second.until_step(21)
    first.until_step(21)  # the third was waited for once, and is not here yet
    second.process.send_signal(signal.SIGSTOP)
    first.until_step(len(hashes(first.out)) + 41)
    second.process.send_signal(signal.SIGCONT)
    second.until_step(len(hashes(second.out)) + 21)
    second.process.send_signal(signal.SIGTERM)
    assert second.end()["ended"] == "stopped"
    third = Worker(home, 2, "run-2", *words, "steps=40")
    assert third.end()["ended"] == "finished"
    first.process.send_signal(signal.SIGTERM)
    assert first.end()["ended"] == "stopped"
    counted = [one for each in rounds(home / "shared") for one in each.counted]
    assert any(one.delivery.worker == "1" and one.weight < 1 for one in counted)
    assert min(one.delivery.started for one in counted if one.delivery.worker == "2") > 0
    assert sum(one.delivery.steps for one in counted if one.delivery.worker == "2") == 40


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"apart": {"worker": 3}}, "worker 3 is none of 3"),
        ({"batch": {"rows": 8, "window": 16}}, "batch.rows 8 is no multiple of apart.workers 3"),
        ({"apart": {"deadline": 900}}, "apart.deadline 900 s is no less than launch.hang.timeout 600 s"),
        ({"offload": {"state": "optimizer"}}, r"offload.state optimizer: workers \(apart\)"),
        ({"scaling": {"start": 8}}, "scaling has no effect where precision is fp32"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(words: dict[str, Any], told: str) -> None:
    recipe = yaml.safe_load(RECIPE.replace("compile: off", "compile: 'off'"))
    apart = {**recipe["apart"], "worker": 0, **words.get("apart", {})}
    with pytest.raises(ValidationError, match=told):
        TrainRecipe.model_validate({**recipe, **words, "apart": apart})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_float8_without_a_gpu_is_refused_before_anything_is_made(home: Path) -> None:
    told = here(home / "tiny.yaml", home / "run", "--set", "apart.worker=0", "--set", "precision=float8", code=2)
    assert "float8 needs a GPU" in told and "there is no CUDA GPU" in told
    assert "set precision to bf16" in told and "Traceback" not in told
    assert not (home / "shared").exists() and not list((home / "run").glob("*.json"))
