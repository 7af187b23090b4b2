"""A run that names no plan: which one it gets, what is said of it, and that it keeps it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from danlu.artifact import Artifact
from danlu.errors import DanluError
from danlu.plan.machine import machine_file
from danlu.plan.plan import Plan, Work, problems
from danlu.plan.search import candidates, search
from danlu.train import choosing
from danlu.train.choosing import Beginning, Chosen, choose
from danlu.train.forecast import accelerator_called, check_recipe_plan, config_of, refusals
from danlu.train.precision import Precision
from danlu.train.recipe import TrainRecipe
from tests.plan.test_machine import machine

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 48, "max_position_embeddings": 32}  # fmt: skip
TEXT: dict[str, Any] = {
    "name": "tiny",
    "model": {"architecture": "LlamaForCausalLM", "shape": SHAPE | {"vocab_size": 300}},
    "data": {"sources": ["text.txt"], "vocabulary": "bytes", "heldout": "0%"},
    "batch": {"rows": 8, "window": 32},
    "steps": 6,
    "precision": "fp32",
    "checkpoints": {"every": 3},
}
BERT = {"architecture": "BertForSequenceClassification",
        "shape": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64,
                  "max_position_embeddings": 64, "vocab_size": 300}}  # fmt: skip
ROWS = {
    "model": BERT,
    "data": {
        "format": "labelled",
        "train": ["rows.txt"],
        "limit": 32,
        "vocabulary": {"kind": "wordpiece", "size": 300},
    },
    "objective": {"kind": "classification"},
    "batch": {"rows": 8},
}


@pytest.fixture(autouse=True)
def no_measured_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def recipe(**changes: Any) -> TrainRecipe:
    return TrainRecipe.model_validate(TEXT | changes)


def begin(home: Path, settings: TrainRecipe, world: int = 2, **changes: Any) -> Beginning:
    home.mkdir(parents=True, exist_ok=True)
    length = getattr(settings.data, "limit", None) or settings.batch.window
    work = Work(config_of(settings, Path("recipe.yaml")), settings.own_rows, length)

    def precision() -> Precision:
        return Precision(torch.float32, "as asked")

    def check(plan: Plan) -> None:
        check_recipe_plan(settings, plan)

    made = Beginning(settings, home, work, check, precision, torch.device("cpu"), world, world, False)
    return replace(made, **changes)


def train(home: Path, *words: str) -> tuple[dict[str, Any], str]:
    """`danlu train` on two processes; what it answers, and what it says meanwhile."""
    line = [sys.executable, "-m", "danlu", "train", str(home / "tiny.yaml"), "--out", str(home / "run"), *words]
    done = subprocess.run([*line, "--nproc", "2", "--json"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout), done.stderr


@pytest.mark.soak
def test_two_processes_get_a_plan_keep_it_and_obey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real command: said and noted, kept by a resumed run, overridden by --plan, and the card tells how it was."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "text.txt").write_text("the furnace 丹炉 turns ore into silver and gold; " * 400, encoding="utf-8")
    (tmp_path / "tiny.yaml").write_text(json.dumps(TEXT), encoding="utf-8")
    out = tmp_path / "run"
    first, said = train(tmp_path, "--steps", "3")
    plan = Plan.read(Plan.parse(first["plan"]))
    assert plan.world == 2
    assert f"train: plan {plan.short()}: the fastest of" in said and "--plan data=2 overrides it" in said
    assert said.count("overrides it") == 1, "the first process alone tells"
    chosen = Chosen.read(out)
    assert chosen.plan == plan and chosen.expected is not None

    card = json.loads((out / "card.json").read_text(encoding="utf-8"))
    figures = card["figures"]
    assert figures["predicted_step_seconds"]["value"] == chosen.expected.seconds
    assert figures["predicted_memory"]["value"] == chosen.expected.gib * 2**30
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert figures["memory"]["value"] == max(line["memory_bytes"] for line in lines)
    assert figures["step_seconds"]["value"] == first["step_seconds"] in [line["seconds"] for line in lines]
    assert "expected; a process held" in said
    Artifact.load(out).verify()

    _, said = train(tmp_path, "--steps", "4", "--plan", "tensor=2,micro_batches=2")
    assert "overrides it" not in said
    kept, said = train(tmp_path, "--steps", "5")
    assert kept["plan"] == "tensor=2,micro_batches=2" != first["plan"]
    assert "as in the checkpoint of step 4" in said


@pytest.mark.parametrize(("world", "kind"), [(4, "rows"), (2, "teacher"), (8, "growing"), (4, "compiled")])
def test_what_the_engine_refuses_is_never_chosen(tmp_path: Path, world: int, kind: str) -> None:
    changes: dict[str, Any] = {
        "rows": ROWS,
        "teacher": {"objective": {"teacher": "some"}},
        "growing": {"batch": {"rows": 8, "window": 32, "growing": [[0, 16], [2, 32]]}},
        "compiled": {"compile": "on"},
    }[kind]
    run = begin(tmp_path, recipe(**changes), world)
    asked = run.ask()
    assert len(candidates(asked)) < len(candidates(replace(asked, allows=None)))
    for choice in search(asked, count=40).best:
        plan = Plan.read(Plan.parse(choice.plan))
        assert not any(problems(plan, run.work))
        run.check(plan)
        assert not refusals(run.recipe, plan, run.work, choice.recompute)
        assert choice.recompute == run.recipe.recompute
        if kind in ("rows", "growing", "teacher"):
            assert plan.pipeline == 1
    assert choose(run, None).plan.world == world


def test_where_nothing_is_known_every_process_is_a_copy(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = begin(tmp_path, recipe(), here=1)  # two machines whose links nobody has measured
    chosen = choose(run, None)
    assert chosen.plan == Plan(data=2) and chosen.expected is None
    assert "a copy for each process, because links between machines" in capfd.readouterr().err


def test_rows_that_cannot_be_shared_are_refused_as_ever(tmp_path: Path) -> None:
    with pytest.raises(DanluError, match="cannot be shared"):
        choose(begin(tmp_path, recipe(batch={"rows": 1, "window": 31}), world=7), None)
    with pytest.raises(DanluError, match="there are 2"):
        choose(begin(tmp_path, recipe()), {"tensor": 3})
    assert not (tmp_path / choosing.NOTE).exists(), "what is refused is not noted"


def test_recomputing_is_chosen_where_the_recipe_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine too small for all rows at once: micro-batches and, if it may, recomputing; and it is said."""
    long = recipe(batch={"rows": 64, "window": 32})
    plain = choose(begin(tmp_path / "plain", long, 1), None)
    assert plain.plan == Plan() and plain.recompute == "none" and not plain.why
    assert plain.expected is not None
    monkeypatch.setattr(choosing, "room", lambda asked: plain.expected.gib * 0.999)
    monkeypatch.setattr("danlu.plan.search.room", lambda asked: plain.expected.gib * 0.999)
    fixed = choose(begin(tmp_path / "fixed", long, 1), None)
    assert fixed.plan.micro_batches > 1 and fixed.recompute == "none" and "would be needed" in fixed.why
    assert fixed.expected is not None and fixed.expected.gib < plain.expected.gib
    loose = choose(begin(tmp_path / "loose", long, 1, free=True), None)
    assert loose.expected is not None and loose.expected.gib < plain.expected.gib
    assert Chosen.read(tmp_path / "loose") == loose


def test_what_is_not_expected_to_fit_is_said_before_it_starts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "room", lambda asked: 1e-6)
    monkeypatch.setattr("danlu.plan.search.room", lambda asked: 1e-6)
    chosen = choose(begin(tmp_path, recipe()), None)
    said = capfd.readouterr().err
    assert "the smallest there is" in said and "warning: train: plan" in said and "GiB are there" in said
    assert chosen.plan.world == 2
    choose(begin(tmp_path, recipe()), {"data": 2})
    assert "is expected to need" in capfd.readouterr().err


def test_a_measured_machine_is_planned_for(tmp_path: Path) -> None:
    place = machine_file()
    place.parent.mkdir(parents=True)
    for processor, told in ((True, "2 x measured"), (False, "2 x epyc")):
        machine(name="measured", processor=processor).write(place)
        chosen = choose(begin(tmp_path / told, recipe()), None)
        assert chosen.hardware.startswith(told), "a measured GPU says nothing of a run on the processor"
    place.write_text("{}", encoding="utf-8")
    assert "a copy for each process" in choose(begin(tmp_path / "damaged", recipe()), None).why


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("Tesla V100-SXM2-16GB", "v100-16gb"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA L40S", None),
        ("Quadro K600", None),
    ],
)
def test_drivers_names_are_understood(said: str, meant: str | None) -> None:
    found = accelerator_called(said)
    assert (found.name if found else None) == meant
