"""`danlu train` as people call it: on several processes, killed, stopped, resumed, and given what it cannot do."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

from danlu.cli import app
from danlu.model.costs import training_operations
from danlu.model.transformer import make_model
from danlu.train.compiling import can_compile
from danlu.train.hang import read_sign
from danlu.train.precision import gemm_rate
from danlu.train.recipe import TrainRecipe
from danlu.train.state import open_checkpoint
from danlu.train.tasks.shape import model_config
from danlu.train.tasks.task import make_task
from danlu.train.worker import load_model
from tests.train.tiny_run import assert_same_curve, command, environment, here, metrics, newest, run, write_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def test_it_trains_resumes_with_another_plan_and_exports(recipe: Path, tmp_path: Path) -> None:
    whole = json.loads(run(recipe, tmp_path / "one", "--json").stdout)
    assert whole["steps"] == 12 and whole["ended"] == "finished"
    lines = metrics(tmp_path / "one")
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["validation"] == whole["validation_loss"]

    run(recipe, tmp_path / "two", "--nproc", "2", "--plan", "shard=2", "--steps", "7")
    run(recipe, tmp_path / "two", "--nproc", "2", "--plan", "tensor=2")
    assert_same_curve(tmp_path / "two", tmp_path / "one")

    ours, theirs = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("one", "two")
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "two" / "model")
    ids = torch.tensor([tokenizer("the furnace 丹炉")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-4)

    listed = CliRunner().invoke(app, ["checkpoint", "verify", str(tmp_path / "two"), "--json"], prog_name="danlu")
    assert [facts["step"] for facts in json.loads(listed.stdout)] == [10, 12]

    two = tmp_path / "two"  # an export never stands where a run does
    said = CliRunner().invoke(app, ["checkpoint", "export", str(two), "--out", str(two)], prog_name="danlu")
    assert said.exit_code == 2 and "would be lost" in said.output and newest(two) == 12
    (two / "model" / "thesis.txt").write_text("years of work")
    assert "would be lost: thesis.txt" in here(recipe, two, code=2)


def test_under_torchrun_the_command_is_one_of_its_processes(recipe: Path, tmp_path: Path) -> None:
    here(recipe, tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    words = command(recipe, tmp_path / "two", "--plan", "shard=2")[2:]
    ended = subprocess.run([*torchrun, *words], capture_output=True, text=True, env=environment(), timeout=240)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert_same_curve(tmp_path / "two", tmp_path / "one")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "model")


@pytest.mark.parametrize(
    ("words", "loads"),
    [
        (
            (
                "model.architecture=BertForMaskedLM",
                "model.shape={hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 64,"
                " max_position_embeddings: 32}",
                "data.vocabulary={kind: wordpiece, size: 80}",
                "objective.kind=masked_tokens",
                "recompute=selective",
            ),
            transformers.AutoModelForMaskedLM,
        ),
        (
            (
                "model.architecture=T5ForConditionalGeneration",
                "model.shape={d_model: 32, num_layers: 2, num_heads: 4, d_kv: 8, d_ff: 64}",
                "data.vocabulary={kind: bpe, size: 400, sentinels: 32}",
                "objective.kind=spans",
                "optimizer={name: muon, learning_rate: 1e-2, ema: 0.9}",
            ),
            transformers.AutoModelForSeq2SeqLM,
        ),
    ],
    ids=["masked_tokens", "spans"],
)
def test_other_objectives_train_other_families(
    words: tuple[str, ...], loads: Any, recipe: Path, tmp_path: Path
) -> None:
    here(recipe, tmp_path, *(word for setting in words for word in ("--set", setting)))
    lines = metrics(tmp_path)
    assert lines[-1]["loss"] < lines[0]["loss"]
    loads.from_pretrained(tmp_path / "model")

    settings = TrainRecipe.model_validate_json((tmp_path / "recipe.json").read_text())
    operations = training_operations(make_model(model_config(settings, make_task(settings, tmp_path))), 32)
    assert operations is not None
    ceiling = gemm_rate(torch.float32, device="cpu") * 1e9  # measured once in a process, which is this one
    for told in lines:
        assert told["mfu"] == pytest.approx(operations * told["tokens"] / told["seconds"] / ceiling)
        within = [told["phases"][name] for name in ("data", "forward", "backward", "communication", "optimizer")]
        assert 0.5 * told["seconds"] < sum(within) < 1.01 * told["seconds"]


def test_a_mup_model_is_saved_as_it_was_trained(recipe: Path, tmp_path: Path) -> None:
    here(recipe, tmp_path, "--set", "model.start=mup", "--set", "optimizer.mup_base_width=16", "--steps", "3")
    settings = TrainRecipe.model_validate_json((tmp_path / "recipe.json").read_text())
    trained = make_model(model_config(settings, make_task(settings, tmp_path)))
    saved = open_checkpoint(tmp_path / "checkpoints", 3)
    assert saved is not None
    trained.load_state_dict({name: saved.read(f"master.{name}") for name in trained.state_dict()})
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, trained.logits(trained(ids)), rtol=1e-4, atol=1e-4)


ROWS = """
name: rows
model:
  architecture: BertForSequenceClassification
  shape: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32,
          max_position_embeddings: 16}
data: {format: labelled, train: rows.txt, test: rows.txt, limit: 16, vocabulary: {kind: wordpiece, size: 60}}
objective: {kind: classification}
batch: {rows: 8}
steps: 60
optimizer: {learning_rate: 1e-2}
precision: fp32
"""


@pytest.mark.soak
def test_the_finished_model_is_measured_on_the_test_side(tmp_path: Path) -> None:
    chance = random.Random(2)
    labelled = [("warm", chance.choice(("sun", "fire"))) if chance.random() < 0.5 else ("冷", "ice") for _ in range(64)]
    (tmp_path / "rows.txt").write_text("".join(f"{label} the {word}\n" for label, word in labelled), encoding="utf-8")
    (tmp_path / "rows.yaml").write_text(ROWS, encoding="utf-8")
    told = json.loads(
        run(tmp_path / "rows.yaml", tmp_path / "out", "--json", "--nproc", "2", "--plan", "shard=2").stdout
    )
    assert told["test_accuracy"] == told["test_macro_f1"] == 1.0
    assert json.loads((tmp_path / "out" / "test.json").read_text()) == {"test_accuracy": 1.0, "test_macro_f1": 1.0}


def test_sigterm_saves_and_ends_well(recipe: Path, tmp_path: Path) -> None:
    words = ("--nproc", "2", "--plan", "shard=2", "--set", "steps=100000", "--set", "validation.every=100000")
    with subprocess.Popen(
        command(recipe, tmp_path, *words), env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        until = time.monotonic() + 120
        while newest(tmp_path) < 10 and time.monotonic() < until:
            time.sleep(0.2)
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told[-3000:]
    assert time.monotonic() - asked < 30
    assert newest(tmp_path) == metrics(tmp_path)[-1]["step"]


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_sigterm_while_it_prepares_ends_at_once(recipe: Path, tmp_path: Path, nproc: int) -> None:
    """Learning a vocabulary takes most of a minute here; in most of it Python hears no signal."""
    chance = random.Random(3)
    words = ("".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(600_000))
    (tmp_path / "text.txt").write_text(" ".join(words), encoding="utf-8")
    asks = ("data.vocabulary={kind: bpe, size: 30000}", f"data.sources={tmp_path / 'text.txt'}")
    settings = [word for ask in asks for word in ("--set", ask)]
    line = command(recipe, tmp_path / "out", "--nproc", str(nproc), "--json", *settings)
    with subprocess.Popen(
        line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        until = time.monotonic() + 120
        while (sign := read_sign(tmp_path / "out", nproc - 1)) is None and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(1.5)  # into the library's own code
        assert sign is not None and process.poll() is None
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        told, said = process.communicate(timeout=60)
    assert process.returncode == 0 and time.monotonic() - asked < 15, said[-3000:]
    assert "stopped before the first step; the same command goes on" in said and "Traceback" not in said
    assert told == "" or json.loads(told)["ended"] == "stopped"
    assert (
        not (tmp_path / "out" / "corpus" / "index.json").exists() and not (tmp_path / "out" / "metrics.jsonl").exists()
    )


@pytest.mark.parametrize(("kind", "holds"), [("slurm", "#SBATCH --nodes=2"), ("kubernetes", "kind: Job")])
def test_a_job_file_carries_the_command(kind: str, holds: str, recipe: Path, tmp_path: Path) -> None:
    words = ("--job", kind, "--plan", "shard=8", "--set", "job.nodes=2", "--set", "job.image=danlu:1")
    made = here(recipe, tmp_path, *words)
    assert holds in made and "--plan shard=8" in " ".join(made.split()) and "--nodes 2" in " ".join(made.split())
    assert not list(tmp_path.iterdir())


FROZEN = ("--set", "optimizer.frozen=[blocks.0.*, embedding.*]")


SPLIT = pytest.param(("--nproc", "2", "--plan", "shard=2"), marks=pytest.mark.soak)


@pytest.mark.parametrize("words", [(), ("--set", "precision=bf16"), SPLIT])
def test_frozen_weights_stay_as_they_started(words: tuple[str, ...], recipe: Path, tmp_path: Path) -> None:
    if "--nproc" in words:
        run(recipe, tmp_path, *FROZEN, *words, "--steps", "2")
    else:
        for steps in ("1", "2"):  # what a checkpoint holds is complete
            here(recipe, tmp_path, *FROZEN, *words, "--steps", steps)
    settings = TrainRecipe.model_validate_json((tmp_path / "recipe.json").read_text())
    _, makers = load_model(settings, model_config(settings, make_task(settings, tmp_path)))
    saved = open_checkpoint(tmp_path / "checkpoints", 2)
    assert saved is not None
    kept = {name for name, make in makers.items() if torch.equal(saved.read(f"master.{name}"), make())}
    assert kept == {name for name in makers if name.startswith(("blocks.0.", "embedding."))}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--nproc", "2", "--plan", "tensor=3"), ["tensor 3 = 3 processes, but there are 2", "nearest plan that fits"]),
        (("--plan", "tensr=2"), ["tensr=2 is no part of a plan", "did you mean tensor?"]),
        (("--set", "batch.rows=100000"), ["fewer than the 100,000 that a batch"]),
        (("--set", "model.architecture=Llama"), ["the architecture Llama is not known"]),
        (("--set", "optimizer.momentum=0.9"), ["momentum has no effect where name is adamw"]),
        (("--set", "data.heldout=0.9999"), ["fewer than a window"]),
        (
            ("--nproc", "2", "--plan", "pipeline=2,micro_batches=2", "--set", "batch.growing=[[0, 16], [2, 32]]"),
            ["batch.growing: plan pipeline=2,micro_batches=2 cannot", "pipeline=2 takes windows of one length"],
        ),
        (
            ("--nproc", "2", "--plan", "context=2", "--set", "batch.growing=[[0, 2], [2, 32]]"),
            ["batch.growing: plan context=2", "in windows of 2 tokens, rows of 2 tokens cannot be cut"],
        ),
        (("--plan", "tensor=2,tensor=1"), ["--plan: tensor is named twice"]),
        (("--rendezvous", "node0:29400"), ["rendezvous has no effect on one machine"]),
        (("--set", "launch.grace=60"), ["grace has no effect on one process"]),
        (
            ("--job", "slurm", "--nproc", "4", "--nodes", "3", "--on", "ray", "--json"),
            ["--job: --nproc, --nodes, --on, --json has no effect on a job file", "--set job.nodes=3"],
        ),
        (
            ("--set", "data.heldout=0", "--set", "schedule.kind=plateau"),
            ["schedule.kind plateau has no effect, since nothing is held out", "data.heldout"],
        ),
        (("--set", "data.heldout=0", "--set", "validation.patience=2"), ["validation.patience has no effect"]),
        (("--set", "data.heldout=0", "--set", "checkpoints.best=2"), ["checkpoints.best has no effect"]),
        (("--set", "batch.growing=[[0, 0], [2, 32]]"), ["256 tokens a step cannot be cut into windows of 0"]),
        (("--set", "batch.window=64"), ["batch.window: windows of 64 tokens are longer than the model's context"]),
        (("--set", "batch.growing=[[0, 16], [2, 64]]"), ["batch.growing: windows of 64 tokens are longer"]),
        (
            ("--set", "model.start=mup", "--set", "model.architecture=Gemma3ForCausalLM"),
            ["model.start: such a model could not be saved", "take another start"],
        ),
        (("--set", "optimizer.frozen=[zzz]"), ["no weight that learns is named like zzz", "optimizer.frozen"]),
        (("--set", "optimizer.frozen=['*']"), ["nothing is left to learn"]),
    ],
    ids=lambda value: " ".join(value[-1:]) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_done_is_said_in_one_message(
    words: tuple[str, ...], told: list[str], recipe: Path, tmp_path: Path
) -> None:
    said = here(recipe, tmp_path, *words, code=2)
    assert all(one in said for one in told), said
    assert "Traceback" not in said
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.soak  # tests/train/test_stage.py has compiled and uncompiled steps side by side
@pytest.mark.skipif(not can_compile(), reason="no C++ compiler with Python's headers")
def test_compiling_is_decided_once_and_changes_no_curve(recipe: Path, tmp_path: Path) -> None:
    run(recipe, tmp_path / "eager", "--steps", "7")
    run(recipe, tmp_path / "compiled", "--steps", "3", "--set", "compile=on")
    run(recipe, tmp_path / "compiled", "--steps", "5")  # auto would not compile so short a run; it stays as it began
    run(recipe, tmp_path / "compiled", "--steps", "7", "--nproc", "2", "--plan", "tensor=2")  # and must not be here
    decided = [json.loads((tmp_path / name / "decisions.json").read_text()) for name in ("eager", "compiled")]
    assert [one["compile"] for one in decided] == [False, True]
    for mine, expected in zip(metrics(tmp_path / "compiled"), metrics(tmp_path / "eager"), strict=True):
        assert abs(mine["loss"] - expected["loss"]) < 1e-5

    words = ("--nproc", "2", "--plan", "tensor=2", "--set", "compile=on")
    said = run(recipe, tmp_path / "refused", *words, code=2).stderr
    assert "compile" in said and "tensor=2" in said and not (tmp_path / "refused" / "checkpoints").exists()
