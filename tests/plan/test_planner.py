"""The planner: what must hold whatever the coefficients, and how wrong it is on public measurements."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.errors import DanluError
from danlu.model.config import Experts, ModelConfig
from danlu.plan.calibrate import Calibration, calibrate, folds
from danlu.plan.cluster import Cluster, accelerators
from danlu.plan.coefficient import Coefficient
from danlu.plan.counts import total_weights, weights
from danlu.plan.describe import RUN as SCALES
from danlu.plan.describe import Written, ask, ask_fit, find, read_tokens
from danlu.plan.evaluate import cross_validate, evaluate_file, predict_file, regrets, scores
from danlu.plan.explain import changes, whole_run
from danlu.plan.fit import Fit, works
from danlu.plan.jobs import Column, Jobs
from danlu.plan.learned import Learned, different, first_stage, fullest, seconds
from danlu.plan.memory import MEMORY, device_memory
from danlu.plan.plan import Plan, Work, check
from danlu.plan.search import Asked, candidates, search
from danlu.plan.search import given as given_plan
from danlu.plan.shapes import of_config, shape, shapes
from danlu.plan.tables import read_tables
from danlu.plan.time import TIME, step_time
from tests.plan.measured import TABLES, needs_tables

BELIEVED = {name: each.start for name, each in TIME.items()}
HELD = {name: each.start for name, each in MEMORY.items()}
POWER = st.sampled_from((1, 2, 4, 8))


def job(**columns: float | Column) -> Jobs:
    """Llama 3.1 8B on H100s, each column as one likes."""
    plain = {
        "length": 4096, "tensor": 1, "pipeline": 1, "chunks": 1, "balanced": 0, "data": 8, "context": 1, "expert": 1,
        "zero": 1, "sharers": 8, "expert_sharers": 8, "sequence": 1, "micro_rows": 1, "micro_batches": 8,
        "recompute": 0, "flash": 1, "compiled": 0, "weight_bytes": 2, "gemm_bytes": 2, "state_bytes": 12,
        "gradient_bytes": 4, "peak": 989e12, "memory_rate": 3.35e12, "units": 132, "near_rate": 450e9,
        "far_rate": 50e9, "node": 8, "release": 0,
    }  # fmt: skip
    return Jobs.of(**(shape("llama-3.1-8b") | plain | columns))


def gib(jobs: Jobs) -> float:
    return float(fullest(jobs, HELD)[0])


def took(jobs: Jobs) -> float:
    return float(seconds(jobs, BELIEVED)[0])


@settings(deadline=None, max_examples=40)
@given(POWER, POWER, POWER, st.sampled_from((0, 1, 3)))
def test_memory_never_rises_with_what_saves_it(tensor: int, pipeline: int, micro: int, zero: int) -> None:
    plain = job(tensor=tensor, pipeline=pipeline, micro_rows=micro, zero=zero)
    assert gib(plain.but(tensor=2.0 * tensor)) <= gib(plain)
    assert gib(plain.but(recompute=1)) <= gib(plain)
    assert gib(plain.but(recompute=2)) <= gib(plain.but(recompute=1)) * 1.001
    assert gib(plain.but(zero=zero + 1)) <= gib(plain) * 1.001 or zero == 3 or pipeline > 1


@settings(deadline=None, max_examples=40)
@given(POWER, POWER, POWER, st.sampled_from(("peak", "memory_rate", "near_rate", "far_rate")))
def test_time_never_rises_with_faster_hardware(tensor: int, pipeline: int, data: int, what: str) -> None:
    plain = job(tensor=tensor, pipeline=pipeline, data=data, sharers=data)
    assert took(plain.but(**{what: getattr(plain, what) * 2})) <= took(plain) * (1 + 1e-12)


@settings(deadline=None, max_examples=40)
@given(POWER, POWER)
def test_parts_sum_to_the_total(tensor: int, pipeline: int) -> None:
    jobs = job(tensor=tensor, pipeline=pipeline)
    for parts in (step_time(jobs, BELIEVED), device_memory(jobs, HELD)):
        told = sum(float(part[0]) for name, part in parts.items() if name != "total")
        assert told == pytest.approx(float(parts["total"][0]))
        assert all(float(part[0]) >= 0 for part in parts.values())


def test_rows_do_not_see_each_other() -> None:
    tensor = np.array([1.0, 2.0, 4.0, 8.0, 1.0])
    pipeline = np.array([4.0, 2.0, 1.0, 8.0, 1.0])
    together = job(tensor=tensor, pipeline=pipeline, data=16 / tensor)
    for formula, coefficients in ((seconds, BELIEVED), (fullest, HELD), (first_stage, HELD)):
        alone = [formula(together.take(np.array([row])), coefficients)[0] for row in range(5)]
        np.testing.assert_allclose(formula(together, coefficients), alone, rtol=1e-12)


def test_weights_are_counted_as_published() -> None:
    """Llama 3.1: 8,030,261,248 weights (its model card's 8.03B); GPT-3: 175B; Qwen3-30B-A3B: 30.5B."""
    for name, count, tolerance in (
        ("llama-3.1-8b", 8_030_261_248, 0), ("llama-3.1-70b", 70_553_706_496, 0), ("gpt3-175b", 175e9, 0.005),
        ("qwen3-30b-a3b", 30.5e9, 0.005), ("trillion", 1e12, 0.06),
    ):  # fmt: skip
        told = float(weights(job(**shape(name))).total[0])
        assert told == pytest.approx(count, rel=tolerance, abs=0 if tolerance else 1e-3), name


@pytest.mark.parametrize("experts", [None, Experts(8, 2, 96, shared_width=64)])
def test_weights_agree_with_the_model(experts: Experts | None) -> None:
    torch = pytest.importorskip("torch")
    from danlu.model.transformer import Decoder

    config = ModelConfig(vocab_size=320, width=64, layers=3, heads=4, kv_heads=2, head_width=16,
                         feedforward_width=160, context=64, experts=experts)  # fmt: skip
    with torch.device("meta"):
        truth = sum(each.numel() for each in Decoder(config).parameters())
    assert float(weights(job(**of_config(config))).total[0]) == truth


def test_a_fit_finds_what_made_the_data_and_keeps_its_bounds() -> None:
    kinds = {
        "rate": Coefficient(1.0, 0.1, 10.0, 2.0, "1/s", ""), "fixed": Coefficient(1.0, 0.5, 2.0, 2.0, "s", "")
    }  # fmt: skip
    jobs = job(micro_rows=np.arange(1.0, 41.0))

    def formula(some: Jobs, c: dict[str, float]) -> Column:
        return some.micro_rows / c["rate"] + c["fixed"]

    truth = formula(jobs, {"rate": 3.0, "fixed": 1.7})
    truth[5] *= 4  # one run was slowed down by something else
    found = calibrate(formula, kinds, jobs, truth).coefficients
    assert found["rate"] == pytest.approx(3.0, rel=0.02)
    assert found["fixed"] == pytest.approx(1.7, rel=0.05)
    bounded = calibrate(formula, kinds, jobs, formula(jobs, {"rate": 3.0, "fixed": 40.0})).coefficients
    assert 0.5 <= bounded["fixed"] <= 2.0


def test_what_is_known_of_like_jobs_is_used_and_shrunk() -> None:
    kinds = {"rate": Coefficient(1.0, 0.1, 10.0, 0.01, "1/s", "")}
    width = np.repeat([64.0, 128.0], 10)
    jobs = job(width=width, micro_rows=np.tile(np.arange(1.0, 11.0), 2))
    measured = jobs.micro_rows * np.where(width == 64, 1.0, 1.3)
    told = calibrate(lambda some, c: some.micro_rows / c["rate"], kinds, jobs, measured, (("width",),))
    guess = told.predict(lambda some, c: some.micro_rows / c["rate"], jobs)
    slow = float((guess / jobs.micro_rows)[-1])
    assert 1.2 < slow < 1.3  # towards 1.3, not all of it: ten runs count against two of belief
    unlike = told.predict(lambda some, c: some.micro_rows / c["rate"], job(width=32, micro_rows=1))
    assert float(unlike[0]) == pytest.approx(1 / told.coefficients["rate"])


def test_what_is_known_of_a_release_is_for_that_release_alone() -> None:
    kinds = {"rate": Coefficient(1.0, 0.1, 10.0, 0.01, "1/s", "")}
    release = np.repeat([26.02, 26.06, 0.0], 10)
    jobs = job(micro_rows=np.tile(np.arange(1.0, 11.0), 3), release=release)
    measured = jobs.micro_rows * np.where(release == 26.06, 0.7, 1.0)

    def formula(some: Jobs, c: dict[str, float]) -> Column:
        return some.micro_rows / c["rate"]

    told = calibrate(formula, kinds, jobs, measured, (("release", "experts"),))
    guess = told.predict(formula, jobs) * told.coefficients["rate"] / jobs.micro_rows
    assert guess[15] < 0.8 * guess[5]
    assert guess[25] == pytest.approx(1.0)  # of runs that do not tell it nothing is known
    assert different(jobs, list(range(30))) == 10


def test_a_group_is_never_split() -> None:
    groups: list[tuple[str, ...]] = [(name,) for name in "aabbccddeeff"]
    fold = folds(groups)
    assert all(len({fold[place] for place, group in enumerate(groups) if group == name}) == 1 for name in set(groups))


def test_regret_is_what_choosing_by_the_prediction_costs() -> None:
    told, measured = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.5, 9.0, 9.0, 1.0])
    assert regrets(told, measured, [("a",)] * 4) == [(0.5, 0.5)]
    assert regrets(told, measured, [("a",), ("b",), ("c",), ("d",)]) == []


# --- The search -----------------------------------------------------------------------------------------------------


def test_what_is_found_fits_and_can_be_carried_out() -> None:
    asked = Asked(shape("llama-3.1-8b"), Cluster.parse("64xh100"), 8192, 512)
    found = search(asked)
    for choice in (*found.best, *found.pareto):
        plan = Plan.read(Plan.parse(choice.plan))
        assert plan.world == 64
        assert 512 % (plan.readers * plan.micro_batches) == 0
        assert choice.gib < 80e9 / 2**30
        assert choice.low < choice.seconds < choice.high
    times = [choice.seconds for choice in found.pareto]
    held = [choice.gib for choice in found.pareto]
    assert times[0] == min(times)
    assert held == sorted(held, reverse=True)


def test_the_best_is_the_fastest_of_all_that_fit() -> None:
    asked = Asked(shape("llama-2-7b"), Cluster.parse("8xa100-80gb"), 4096, 64)
    jobs = candidates(asked)
    fits = fullest(jobs, HELD) <= 80e9 / 2**30 * 0.94
    fastest = float(seconds(jobs, BELIEVED)[fits].min())
    assert fastest <= search(asked).best[0].seconds <= fastest * 1.02


def test_a_cluster_that_is_too_small_says_by_how_much() -> None:
    with pytest.raises(DanluError, match=r"GiB more than there is") as raised:
        search(Asked(shape("llama-3.1-405b"), Cluster.parse("8xh100"), 8192, 16))
    assert "about" in str(raised.value)


@pytest.mark.parametrize(
    ("model", "gpus", "tokens", "says"),
    [("llama-3.1-8c", "8xh100", "1M", "did you mean llama-3.1-8b"), ("llama-3.1-8b", "8xh10", "1M", "h100"),
     ("llama-3.1-8b", "8xh100", "1GB", "4M"), ("llama-3.1-8b", "8xh100", "5000", "whole number of rows"),
     ("llama-3.1-8b", "0xh100", "1M", "no cluster")],
)  # fmt: skip
def test_bad_input_is_told_in_one_message(model: str, gpus: str, tokens: str, says: str) -> None:
    with pytest.raises(DanluError) as raised:
        ask(model, gpus, 4096, tokens, "bf16")
    assert says in str(raised.value)


def test_tokens_are_read_as_written() -> None:
    assert [read_tokens(text) for text in ("4M", "512k", "65536")] == [4 * 2**20, 512 * 2**10, 65536]
    told = [read_tokens(text, "--tokens", SCALES) for text in ("15T", "1.5b", "4m")]
    assert told == [15 * 10**12, 1_500_000_000, 4 * 10**6]
    for text in ("15T", "0", "-1", "4 MB"):
        with pytest.raises(DanluError, match="no number of tokens"):
            read_tokens(text)


def test_the_data_files_are_whole() -> None:
    for name, each in accelerators().items():
        assert each.peak["bf16"] > (1e11 if each.processor else 1e13), name
        assert 1e9 < each.far <= each.near < each.memory_rate < 1e13
        assert each.memory > (1e9 if each.processor else 1e10) and each.source
    for values in shapes().values():
        assert of_config(ModelConfig(8, 8, 1, 1, 1, 8, 8, 8)).keys() == values.keys()


def test_the_planner_needs_no_torch() -> None:
    code = "import sys, danlu.plan.describe, danlu.plan.evaluate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


MODELS = st.sampled_from(("llama-3.1-8b", "qwen3-30b-a3b", "gpt3-175b"))


@settings(deadline=None, max_examples=60)
@given(MODELS, POWER, POWER, POWER, st.sampled_from((1, 4)), st.sampled_from((1, 2)), st.sampled_from((0, 1, 2)))
def test_memory_never_rises_for_any_kind_of_model(
    name: str, tensor: int, micro: int, sharers: int, expert: int, context: int, recompute: int
) -> None:
    expert = expert if shape(name)["experts"] else 1
    plain = job(**shape(name), tensor=tensor, micro_rows=micro, sharers=sharers, expert_sharers=sharers, expert=expert,
                context=context, data=16, recompute=recompute)  # fmt: skip
    assert gib(plain.but(tensor=2.0 * tensor)) <= gib(plain)
    assert gib(plain.but(context=2.0 * context)) <= gib(plain)
    assert gib(plain.but(sharers=2.0 * sharers, expert_sharers=2.0 * sharers)) <= gib(plain)
    if expert > 1:
        assert gib(plain.but(expert=2.0 * expert)) <= gib(plain)
    if recompute < 2:
        assert gib(plain.but(recompute=recompute + 1.0)) <= gib(plain) * 1.001


# --- What is explained ----------------------------------------------------------------------------------------------

EIGHT = ask("llama-3.1-8b", "64xh100", 8192, "4M", "bf16")


def test_a_whole_run_is_counted_in_hours_and_energy() -> None:
    run = whole_run(EIGHT, 6.0, 15 * 10**12)
    assert run.steps == 3_576_279  # 15e12 / (4 * 2**20), rounded up
    assert run.hours == pytest.approx(run.steps * 6 / 3600)
    assert run.accelerator_hours == pytest.approx(64 * run.hours)
    assert run.kilowatt_hours == pytest.approx(run.accelerator_hours * 0.7 * 0.8)


@pytest.mark.parametrize("gpus", ["64xh100", "64xa100-80gb", "8xh100", "2xl4"])
def test_changes_buy_what_they_say_and_the_cheapest_come_first(gpus: str) -> None:
    asked = ask("llama-3.1-8b" if gpus != "2xl4" else "smollm2-135m", gpus, 2048, "1M", "bf16")
    found = search(asked)
    best, told = found.best[0], changes(asked, found)
    assert 1 <= len(told) <= 3
    assert [each.price for each in told] == sorted(each.price for each in told)
    assert any(each.what.startswith("+") for each in told)
    for each in told:
        assert each.time < -0.02 or each.memory < -0.02
        plan = Plan.read(Plan.parse(each.plan))
        more = int(each.what.split()[0]) if each.what.startswith("+") else 0
        wider = dataclasses.replace(asked, cluster=Cluster(asked.cluster.accelerator, asked.cluster.count + more),
                                    precision="fp8" if "fp8" in each.what else "bf16")  # fmt: skip
        again = given_plan(wider, plan, each.recompute)
        assert again.seconds - best.seconds == pytest.approx(each.seconds)
        assert again.gib - best.gib == pytest.approx(each.gib)
        share = wider.cluster.count / asked.cluster.count
        assert each.price == pytest.approx(again.seconds / best.seconds * share - 1)


def test_a_plan_that_was_found_is_told_alike_when_it_is_given() -> None:
    for gpus in ("64xh100", "8xa100-40gb"):
        asked = ask("qwen3-30b-a3b" if gpus == "64xh100" else "llama-2-7b", gpus, 4096, "2M", "bf16")
        found = search(asked)
        for choice in (*found.best, *found.pareto):
            again = given_plan(asked, Plan.read(Plan.parse(choice.plan)), choice.recompute)
            assert again.seconds == pytest.approx(choice.seconds)
            assert again.gib == pytest.approx(choice.gib)


def test_a_written_plan_is_compared_or_refused() -> None:
    config = ModelConfig(vocab_size=128256, width=4096, layers=32, heads=32, kv_heads=8, head_width=128,
                         feedforward_width=14336, context=8192)  # fmt: skip
    work = Work(config, EIGHT.rows, EIGHT.length)
    found = search(EIGHT)
    for choice in (*found.best, *found.pareto):
        check(Plan.read(Plan.parse(choice.plan)), work, 64)  # what is found, the engine can carry out
    alone = find(EIGHT, written=Written("r.yaml", Plan(data=64), "none", work))["written"]
    assert not alone["fits"]  # 16 bytes a weight and more on every one
    other = find(EIGHT, written=Written("r.yaml", Plan(shard=8, tensor=8, micro_batches=64), "full", work))["written"]
    assert other["fits"]
    wrong = find(EIGHT, written=Written("r.yaml", Plan(shard=3), "full", work))["written"]
    assert "64" in wrong["problem"]


# --- What fits at all -----------------------------------------------------------------------------------------------


def test_the_largest_model_fits_and_no_larger_one_does() -> None:
    said, asked = ask_fit("model", None, "8xa100-80gb", 4096, "1M", "bf16")
    assert works(asked)
    larger = [each for each in shapes().values() if total_weights(each) > total_weights(asked.model)]
    assert larger
    assert not any(works(dataclasses.replace(asked, model=each)) for each in larger)
    assert shape(said.split()[-1]) == asked.model


def test_the_longest_rows_fit_and_longer_ones_do_not() -> None:
    _, asked = ask_fit("context", "llama-3.1-8b", "8xh100", 4096, "1M", "bf16")
    assert asked.length * asked.rows == 2**20
    assert works(asked)
    assert not works(dataclasses.replace(asked, length=2 * asked.length, rows=asked.rows // 2))
    _, short = ask_fit("context", "gpt3-175b", "512xh100", 2048, "1M", "bf16")
    assert short.length == 2048  # it learned no more places


@pytest.mark.parametrize("model", ["smollm2-135m", "llama-3.1-8b", "llama-3.1-70b"])
def test_the_smallest_cluster_works_and_no_smaller_one_of_whole_nodes(model: str) -> None:
    _, asked = ask_fit("cluster", model, "h100", 4096, "1M", "bf16")
    assert works(asked)
    count, node = asked.cluster.count, asked.cluster.accelerator.node
    smaller = range(1, count) if count <= node else range(node, count, node)
    for size in smaller:
        assert not works(dataclasses.replace(asked, cluster=Cluster(asked.cluster.accelerator, size)))


@pytest.mark.parametrize(
    ("fit", "model", "gpus", "says"),
    [("model", "llama-2-7b", "8xh100", "leave it out"), ("cluster", None, "h100", "--model"),
     ("cluster", "llama-2-7b", "8xh100", "say --gpus h100"), ("context", "trillion", "8xh100", "no length")],
)  # fmt: skip
def test_words_that_do_not_fit_together_are_told(fit: Fit, model: str | None, gpus: str, says: str) -> None:
    with pytest.raises(DanluError) as raised:
        ask_fit(fit, model, gpus, 4096, "1M", "bf16")
    assert says in str(raised.value)


# --- Tables ---------------------------------------------------------------------------------------------------------

HEADER = "id model layers hidden ffn heads kv_heads seq vocab gpu n_gpus gpus_per_node framework precision tp pp dp mbs"
HEADER += (
    " gbs n_microbatches vpp_chunks cp ep shard recompute compile iter_s tokens_s_gpu mem_gib notes n_experts topk"
)
RUN = {"id": "a", "model": "gpt", "layers": "24", "hidden": "1024", "heads": "16", "seq": "1024", "gpu": "A100",
       "n_gpus": "8", "framework": "Megatron-DeepSpeed", "tp": "2", "pp": "2", "dp": "2", "mbs": "4", "gbs": "32",
       "iter_s": "0.22"}  # fmt: skip


def write(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, HEADER.split(), restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_row_that_lacks_something_says_what(tmp_path: Path) -> None:
    lacking = [RUN | {"tp": ""}, RUN | {"gpu": "H99"}, RUN | {"framework": "abacus"}, RUN | {"n_gpus": "9"},
               RUN | {"mbs": "four"}]  # fmt: skip
    path = write(tmp_path / "rows.csv", RUN, *lacking)
    assert predict_file(path, tmp_path / "out.csv") == (1, 6)
    with (tmp_path / "out.csv").open() as file:
        made = list(csv.DictReader(file))
    assert 0.05 < float(made[0]["pred_iter_s"]) < 1
    assert float(made[0]["pred_mem_gib"]) > 0
    assert made[0]["pred_note"] == ""
    assert all(row["pred_iter_s"] == row["pred_mem_gib"] == "" for row in made[1:])
    for row, word in zip(made[1:], ("tp", "H99", "abacus", "n_gpus", "four"), strict=True):
        assert word in row["pred_note"]


def test_foreign_and_empty_tables_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "foreign.csv").write_text("a,b\n1,2\n")
    for path in (tmp_path / "empty.csv", tmp_path / "foreign.csv", tmp_path / "none.csv", write(tmp_path / "head.csv")):
        with pytest.raises(DanluError):
            read_tables([path])


def test_nothing_measured_cannot_be_evaluated(tmp_path: Path) -> None:
    with pytest.raises(DanluError, match="no row can be compared"):
        evaluate_file(write(tmp_path / "rows.csv", RUN | {"iter_s": ""}))


@needs_tables
def test_on_one_node_each_group_is_predicted_from_others() -> None:
    told = read_tables([TABLES / "vtrain_single_node_a100.csv"])
    keep = np.flatnonzero(told.jobs.layers <= 16)  # fewer groups, so that the test is short
    groups = [told.groups[row] for row in keep]
    some = dataclasses.replace(
        told, at=[told.at[row] for row in keep], jobs=told.jobs.take(keep), groups=groups,
        stacks=[told.stacks[row] for row in keep], seconds=told.seconds[keep], gib=told.gib[keep],
        first_stage=[told.first_stage[row] for row in keep],
    )  # fmt: skip
    made = scores(some, cross_validate(some, memory=False))
    assert made[0].mean < 6
    assert made[0].regret < 3


@needs_tables
def test_the_command_predicts_and_evaluates(tmp_path: Path) -> None:
    source = TABLES / "simumax_b200_real_vs_pred.csv"
    words = [str(Path(sys.executable).with_name("danlu"))]
    out = tmp_path / "told.csv"
    subprocess.run([*words, "plan", "predict", "--table", str(source), "--out", str(out), "--calibrate", str(source)],
                   check=True, capture_output=True)  # fmt: skip
    with out.open() as file:
        rows = [row for row in csv.DictReader(file) if row["pred_iter_s"]]
    assert len(rows) >= 15
    errors = [abs(float(row["pred_iter_s"]) / float(row["iter_s"]) - 1) for row in rows]
    assert float(np.mean(errors)) < 0.05
    done = subprocess.run([*words, "plan", "evaluate", "--table", str(source), "--calibrate", str(source), "--json"],
                          check=True, capture_output=True, text=True)  # fmt: skip
    assert json.loads(done.stdout)[0]["mean"] == pytest.approx(100 * float(np.mean(errors)), abs=0.01)


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(8)))
def test_order_of_rows_changes_nothing(order: list[int]) -> None:
    jobs = job(tensor=np.array([1.0, 2, 4, 8, 1, 2, 4, 8]), micro_rows=np.array([1.0, 1, 2, 2, 4, 4, 1, 1]))
    at = np.array(order)
    np.testing.assert_allclose(seconds(jobs, BELIEVED)[at], seconds(jobs.take(at), BELIEVED), rtol=1e-12)


def test_what_others_taught_is_trusted_less() -> None:
    own, belief = Calibration({}, spread=0.05), Calibration({}, spread=0.5)
    taught = Learned({("megatron", "h100"): own, ("nanotron", "h100", "one node"): own}, belief)
    assert taught.nearest(("nanotron", "h100", "one node")).spread == 0.05
    assert taught.nearest(("megatron", "h100", "many nodes")).spread == 0.3
    assert taught.nearest(("nemo", "h100", "one node")).spread == 0.3
    assert taught.nearest(("megatron", "a100-80gb", "one node")) is belief


def test_machines_are_started_as_many_as_there_are() -> None:
    assert Cluster.parse("4xh100").launch == "--nproc 4"
    assert Cluster.parse("64xh100").launch.startswith("--nodes 8 --nproc 8 --rendezvous")
