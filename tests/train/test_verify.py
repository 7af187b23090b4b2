"""Dry runs: what the engine would hold, to the byte what it holds; and plans that are tried."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from danlu.cli import app
from danlu.errors import DanluError
from danlu.model.config import Experts, ModelConfig
from danlu.plan.plan import Plan
from danlu.train.ledger import Ledger
from danlu.train.mesh import Mesh, make_mesh
from danlu.train.recipe import TrainRecipe
from danlu.train.trial import whole_lines
from danlu.train.verify import Dry, dry_run, step_ledger
from tests.train.ranks import run_ranks

CONFIG = ModelConfig(
    vocab_size=320, width=64, layers=4, heads=4, kv_heads=2, head_width=16, feedforward_width=160, context=64, tied=True
)
MIXTURE = ModelConfig(
    vocab_size=320, width=64, layers=2, heads=4, kv_heads=4, head_width=16, feedforward_width=160, context=64,
    experts=Experts(count=4, chosen=2, width=96, balance=0.01),
)  # fmt: skip
SETTINGS: dict[str, Any] = {
    "name": "tiny",
    "model": {"architecture": "LlamaForCausalLM", "shape": {}},
    "data": {"sources": ["text.txt"], "vocabulary": "bytes", "heldout": "0%"},
    "batch": {"rows": 8, "window": 64},
    "steps": 2,
    "optimizer": {"clip": 1.0},
}


def recipe(**changes: Any) -> TrainRecipe:
    return TrainRecipe.model_validate(SETTINGS | changes)


def told(ledger: Ledger, rank: int) -> Dry:
    return Dry(rank, ledger.peak, ledger.at_peak())


def really(plans: list[str]) -> dict[str, Dry]:
    """The same steps in earnest, on a process of the default group."""
    meshes = {plan: make_mesh(Plan.read(Plan.parse(plan))) for plan in plans}
    return {
        plan: told(step_ledger(recipe(), CONFIG, mesh, dtype_of(plan), dry=False), mesh.rank)
        for plan, mesh in meshes.items()
    }


def dtype_of(plan: str) -> torch.dtype:
    return torch.bfloat16 if "shard" in plan else torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_one_process_holds_what_a_dry_run_says(dtype: torch.dtype, recompute: str) -> None:
    settings = recipe(recompute=recompute)
    dry = dry_run(settings, CONFIG, Plan(), dtype)
    real = told(step_ledger(settings, CONFIG, Mesh(), dtype, dry=False), 0)
    assert dry == real
    weights = sum(part.numel() for part in _model(CONFIG).parameters())
    assert dry.parts["weights"] == weights * (4 if dtype == torch.float32 else 6)  # masters, and rounded copies
    assert dry.parts["optimizer"] >= weights * 8


def _model(config: ModelConfig) -> torch.nn.Module:
    from danlu.model.stored import without_memory

    return without_memory(config)


PLANS = ["data=2", "shard=2", "shard=2,zero=1,micro_batches=2", "tensor=2", "context=2", "pipeline=2,micro_batches=4"]


@pytest.fixture(scope="module")
def in_earnest() -> list[dict[str, Dry]]:
    return run_ranks(2, really, PLANS)


@pytest.mark.parametrize("plan", PLANS)
def test_two_processes_hold_what_a_dry_run_says(plan: str, in_earnest: list[dict[str, Dry]]) -> None:
    """To the byte; but what a pipeline sends is held until it has gone, which takes its time in earnest alone."""
    for rank, found in enumerate(in_earnest):
        dry, real = dry_run(recipe(), CONFIG, Plan.read(Plan.parse(plan)), dtype_of(plan), rank=rank), found[plan]
        if "pipeline" in plan:
            sent = 2 * 64 * 64 * 4  # bytes of a micro-batch between two stages
            assert abs(dry.peak - real.peak) <= 2 * sent
            assert {name: dry.parts[name] for name in ("weights", "optimizer")}.items() <= real.parts.items()
        else:
            assert dry == real


def test_a_mixture_is_looked_at_as_if_experts_got_equally_many_tokens() -> None:
    """In earnest they do not quite; what is held for a token does not depend on who computes it."""
    dry = dry_run(recipe(), MIXTURE, Plan(), torch.float32)
    real = told(step_ledger(recipe(), MIXTURE, Mesh(), torch.float32, dry=False), 0)
    assert dry.peak == pytest.approx(real.peak, rel=0.02)
    shared = dry_run(recipe(), MIXTURE, Plan(expert=2), torch.float32)
    assert shared.parts["weights"] < dry.parts["weights"]


def test_what_saves_memory_saves_it() -> None:
    held = {plan: dry_run(recipe(), CONFIG, Plan.read(Plan.parse(plan)), torch.bfloat16).peak
            for plan in ("data=4", "shard=4", "shard=4,micro_batches=2")}  # fmt: skip
    assert held["shard=4,micro_batches=2"] < held["shard=4"] < held["data=4"]
    again = dry_run(recipe(recompute="full"), CONFIG, Plan(), torch.float32)
    assert again.peak < dry_run(recipe(), CONFIG, Plan(), torch.float32).peak


def test_a_model_that_fits_nowhere_is_looked_at_in_no_memory() -> None:
    """8e9 weights on 64 processes: states to within the padding of FSDP's parts."""
    big = ModelConfig(vocab_size=128_256, width=4096, layers=2, heads=32, kv_heads=8, head_width=128,
                      feedforward_width=14_336, context=4096)  # fmt: skip
    dry = dry_run(recipe(batch={"rows": 64, "window": 512}), big, Plan(shard=64), torch.bfloat16, accelerated=True)
    weights = sum(part.numel() for part in _model(big).parameters())
    assert dry.parts["weights"] == pytest.approx(4 * weights / 64, rel=1e-3)
    assert dry.parts["optimizer"] == pytest.approx(8 * weights / 64, rel=1e-3)


def test_what_cannot_be_looked_at_is_refused() -> None:
    with pytest.raises(DanluError, match="no dry run is made of a teacher, offload"):
        dry_run(recipe(objective={"teacher": "some"}, offload={"state": "optimizer"}), CONFIG, Plan(), torch.float32)
    with pytest.raises(DanluError, match="key/value heads"):
        dry_run(recipe(), CONFIG, Plan(tensor=4), torch.float32)
    assert not torch.distributed.is_initialized()


def test_a_ledger_counts_what_is_held_and_nothing_else() -> None:
    with Ledger("weights") as ledger:
        first = torch.zeros(100)
        view = first.view(10, 10)[2:]
        with ledger.counting("activations"):
            second = torch.ones(50, dtype=torch.float64)
        assert ledger.total == ledger.peak == 800
        del first
        assert ledger.total == 800, "a view holds it"
        del view
        assert ledger.total == 400
        third = second + 1
        assert ledger.total == 800 and ledger.peak == 800
        third.untyped_storage().resize_(0)
        assert ledger.total == 400
        third.untyped_storage().resize_(1600)
        assert ledger.total == ledger.peak == 2000
    assert ledger.at_peak() == {"activations": 400, "gathered": 1600}
    torch.zeros(3).untyped_storage().resize_(0)
    assert ledger.total == 2000, "outside nothing is counted"


def test_the_best_plans_are_tried_and_the_fastest_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "text.txt").write_text("the furnace 丹炉 turns ore into silver and gold; " * 400, encoding="utf-8")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 48, "max_position_embeddings": 32, "vocab_size": 300,
             "tie_word_embeddings": True}  # fmt: skip
    small = SETTINGS | {
        "model": {"architecture": "LlamaForCausalLM", "shape": shape}, "batch": {"rows": 4, "window": 32},
        "precision": "fp32", "compile": "off",
    }  # fmt: skip
    (tmp_path / "small.yaml").write_text(json.dumps(small), encoding="utf-8")
    words = ["plan", str(tmp_path / "small.yaml"), "--gpus", "cpu", "--try", "2", "--verify", "--json"]
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code == 0, ended.output
    answer = json.loads(ended.stdout)
    fastest, slowest = sorted(answer["trials"], key=lambda one: one["measured_seconds"])
    assert (answer["plan"]["plan"], answer["plan"]["recompute"]) == (fastest["plan"], fastest["recompute"])
    assert answer["runners_up"][0]["plan"] == slowest["plan"] and fastest["plan"] in answer["command"]
    assert all(one["measured_gib"] > 0.05 and one["predicted_seconds"] > 0 for one in answer["trials"])
    parts = answer["dry_run"]["parts"]
    assert answer["dry_run"]["held"] == pytest.approx(sum(part["held"] or 0 for part in parts.values()))
    assert parts["optimizer"]["held"] == pytest.approx(parts["optimizer"]["predicted"], rel=0.01)


def test_machines_that_are_not_here_are_not_tried(tmp_path: Path) -> None:
    assert whole_lines(tmp_path / "none") == []
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 64,
             "max_position_embeddings": 64, "vocab_size": 300}  # fmt: skip
    small = SETTINGS | {"model": {"architecture": "LlamaForCausalLM", "shape": shape}}
    (tmp_path / "small.yaml").write_text(json.dumps(small), encoding="utf-8")
    ended = CliRunner().invoke(app, ["plan", str(tmp_path / "small.yaml"), "--gpus", "8xh100", "--try", "1"])
    assert ended.exit_code == 2 and "cannot be tried on this machine" in ended.output
    ended = CliRunner().invoke(app, ["plan", "--model", "llama-2-7b", "--gpus", "8xh100", "--verify"])
    assert ended.exit_code == 2 and "are for recipes" in ended.output
