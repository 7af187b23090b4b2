"""Adapters beside frozen weights, and one device: counts against the engine's own, and what must hold of plans."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from danlu.errors import DanluError
from danlu.model.config import Experts, ModelConfig
from danlu.plan.adapters import GLOBS, TARGETS, Lora, Target, layer_adapters
from danlu.plan.cluster import accelerator
from danlu.plan.counts import of_model, operations, weights
from danlu.plan.describe import ask, ask_fit
from danlu.plan.fit import works
from danlu.plan.jobs import Jobs
from danlu.plan.learned import fullest, seconds
from danlu.plan.memory import GIB, device_memory
from danlu.plan.search import Asked, search
from danlu.plan.shapes import of_config, shape
from danlu.plan.told import adapter_columns
from tests.plan.test_planner import BELIEVED, HELD, gib, job, took

RANKS = st.sampled_from((1, 8, 16, 64))
ALL = {"adapted_attention": 1, "adapted_feedforward": 1}


def config(experts: Experts | None = None, gated: bool = True) -> ModelConfig:
    return ModelConfig(vocab_size=320, width=64, layers=3, heads=4, kv_heads=2, head_width=16, feedforward_width=160,
                       context=64, experts=experts, gated=gated)  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("experts", [None, Experts(8, 2, 96), Experts(4, 1, 32, shared_width=64)])
@pytest.mark.parametrize("gated", [True, False])
def test_adapters_are_counted_as_the_engine_makes_them(experts: Experts | None, target: Target, gated: bool) -> None:
    torch = pytest.importorskip("torch")
    from danlu.model.lora import adapters, add_lora
    from danlu.model.transformer import Decoder

    made = config(experts, gated)
    model = Decoder(made)
    add_lora(model, rank=5, alpha=10.0, dropout=0.0, targets=GLOBS[target], seed=0)
    truth = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert truth == sum(each.lora_down.numel() + each.lora_up.numel() for _, each in adapters(model))
    jobs = of_model(of_config(made)).but(**Lora(5, target).columns)
    dense, banks = layer_adapters(jobs)
    assert float((jobs.layers * (dense + banks))[0]) == truth
    assert torch is not None


def test_eight_billion_weights_by_hand() -> None:
    """Llama 3.1 8B, rank 16 beside all linear layers: 41,943,040 weights learn, and the base has 4.5 bits."""
    jobs = job(data=1, sharers=1, zero=0, micro_batches=1, **Lora(16, base_bits=4).columns)
    dense, banks = layer_adapters(jobs)
    a_layer = 4096 + 4096 + 2 * (4096 + 1024) + 4096 + 4096 + 3 * (4096 + 14336)
    assert float(dense[0]) == 16 * a_layer
    assert float(banks[0]) == 0
    assert float((32 * dense)[0]) == 41_943_040
    parts = {name: float(part[0]) / GIB for name, part in device_memory(jobs, HELD).items()}
    matrices = 32 * (4096 * 128 * 2 * (32 + 8) + 3 * 4096 * 14336)
    others = 8_030_261_248 - matrices
    assert parts["weights"] == pytest.approx((matrices * 4.5 / 8 + 2 * others + 2 * 41_943_040) / GIB)
    assert parts["weights"] == pytest.approx(5.69, abs=0.01)
    assert parts["gradients"] == pytest.approx(4 * 41_943_040 / GIB)
    assert parts["optimizer"] == pytest.approx(12 * 41_943_040 / GIB)
    assert parts["dequantised"] == pytest.approx(2 * matrices / 32 / GIB)


def test_frozen_weights_take_four_operations() -> None:
    full, thin = job(), job(**Lora(16).columns)
    tokens = 8 * 8 * 4096
    matrices = 8_030_261_248 - 4096 * 128256 - 65 * 4096  # without embedding and norms
    scores = 12 * 32 * 4096 * 4096 * 0.5
    assert float(operations(full, True)[0]) == pytest.approx(tokens * (6 * matrices + scores))
    assert float(operations(thin, True)[0]) == pytest.approx(tokens * (4 * matrices + 6 * 41_943_040 + scores))


@settings(deadline=None, max_examples=40)
@given(RANKS, st.sampled_from(TARGETS), st.sampled_from((1, 2, 4)), st.sampled_from((0, 1, 2)), st.sampled_from((0, 3)))
def test_adapters_never_take_more_than_all_weights(
    rank: int, target: Target, micro: int, recompute: int, zero: int
) -> None:
    plain = job(micro_rows=micro, recompute=recompute, zero=zero)
    thin = plain.but(**Lora(rank, target).columns)
    assert gib(thin) < gib(plain)
    assert took(thin) < took(plain) or rank % 8  # products whose rows are no multiple of 16 bytes are slow
    assert gib(thin) <= gib(plain.but(**Lora(2 * rank, target).columns))
    assert took(thin) <= took(plain.but(**Lora(2 * rank, target).columns)) * (1 + 1e-12)
    assert gib(plain.but(**Lora(rank, target).columns)) <= gib(plain.but(**Lora(rank, "all").columns))


@settings(deadline=None, max_examples=30)
@given(RANKS, st.sampled_from(("llama-3.1-8b", "qwen3-30b-a3b")), st.sampled_from((1, 2, 4)))
def test_fewer_bits_take_less_memory_and_more_time(rank: int, model: str, tensor: int) -> None:
    def of(bits: int) -> Jobs:
        return job(
            **shape(model), tensor=tensor, zero=0, sharers=1, expert_sharers=1, **Lora(rank, base_bits=bits).columns
        )

    assert gib(of(4)) < gib(of(8)) < gib(of(16))
    assert took(of(16)) < took(of(8))
    saved = device_memory(of(16), HELD)["weights"] - device_memory(of(4), HELD)["weights"]
    linear = weights(of(16)).dense - shape(model)["layers"] * shape(model)["vectors"] + weights(of(16)).sparse
    assert float(saved[0]) == pytest.approx(float(linear[0]) / tensor * (2 - 4.5 / 8))


@settings(deadline=None, max_examples=30)
@given(RANKS, st.sampled_from(TARGETS), st.sampled_from(("peak", "memory_rate", "near_rate", "far_rate")))
def test_time_of_adapters_never_rises_with_faster_hardware(rank: int, target: Target, what: str) -> None:
    plain = job(zero=3, data=16, sharers=16, **Lora(rank, target, 4).columns)
    assert took(plain.but(**{what: getattr(plain, what) * 2})) <= took(plain) * (1 + 1e-12)


def test_jobs_with_and_without_adapters_do_not_see_each_other() -> None:
    rank, bits = np.array([0.0, 16.0, 16.0, 0.0]), np.array([0.0, 0.0, 4.5 / 8, 0.0])
    together = job(rank=rank, base_bytes=bits, **{name: np.minimum(rank, 1) for name in ALL})
    for formula, coefficients in ((seconds, BELIEVED), (fullest, HELD)):
        alone = [formula(together.take(np.array([row])), coefficients)[0] for row in range(4)]
        np.testing.assert_allclose(formula(together, coefficients), alone, rtol=1e-12)


# --- What is published of others' runs, which nothing was fitted to ------------------------------------------------


def one_a10g(model: str, rows: int, bits: int, rank: int) -> Jobs:
    """LitGPT on one A10G: rows of 512 at most, adapters beside queries and values."""
    device = accelerator("a10g")
    alone = {"data": 1, "sharers": 1, "zero": 0, "node": 1, "micro_batches": 1, "micro_rows": rows, "length": 512}
    on = {"peak": device.peak["bf16"], "memory_rate": device.memory_rate, "units": device.units}
    return job(**shape(model), **alone, **on, **Lora(rank, "attention", bits).columns)


@pytest.mark.parametrize(
    ("model", "rows", "bits", "measured"),
    [
        ("llama-3.1-8b", 1, 16, 19.73),
        ("llama-2-7b", 2, 16, 19.77),
        ("llama-2-7b", 2, 4, 13.68),
        ("llama-3.1-8b", 2, 4, 17.41),
    ],
)
def test_memory_of_published_runs_is_told(model: str, rows: int, bits: int, measured: float) -> None:
    """config_hub/finetune/README.md of LitGPT, peak memory in GB; its rows are as long as their texts, 512 at most."""
    told = gib(one_a10g(model, rows, bits, 32)) * GIB / 1e9
    assert told == pytest.approx(measured, rel=0.15)


# --- One device -----------------------------------------------------------------------------------------------------


def test_a_model_too_large_to_learn_whole_can_be_adapted() -> None:
    with pytest.raises(DanluError, match="GiB more than there is"):
        search(ask("llama-3.1-8b", "rtx-4090", 2048, "64k", "bf16"))
    thin = search(ask("llama-3.1-8b", "rtx-4090", 2048, "64k", "bf16", Lora(16))).best[0]
    thinner = search(ask("llama-3.1-8b", "rtx-4090", 2048, "64k", "bf16", Lora(16, base_bits=4)))
    assert thin.gib < 24e9 / GIB
    assert thinner.pareto[-1].gib < thin.gib
    assert not works(ask("llama-3.1-70b", "rtx-4090", 2048, "64k", "bf16", Lora(16, base_bits=4)))


@pytest.mark.parametrize("bits", [16, 4])
def test_the_largest_batch_fits_and_one_row_more_does_not(bits: int) -> None:
    said, asked = ask_fit("batch", "llama-3.1-8b", "rtx-4090", 2048, "1M", "bf16", Lora(16, base_bits=bits))
    assert works(asked)
    assert asked.micro_rows == asked.rows
    assert f"{asked.rows} x 2,048 tokens" in said
    more = asked.rows + 1
    assert not works(Asked(asked.model, asked.cluster, 2048, more, lora=asked.lora, micro_rows=more))


def test_the_longest_rows_are_longer_with_adapters_and_with_fewer_bits() -> None:
    lengths = [
        ask_fit("context", "llama-3.1-8b", gpus, 4096, "1M", "bf16", lora)[1].length
        for gpus, lora in (("h100", Lora(16)), ("h100", Lora(16, base_bits=4)), ("rtx-4090", Lora(16, base_bits=4)))
    ]
    assert lengths[0] <= lengths[1]
    assert lengths[2] < lengths[1]
    _, small = ask_fit("context", "smollm2-135m", "rtx-4090", 4096, "1M", "bf16")
    assert works(small)


def test_the_largest_model_that_adapters_fit_beside() -> None:
    plain = ask_fit("model", None, "h100", 4096, "1M", "bf16")[1]
    thin = ask_fit("model", None, "h100", 4096, "1M", "bf16", Lora(16, base_bits=4))[1]
    assert float(weights(of_model(thin.model)).total[0]) > float(weights(of_model(plain.model)).total[0])


# --- In words -------------------------------------------------------------------------------------------------------


def planned(*words: str) -> dict[str, Any]:
    from danlu.cli import app

    ended = CliRunner().invoke(app, ["plan", *words, "--json"])
    assert ended.exit_code == 0, ended.output
    found: dict[str, Any] = json.loads(ended.output)
    return found


def refused(*words: str) -> str:
    from danlu.cli import app

    ended = CliRunner().invoke(app, ["plan", *words])
    assert ended.exit_code == 2
    return ended.output


MODEL = ("--model", "llama-3.1-8b", "--gpus", "rtx-4090", "--seq", "2048", "--tokens-per-step", "64k")


def test_adapters_are_asked_for_by_rank() -> None:
    plain = planned(*MODEL, "--lora", "16", "--base-bits", "4", "--lora-target", "attention")
    assert plain["plan"]["gib"] < 22.4
    assert plain["plan"]["memory"]["dequantised"] > 0
    assert plain["command"] is None
    assert "on the processor" in plain["no_command"]
    assert planned(*MODEL, "--fit", "batch", "--lora", "16")["fit"].startswith("the largest batch is")


@pytest.mark.parametrize(
    ("words", "says"),
    [(("--lora", "0"), "rank 0"), (("--lora", "-4"), "rank -4"), (("--lora", "16", "--base-bits", "3"), "3 bits"),
     (("--base-bits", "4"), "all weights learn"), (("--lora-target", "attention"), "all weights learn")],
)  # fmt: skip
def test_what_cannot_be_adapted_is_told(words: tuple[str, ...], says: str) -> None:
    assert says in refused(*MODEL, *words)


def test_the_line_for_a_processor_is_one_that_danlu_run_reads(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from danlu.recipe import Recipe, read_recipe

    (tmp_path / "recipe.yaml").write_text("name: a\nmodel: {base: model}\ndata: {sources: [rows.jsonl]}\n")
    words = ("--model", "smollm2-135m", "--gpus", "cpu", "--seq", "512", "--tokens-per-step", "2k", "--lora", "8")
    answer = planned(*words, "--lora-target", "attention", "--precision", "fp32")
    assert answer["plan"]["recompute"] == "none"
    typed = shlex.split(answer["command"].replace("RECIPE", str(tmp_path / "recipe.yaml")))
    assert typed[:2] == ["danlu", "run"]
    overrides = [word for flag, word in zip(typed[3::2], typed[4::2], strict=True) if flag == "--set"]
    read = read_recipe(Path(typed[2]), overrides, Recipe).recipe
    assert (read.tune.method, read.tune.rank, read.tune.batch_rows, read.data.window) == ("lora", 8, 4, 512)
    assert read.tune.targets == GLOBS["attention"]
    assert read.tune.micro_rows == answer["plan"]["micro_rows"]


def test_rows_of_tables_that_tell_of_adapters_are_read_so() -> None:
    assert adapter_columns("26.06 NeMo Container; LoRA Performance") == Lora(16, "attention").columns
    assert adapter_columns("QLoRA, rank 32") == Lora(32, "all", 4).columns
    assert adapter_columns("26.06 NeMo Container; SFT Performance") == adapter_columns("gpt explorer") == {}
