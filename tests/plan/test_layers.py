"""Kinds of layers: what each adds to weights, memory and time, and how models of them are planned."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.errors import DanluError
from danlu.plan.cluster import Cluster
from danlu.plan.counts import operations, stage_layers, total_weights, weights
from danlu.plan.describe import ask
from danlu.plan.jobs import KINDS, Column, Jobs
from danlu.plan.layers import attention_share, halves, seen_share
from danlu.plan.learned import learn_memory, learn_time, predict
from danlu.plan.memory import MEMORY, device_memory, stage_memory
from danlu.plan.mixing import attention_time, mixing_times
from danlu.plan.plan import Plan
from danlu.plan.search import Asked, candidates, search
from danlu.plan.shapes import shape, shapes
from danlu.plan.tables import NEEDED, Table, read_tables
from danlu.plan.time import TIME, step_time
from tests.plan.measured import TABLES, needs_tables

BELIEVED = {name: each.start for name, each in TIME.items()}
HELD = {name: each.start for name, each in MEMORY.items()}
NAMES = sorted({id(columns): name for name, columns in reversed(shapes().items())}.values())
KIND_NAMES = ("deepseek-v2-lite", "deepseek-v3-mtp", "nemotron-h-8b", "nemotron-3-super-120b-a12b-mtp", "mamba2-1.3b",
              "gemma-2-2b", "flan-t5-large", "clip-vit-l-14", "vit-large-16")  # fmt: skip


def job(name: str, **columns: float | Column) -> Jobs:
    """A named model on H100s, each column as one likes."""
    model = shape(name)
    plain = {
        "length": min(2048, model["positions"] or 2048), "tensor": 1, "pipeline": 1, "chunks": 1, "balanced": 0,
        "data": 8, "context": 1, "expert": 1, "zero": 1, "sharers": 8, "expert_sharers": 8, "sequence": 1,
        "micro_rows": 1, "micro_batches": 8, "recompute": 0, "flash": 1, "compiled": 0, "weight_bytes": 2,
        "gemm_bytes": 2, "state_bytes": 12, "gradient_bytes": 4, "peak": 989e12, "memory_rate": 3.35e12, "units": 132,
        "near_rate": 450e9, "far_rate": 50e9, "node": 8, "release": 0,
    }  # fmt: skip
    return Jobs.of(**(model | plain | columns))


def took(jobs: Jobs) -> float:
    return float(step_time(jobs, BELIEVED)["total"][0])


def gib(jobs: Jobs) -> float:
    return float(device_memory(jobs, HELD)["total"][0]) / 2**30


@pytest.mark.parametrize("name", NAMES)
def test_every_named_model_is_a_sum_of_parts(name: str) -> None:
    with np.errstate(all="raise"):
        for parts in (step_time(job(name), BELIEVED), device_memory(job(name), HELD)):
            told = {part: float(value[0]) for part, value in parts.items()}
            assert min(told.values()) >= 0
            assert sum(told.values()) - told["total"] == pytest.approx(told["total"])
    # No accelerator computes faster than its peak, whatever the layers are made of.
    assert float(operations(job(name), half=True)[0]) / 8 / 989e12 < took(job(name))


def test_columns_of_no_kind_change_nothing() -> None:
    alike = {name: 0.0 for name in KINDS}
    for name in ("llama-3.1-8b", "gpt3-175b", "qwen3-30b-a3b"):
        plain = {key: value for key, value in shape(name).items() if key not in KINDS}
        left_out = job(name).take(np.array([0]))
        assert total_weights(plain) == total_weights(plain | alike) == float(weights(left_out).total[0])
        assert took(left_out) == took(job(name, **alike))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(KIND_NAMES), st.sampled_from((1, 2, 4)), st.sampled_from((1, 2, 4)), st.sampled_from((0, 1, 3)))
def test_what_saves_memory_does_so_for_every_kind(name: str, tensor: int, rows: int, zero: int) -> None:
    plain = job(name, tensor=tensor, micro_rows=rows, zero=zero)
    assert gib(plain.but(tensor=2.0 * tensor)) <= gib(plain)
    assert gib(plain.but(recompute=1)) <= gib(plain)
    assert gib(plain.but(recompute=2)) <= gib(plain.but(recompute=1)) * 1.001
    assert gib(plain.but(sharers=16, expert_sharers=16)) <= gib(plain)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(KIND_NAMES), st.sampled_from((1, 2, 4)), st.sampled_from(("peak", "memory_rate", "near_rate")))
def test_faster_hardware_is_never_slower_for_any_kind(name: str, tensor: int, what: str) -> None:
    plain = job(name, tensor=tensor)
    assert took(plain.but(**{what: getattr(plain, what) * 2})) <= took(plain) * (1 + 1e-12)


def test_rows_of_different_kinds_do_not_see_each_other() -> None:
    """A table holds dense models beside hybrids and models of two stacks: each is told as if it were alone."""
    models = [shape(name) | {"length": 77.0} for name in (*KIND_NAMES[:-1], "llama-3.1-8b")]
    together = job("llama-3.1-8b", **{key: np.array([each[key] for each in models]) for key in models[0]})
    for formula, coefficients in ((step_time, BELIEVED), (device_memory, HELD)):
        alone = [float(formula(job("llama-3.1-8b", **each), coefficients)["total"][0]) for each in models]
        np.testing.assert_allclose(formula(together, coefficients)["total"], alone, rtol=1e-12)
    np.testing.assert_allclose(weights(together).total, [total_weights(each) for each in models])


# --- Attention ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4096), st.integers(1, 4096))
def test_a_wider_window_costs_more_and_a_whole_one_as_much_as_none(one: int, other: int) -> None:
    narrow, wide = sorted((one, other))
    jobs = job("llama-3.1-8b", window_layers=32, length=2048)
    assert seen_share(jobs.but(window=narrow))[0] <= seen_share(jobs.but(window=wide))[0] + 1e-12
    assert seen_share(jobs.but(window=max(wide, 2048)))[0] == 0.5
    near = np.tril(np.ones((2048, 2048))) - np.tril(np.ones((2048, 2048)), -narrow) if narrow < 64 else None
    if near is not None:  # the pairs themselves, the diagonal's halves apart
        assert seen_share(jobs.but(window=narrow))[0] * 2048**2 == pytest.approx(near.sum(), rel=0.05)


def test_windows_of_half_the_layers_save_half() -> None:
    jobs = job("llama-3.1-8b", window=128, length=8192)
    times = [attention_time(jobs.but(window_layers=count), BELIEVED)[0][0] for count in (0.0, 16.0, 32.0)]
    assert times[1] == pytest.approx((times[0] + times[2]) / 2)
    assert times[2] < 0.1 * times[0]


def test_latent_attention_computes_more_and_squeezes_what_it_says() -> None:
    """DeepSeek-V3's beside plain attention of 128 heads of as many features: its matrices are far fewer."""
    latent = job("deepseek-v3")
    plain = latent.but(query_rank=0, key_rank=0, turned=0, value_width=0)
    assert weights(latent).attention[0] == 187_105_280  # without its norms; by hand in docs/planner.md
    assert weights(plain).attention[0] > 3.5 * weights(latent).attention[0]
    small, large = (sum(part[0][0] for part in mixing_times(each, BELIEVED)) for each in (latent, plain))
    assert small < 0.5 * large
    assert attention_time(latent, BELIEVED)[0][0] < attention_time(plain, BELIEVED)[0][0]  # narrower values


# --- Hybrids --------------------------------------------------------------------------------------------------------


def test_layers_of_one_part_each_are_halves() -> None:
    hybrid = job("nemotron-h-8b")
    assert halves(hybrid)[0] == 1
    assert attention_share(hybrid)[0] == pytest.approx(4 / 52)
    assert halves(job("mamba2-1.3b"))[0] == 1
    assert halves(job("llama-3.1-8b"))[0] == 2


def test_a_hybrid_of_attention_and_feedforward_layers_is_a_plain_model() -> None:
    """Cut into 64 layers of one part each, Llama has the same weights, operations and nearly the same time."""
    whole = job("llama-3.1-8b")
    apart = whole.but(layers=64, without_attention=32, without_feedforward=32, vectors=4096)
    assert weights(apart).total[0] == weights(whole).total[0]
    assert operations(apart, half=True)[0] == operations(whole, half=True)[0]
    assert took(apart) == pytest.approx(took(whole), rel=1e-9)
    assert gib(apart) == pytest.approx(gib(whole), rel=1e-9)


def test_state_spaces_cost_the_same_for_each_token_of_longer_rows() -> None:
    state, dense = job("mamba2-2.7b", peak=1e15), job("llama-3.2-3b", peak=1e15)
    for jobs, grows in ((state, False), (dense, True)):
        short, long = (took(jobs.but(length=length, micro_batches=2**20 / length)) for length in (8192, 131072))
        assert (long > 1.5 * short) == grows


def test_a_mixture_on_fewer_features_is_smaller_and_faster() -> None:
    narrow = job("nemotron-3-super-120b-a12b", expert=8)
    wide = narrow.but(expert_input=0)
    assert weights(wide).total[0] > 3 * weights(narrow).total[0]
    assert took(wide) > took(narrow)
    assert gib(wide) > gib(narrow)


# --- Tokens beyond the next one -------------------------------------------------------------------------------------


def test_each_further_token_adds_a_block_and_a_head() -> None:
    jobs = job("deepseek-v3", sharers=8)
    more = [jobs.but(ahead=count, ahead_blocks=count) for count in (0.0, 1.0, 2.0)]
    for measure in (took, gib, lambda each: float(operations(each, half=True)[0])):
        first, second, third = map(measure, more)
        assert third - second == pytest.approx(second - first, rel=0.02)
        assert second > first
    again = jobs.but(ahead=2, ahead_blocks=1)  # one block, twice
    assert weights(again).total[0] == weights(more[1]).total[0]
    assert took(again) > took(more[1])


def test_the_last_stage_leaves_layers_to_others_where_it_predicts_further() -> None:
    jobs = job("deepseek-v3-mtp", pipeline=16.0, data=1)
    held = [float(stage_layers(jobs, stage)[0]) for stage in range(16)]
    assert sum(held) == 61
    assert held[-1] == 1


# --- Two stacks, and images -----------------------------------------------------------------------------------------


def test_a_second_stack_is_a_named_part() -> None:
    jobs = job("flan-t5-xl", micro_rows=8)  # enough for the device to take longer than the host
    longer = jobs.but(second_length=4096)
    part = "second stack"
    assert float(step_time(longer, BELIEVED)[part][0]) > 2 * float(step_time(jobs, BELIEVED)[part][0]) > 0
    assert took(longer) > took(jobs)
    assert gib(longer) > gib(jobs)
    assert float(step_time(job("llama-3.1-8b"), BELIEVED)[part][0]) == 0


def test_a_decoder_alone_is_what_is_left_without_the_encoder() -> None:
    whole = job("flan-t5-xl")
    alone = whole.but(second_layers=0, cross=0)
    crossed = 24 * 4 * 2048 * 2048  # attention to the encoder
    encoder = 24 * (4 * 2048 * 2048 + 3 * 2048 * 5120 + 2 * 2048)
    assert weights(whole).total[0] - weights(alone).total[0] == crossed + encoder
    assert took(alone) < 0.6 * took(whole)


@pytest.mark.parametrize(("name", "length"), [("flan-t5-xl", 512), ("clip-vit-l-14", 77), ("vit-huge-14", 257)])
def test_two_stacks_and_images_are_cut_by_rows_weights_and_heads_alone(name: str, length: int) -> None:
    asked = Asked(shape(name), Cluster.parse("16xh100"), length, 2048)
    jobs = candidates(asked)
    assert set(np.unique(jobs.pipeline)) == {1}
    assert set(np.unique(jobs.context)) == {1}
    found = search(asked)
    for choice in found.best:
        assert Plan.read(Plan.parse(choice.plan)).world == 16
        assert choice.gib < 80e9 / 2**30


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "moonlight-16b-a3b", "nemotron-3-nano-30b-a3b", "gpt-oss-20b"])
def test_mixtures_of_other_kinds_find_a_plan(name: str) -> None:
    found = search(Asked(shape(name), Cluster.parse("64xh100"), 4096, 512))
    assert found.fitting > 10
    assert found.best[0].gib < 80e9 / 2**30


def test_rows_that_a_model_cannot_read_are_refused() -> None:
    with pytest.raises(DanluError, match="at most 2048 tokens, not 4096"):
        ask("gpt3-175b", "512xh100", 4096, "1M", "bf16")
    with pytest.raises(DanluError, match="have 197 tokens, not 256"):
        ask("vit-base-16", "8xh100", 256, "1M", "bf16")
    assert ask("vit-base-16", "8xh100", 197, "403456", "bf16").rows == 2048


# --- Rows of tables -------------------------------------------------------------------------------------------------

ROW = {"id": "a", "framework": "NeMo/Megatron-Bridge", "gpu": "GB300", "n_gpus": "64", "seq": "4096", "tp": "1",
       "pp": "1", "dp": "64", "ep": "64", "mbs": "1", "gbs": "512", "precision": "MXFP8", "iter_s": "9"}  # fmt: skip
TEST = ROW | {"framework": "Megatron-LM CI", "layers": "4", "hidden": "512", "heads": "8", "dp": "64", "ep": "1"}


def read(path: Path, *rows: dict[str, str]) -> Table:
    with path.open("w", newline="") as file:
        names = dict.fromkeys((*NEEDED, "notes", *(name for row in rows for name in row)))
        writer = csv.DictWriter(file, list(names), restval="")
        writer.writeheader()
        writer.writerows(rows)
    return read_tables([path])


def test_rows_of_every_kind_are_read(tmp_path: Path) -> None:
    notes = "flags: multi-latent-attention,mtp-num-layers=2,fp8-format=hybrid"
    told = read(
        tmp_path / "rows.csv", ROW | {"model": "DeepSeekV3"}, ROW | {"model": "Nemotron_3_Super"},
        ROW | {"model": "Nemotron_3_Super", "precision": "NVFP4"}, ROW | {"model": "GPT OSS 120B"},
        ROW | {"model": "deepseekv3 (cut to 4 layers)", "layers": "4"}, TEST | {"model": "gpt/mla", "notes": notes},
    )  # fmt: skip
    assert told.notes == {}
    jobs = told.jobs
    assert weights(jobs).total[:4].tolist() == [
        total_weights(shape(name))
        for name in ("deepseek-v3-mtp", *["nemotron-3-super-120b-a12b-mtp"] * 2, "gpt-oss-120b")
    ]
    assert jobs.peak[1] == jobs.peak[2]  # only the experts of a hybrid are computed with 4 bits
    assert (jobs.layers[4], jobs.expert_layers[4], jobs.leading[4], jobs.ahead[4]) == (4, 3, 1, 0)
    latent = (jobs.query_rank[5], jobs.key_rank[5], jobs.head_width[5], jobs.value_width[5], jobs.ahead[5])
    assert latent == (192, 64, 24, 16, 2)


def test_rows_that_do_not_tell_their_layers_are_left_out(tmp_path: Path) -> None:
    hidden = {"hidden": "640", "notes": "flags: multi-latent-attention"}
    told = read(tmp_path / "rows.csv", TEST | {"model": "hybrid/mamba"}, TEST | {"model": "gpt/mla"} | hidden)
    assert len(told.at) == 0
    assert "kind that is not counted" in told.notes[0]
    assert "squeezes" in told.notes[1]


@needs_tables
def test_models_of_latent_attention_are_told_from_those_of_plain_attention() -> None:
    """SimuMax's DeepSeek runs, by coefficients that only its Llama runs taught."""
    told = read_tables([TABLES / "simumax_b200_real_vs_pred.csv"])
    latent = told.jobs.key_rank > 0
    dense, others = np.flatnonzero(~latent), np.flatnonzero(latent)
    assert len(others) == 11
    guess = predict(told, others, learn_time(told, dense), learn_memory(told, dense))
    assert np.mean(np.abs(guess.seconds / told.seconds[others] - 1)) < 0.1
    assert np.mean(np.abs(guess.gib / told.gib[others] - 1)) < 0.15


def test_plain_layers_before_mixtures_fill_the_first_stage() -> None:
    jobs = job("deepseek-v3", pipeline=16.0, data=1, expert=1)
    first, other = (float(stage_memory(jobs, HELD, np.full(1, stage))["weights"][0]) for stage in (0.0, 1.0))
    assert other > 3 * first  # one mixture of four layers, against four
    assert device_memory(jobs, HELD)["weights"][0] >= other
