"""The planner: what must hold of every prediction, whatever is trained on what."""

from __future__ import annotations

import csv
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from danlu.errors import DanluError
from danlu.plan.calibrate import Calibration, calibrate
from danlu.plan.cluster import Cluster, accelerator, accelerators, read_accelerators
from danlu.plan.coefficient import Coefficient
from danlu.plan.counts import layers_before_last, operations, stage_layers, weights
from danlu.plan.describe import ask
from danlu.plan.evaluate import NOTHING, repeats, scores
from danlu.plan.jobs import Jobs
from danlu.plan.learned import Learned, learn_memory, learn_time, predict, seconds
from danlu.plan.memory import stage_memory
from danlu.plan.mixing import attention_time
from danlu.plan.search import Asked, search
from danlu.plan.shapes import shape
from danlu.plan.tables import Table, read_tables
from danlu.plan.time import TIME, all_reduce_time, exchange_time, gradient_time, local_parts, local_weights, step_time
from tests.plan.measured import TABLES, needs_tables
from tests.plan.test_planner import BELIEVED, HELD, RUN, gib, job, took, write

MODELS = st.sampled_from(("smollm2-135m", "llama-3.1-8b", "llama-3.1-405b", "gpt3-175b", "qwen3-30b-a3b"))
DEVICES = st.sampled_from(sorted({each.name for each in accelerators().values() if each.near}))
POWER = st.sampled_from((1, 2, 4, 8))


@st.composite
def jobs_of_all_kinds(draw: st.DrawFn) -> Jobs:
    """Any known model on any known accelerator, cut in any way."""
    name, device = draw(MODELS), accelerator(draw(DEVICES))
    copies = draw(st.sampled_from((2, 8, 64)))
    expert = draw(st.sampled_from((1, 2))) if shape(name)["experts"] else 1
    return job(
        **shape(name), tensor=draw(POWER), pipeline=draw(st.sampled_from((1, 2, 4))), data=copies, sharers=copies,
        expert=expert, expert_sharers=copies / expert, context=draw(st.sampled_from((1, 2))), zero=draw(POWER) % 4 % 3,
        micro_rows=draw(POWER), micro_batches=draw(st.sampled_from((4, 32))), flash=draw(st.sampled_from((0, 1))),
        recompute=draw(st.sampled_from((0, 1, 2))), compiled=draw(st.sampled_from((0, 1))),
        length=draw(st.sampled_from((512, 4096))), peak=device.peak["bf16"], memory_rate=device.memory_rate,
        units=device.units, near_rate=device.near, far_rate=device.far, node=device.node,
    )  # fmt: skip


@settings(deadline=None, max_examples=80)
@given(jobs_of_all_kinds(), st.sampled_from(("tensor", "zero", "recompute")))
def test_memory_never_rises_with_what_is_cut_or_done_again(jobs: Jobs, what: str) -> None:
    if what == "recompute":
        others = [jobs.but(recompute=level) for level in (0, 1, 2)]
    elif what == "zero":
        others = [jobs.but(zero=level) for level in (0, 1, 2, 3)]
    else:
        others = [jobs.but(tensor=degree) for degree in (1, 2, 4, 8)]
    held = [gib(each) for each in others]
    assert all(later <= before * (1 + 1e-9) for before, later in pairwise(held)), held


@settings(deadline=None, max_examples=80)
@given(jobs_of_all_kinds(), st.sampled_from(("peak", "memory_rate", "near_rate", "far_rate")), st.floats(1.01, 10))
def test_time_never_rises_with_faster_parts(jobs: Jobs, what: str, faster: float) -> None:
    assert took(jobs.but(**{what: getattr(jobs, what) * faster})) <= took(jobs) * (1 + 1e-9)


@settings(deadline=None, max_examples=40)
@given(jobs_of_all_kinds(), st.sampled_from(sorted(TIME)))
def test_every_coefficient_keeps_time_positive_within_its_bounds(jobs: Jobs, name: str) -> None:
    for value in (TIME[name].low, TIME[name].high):
        parts = step_time(jobs, BELIEVED | {name: value})
        assert all(0 <= float(part[0]) < np.inf for part in parts.values())


@settings(deadline=None, max_examples=40)
@given(jobs_of_all_kinds())
def test_more_work_takes_longer_and_more_room(jobs: Jobs) -> None:
    assert took(jobs.but(micro_batches=jobs.micro_batches * 2)) > took(jobs)
    assert took(jobs.but(layers=jobs.layers * 2, expert_layers=jobs.expert_layers * 2)) > took(jobs)
    assert gib(jobs.but(micro_rows=jobs.micro_rows * 2)) >= gib(jobs)


def test_experts_are_summed_only_over_copies_that_hold_the_same() -> None:
    mixture = job(**shape("qwen3-30b-a3b"), tensor=1, data=8, zero=1, expert=8)
    experts = local_parts(mixture)[1]
    assert float(experts[0]) * 8 == float(weights(mixture).expert_layers[0] * weights(mixture).experts[0])
    # With an expert's copies on one process alone, only the rest is summed: as much as a model without experts has.
    alone = gradient_time(mixture, BELIEVED)
    twice = gradient_time(mixture.but(expert=4), BELIEVED)  # each expert on two processes
    assert float(alone[0]) < float(twice[0])
    rest = gradient_time(mixture.but(expert_width=0), BELIEVED)
    assert float(alone[0]) == pytest.approx(float(rest[0]))


def test_learned_positions_are_whole_on_every_tensor_process() -> None:
    """Megatron and this engine add them to whole features."""
    plain = job(**shape("gpt3-175b"), zero=0, tensor=8)
    without = plain.but(positions=0)
    apart = {name: stage_memory(plain, HELD, np.zeros(1))[name] - part
             for name, part in stage_memory(without, HELD, np.zeros(1)).items()}  # fmt: skip
    assert float(apart["weights"][0]) == 2 * 2048 * 12288
    assert float(local_weights(plain)[0] - local_weights(without)[0]) == 2048 * 12288


# --- Tables ---------------------------------------------------------------------------------------------------------


def runs() -> list[dict[str, str]]:
    """As if measured: made of the beliefs, some slower by a tenth."""
    made = []
    for place, (tensor, micro, width) in enumerate(
        (tensor, micro, width) for tensor in (1, 2, 4) for micro in (1, 2, 4) for width in (1024, 2048)
    ):
        made.append(RUN | {"id": str(place), "tp": str(tensor), "pp": "1", "dp": str(8 // tensor), "mbs": str(micro),
                           "hidden": str(width), "mem_gib": str(5 + place % 5)})  # fmt: skip
    return made


def measured(path: Path, rows: list[dict[str, str]]) -> Table:
    read = read_tables([write(path, *rows)])
    slower = np.array([1.1 if int(read.rows[place]["id"]) % 3 == 0 else 1.0 for place in read.at])
    took_each = seconds(read.jobs, BELIEVED) * slower
    told = [row | {"iter_s": repr(value)} for row, value in zip(rows, took_each.tolist(), strict=True)]
    return read_tables([write(path, *told)])


@settings(deadline=None, max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(18)))
def test_the_order_of_a_table_teaches_nothing(tmp_path: Path, order: list[int]) -> None:
    rows = runs()
    told = []
    for some in (rows, [rows[place] for place in order]):
        table = measured(tmp_path / "rows.csv", some)
        every = np.arange(len(table.at))
        made = predict(table, every, learn_time(table, every), learn_memory(table, every))
        ids = [int(table.rows[place]["id"]) for place in table.at]
        told.append({each: (clock, held) for each, clock, held in zip(ids, made.seconds, made.gib, strict=True)})
    for each, (clock, held) in told[0].items():
        assert told[1][each][0] == pytest.approx(clock, rel=1e-5)
        assert told[1][each][1] == pytest.approx(held, rel=1e-5)


def test_some_rows_of_a_table_are_predicted_as_all_of_them(tmp_path: Path) -> None:
    table = measured(tmp_path / "rows.csv", runs())
    some = np.array([3, 11, 7])
    whole = predict(table, np.arange(len(table.at)), *NOTHING)
    part = predict(table.take(some), np.arange(3), *NOTHING)
    np.testing.assert_allclose(part.seconds, whole.seconds[some])
    assert table.take(some).groups == [table.groups[place] for place in some]


def test_noise_is_what_repeats_of_one_run_differ_by(tmp_path: Path) -> None:
    rows = [RUN | {"iter_s": value} for value in ("1.0", "1.2", "1.1")] + [RUN | {"mbs": "2", "iter_s": "9"}]
    table = read_tables([write(tmp_path / "rows.csv", *rows)])
    assert repeats(table.jobs, table.seconds) == [pytest.approx(20.0)]
    told = scores(table, predict(table, np.arange(4), *NOTHING))
    assert told[0].noise == pytest.approx(20.0)
    alone = read_tables([write(tmp_path / "alone.csv", RUN)])
    assert np.isnan(scores(alone, predict(alone, np.arange(1), *NOTHING))[0].noise)


def test_what_software_leaves_unsaid_is_filled_in_as_it_runs(tmp_path: Path) -> None:
    bridge = RUN | {
        "framework": "NeMo/Megatron-Bridge",
        "gpu": "H100",
        "model": "llama",
        "ffn": "4096",
        "vocab": "32000",
    }
    path = write(tmp_path / "rows.csv", bridge | {"precision": "BF16"}, bridge | {"precision": "FP8"}, bridge)
    jobs = read_tables([path]).jobs
    assert jobs.gemm_bytes.tolist() == [2, 1, 1]  # its rows without a precision are of 8 bits
    contradiction = RUN | {"n_microbatches": "2"}  # where 32 rows over 2 copies in fours are 4
    assert read_tables([write(tmp_path / "two.csv", contradiction)]).jobs.micro_batches.tolist() == [4]
    few = read_tables([write(tmp_path / "few.csv", RUN | {"gbs": "4"}, RUN)])
    assert few.at == [1]
    assert "less than a micro-batch" in few.notes[0]


def test_flags_of_a_test_run_are_read(tmp_path: Path) -> None:
    flags = ("flags: disable-bias-linear,kv-channels=128,moe-ffn-hidden-size=1024,moe-layer-freq=([0]*3+[1]*21),"
             "normalization=RMSNorm,position-embedding-type=rope,untie-embeddings-and-output-weights")  # fmt: skip
    row = RUN | {"framework": "Megatron-LM CI (dev image)", "n_experts": "8", "topk": "2", "vocab": "50257"}
    both = read_tables([write(tmp_path / "rows.csv", row, row | {"notes": flags})]).jobs
    jobs, flagged = both.take(np.array([0])), both.take(np.array([1]))
    assert jobs.vocab[0] == flagged.vocab[0] == 50432  # a multiple of 128 for each of two tensor processes
    assert (flagged.head_width[0], flagged.expert_width[0], flagged.expert_layers[0]) == (128, 1024, 21)
    assert (jobs.head_width[0], jobs.expert_width[0], jobs.expert_layers[0]) == (64, 4096, 24)
    assert (flagged.positions[0], flagged.vectors[0], flagged.tied[0]) == (0, 2 * 1024, 0)
    assert (jobs.positions[0], jobs.vectors[0], jobs.tied[0]) == (1024, 4 * 1024 + 9 * 1024, 1)


@pytest.mark.parametrize(("source", "flash"), [("arXiv:2104.04473 Table 1", 0), ("arXiv:2402.15627", 1), ("", 1)])
def test_attention_is_not_fused_before_it_was_known_how(tmp_path: Path, source: str, flash: int) -> None:
    path = tmp_path / "rows.csv"
    write(path, RUN | {"framework": "Megatron-LM", "vocab": "51200"})
    with path.open() as file:
        rows = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "source"])
        writer.writeheader()
        writer.writerows([rows[0] | {"source": source}])
    assert read_tables([path]).jobs.flash.tolist() == [flash]


def test_kin_of_the_same_size_teach_first() -> None:
    one, many, pool = (Calibration({}, spread=spread, runs=runs) for spread, runs in ((1, 1), (1, 2), (1, 3)))
    learned = Learned({("megatron-deepspeed", "a100-80gb"): pool, ("megatron-deepspeed", "a100-80gb", "one node"): one,
                       ("megatron-deepspeed", "a100-80gb", "many nodes"): many}, NOTHING[0].belief)  # fmt: skip
    assert learned.nearest(("megatron", "a100-80gb", "many nodes")).runs == 2
    assert learned.nearest(("megatron", "a100-80gb", "one node")).runs == 1


# --- Printed rates --------------------------------------------------------------------------------------------------


@needs_tables
@pytest.mark.parametrize(
    ("name", "share", "least"),
    [("mosaicml_llm_foundry.csv", "mfu_pct", 100), ("nanotron_ultrascale_h100.csv", "mfu_pct", 800),
     ("torchtitan.csv", "mfu_pct", 4)],
)  # fmt: skip
def test_printed_shares_of_the_peak_follow_from_the_tables_own_times(name: str, share: str, least: int) -> None:
    told = read_tables([TABLES / name])
    rows = [told.rows[place] for place in told.at]
    printed = np.array([float(row[share] or "nan") for row in rows])
    made = 100 * operations(told.jobs, half=False) / told.seconds / told.jobs.world / told.jobs.peak
    ratio = (made / printed)[printed > 0]
    assert len(ratio) >= least
    assert np.abs(ratio - 1).max() < 0.15


@needs_tables
def test_sums_over_more_nodes_go_as_much_slower_as_measured() -> None:
    """Against NCCL's rates on H100s, means over message sizes that the table does not tell: within 2.5 times, as from 1
    to 64 nodes they fall 13 times."""
    with (TABLES / "nccl_bandwidth_h100.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["collective"] == "AllReduce"]
    device, sizes = accelerator("h100"), 2.0 ** np.arange(20, 33)
    jobs = job(node=device.node, near_rate=device.near, far_rate=device.far)
    told = []
    for row in rows:
        group = np.full(1, device.node * float(row["nodes"]))
        times = all_reduce_time(sizes, group, np.ones(1), jobs, {name: each.start for name, each in TIME.items()})
        told.append(float((2 * (group - 1) / group * sizes / times).mean() / 1e9))
    assert all(first > second for first, second in pairwise(told)), "the more nodes, the slower"
    measured = [float(row["GB_s_mean"]) for row in rows]
    assert all(1 / 2.5 < ours / theirs < 2.5 for ours, theirs in zip(told, measured, strict=True)), told


@needs_tables
def test_printed_hardware_rates_follow_from_the_tables_own_times() -> None:
    """BigScience counts 8 operations for each weight and token: everything is computed twice forward."""
    told = read_tables([TABLES / "bigscience_v100.csv"])
    some = [place for place, row in enumerate(told.at) if told.rows[row]["tflops_kind"] == "hardware (params*8*tokens)"]
    table = told.take(np.array(some))
    printed = np.array([float(table.rows[row]["tflops_gpu"] or "nan") for row in table.at])
    jobs = table.jobs
    tokens = jobs.data * jobs.micro_batches * jobs.micro_rows * jobs.length
    ratio = 8 * weights(jobs).total * tokens / table.seconds / jobs.world / 1e12 / printed
    ratio = ratio[~np.isnan(ratio)]
    assert len(ratio) >= 10
    assert np.abs(ratio - 1).max() < 0.15


# --- Bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", ["64xH100-80GiB", "64xH1000", "8xA100-80", "4x80GB", "GB", "-1xh100", "h100x8", ""])
def test_a_cluster_that_cannot_be_read_names_the_nearest_and_how_to_add_one(gpus: str) -> None:
    with pytest.raises(DanluError) as raised:
        Cluster.parse(gpus)
    message = str(raised.value)
    assert "64xH100" in message or ("known:" in message and "hardware.yaml" in message)


def test_units_in_a_name_are_told_apart() -> None:
    with pytest.raises(DanluError, match="did you mean h100-80gb"):
        Cluster.parse("64xH100-80GiB")
    assert Cluster.parse("64xH100-80GB").accelerator.name == "h100"


@pytest.mark.parametrize("tokens", ["4MB", "4MiB", "4Mb/s", "4G", "0x10", "1e6", "", "-4M"])
def test_tokens_with_a_unit_are_refused(tokens: str) -> None:
    with pytest.raises(DanluError, match="no number of tokens"):
        ask("llama-3.1-8b", "8xh100", 4096, tokens, "bf16")


def test_precision_that_an_accelerator_lacks_is_told_with_those_it_has() -> None:
    with pytest.raises(DanluError, match="no fp8 products") as raised:
        search(Asked(shape("llama-2-7b"), Cluster.parse("8xa100"), 4096, 64, precision="fp8"))
    assert "bf16" in str(raised.value)


def test_a_cluster_too_small_says_what_would_do() -> None:
    with pytest.raises(DanluError) as raised:
        search(Asked(shape("llama-3.1-405b"), Cluster.parse("8xh100"), 8192, 512))
    words = str(raised.value).replace(",", "").split()
    enough = int(words[words.index("about") + 1])
    assert enough > 8
    larger = -(-enough // 64) * 64  # whole nodes, and rows that can be shared
    assert search(Asked(shape("llama-3.1-405b"), Cluster.parse(f"{2 * larger}xh100"), 8192, 512)).fitting


def test_no_model_is_cut_by_a_degree_that_its_heads_do_not_allow() -> None:
    asked = Asked(shape("smollm2-135m"), Cluster.parse("8xh100"), 2048, 64)  # 9 heads, 3 of keys and values
    assert all("tensor" not in choice.plan for choice in search(asked, count=50).best)


@pytest.mark.parametrize(
    "content",
    [b"", b"\n\n", b"id;model;layers\n1;gpt;24\n", b"PK\x03\x04\xff\xfe", b"id,model\n\xff\xfe,1\n", b"{\"rows\": []}",
     b"a" * 200_000],
)  # fmt: skip
def test_foreign_files_are_refused_in_one_message(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(DanluError) as raised:
        read_tables([tmp_path / "rows.csv"])
    assert "rows.csv" in str(raised.value)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("iter_s", "fast"),
        ("mem_gib", "40 GB"),
        ("seq", "2k"),
        ("layers", "24 layers"),
        ("tp", "two"),
        ("tp", "0"),
        ("dp", "-2"),
        ("mbs", "0"),
    ],
)
def test_cells_with_units_or_words_are_told(tmp_path: Path, column: str, value: str) -> None:
    table = read_tables([write(tmp_path / "rows.csv", RUN | {column: value}, RUN)])
    assert table.at == [1]
    assert column in table.notes[0] and value in table.notes[0]


@pytest.mark.parametrize(
    ("figure", "value"),
    [
        ("memory", "80"),
        ("memory", "80 GB"),
        ("memory", "80e9x"),
        ("near", "900"),
        ("far", "400"),
        ("peak", "{bf16: 989}"),
    ],
)
def test_an_accelerator_added_in_other_units_is_refused(figure: str, value: str) -> None:
    figures = {"peak": "{bf16: 989.0e+12}", "memory": "80.0e+9", "memory_rate": "3.35e+12", "units": "132",
               "near": "450.0e+9", "far": "50.0e+9", "node": "8", "watts": "700", "names": "[]",
               "source": "mine"}  # fmt: skip
    lines = [f"  {name}: {told}" for name, told in figures.items()]
    assert read_accelerators("\n".join(["mine:", *lines]))["mine"].memory == 80e9
    wrong = [f"  {name}: {told}" for name, told in (figures | {figure: value}).items()]
    with pytest.raises(DanluError, match=f"{figure}.* of mine") as raised:
        read_accelerators("\n".join(["mine:", *wrong]))
    assert "Gb/s" in str(raised.value)


def test_experts_that_lie_whole_on_tensor_processes_are_cut_as_often(tmp_path: Path) -> None:
    row = RUN | {"framework": "Megatron-LM CI (dev image)", "n_experts": "8", "topk": "2", "pp": "1", "dp": "4",
                 "ep": "8", "vocab": "50257"}  # fmt: skip
    flagged = row | {"ep": "4", "notes": "expert-tensor-parallel-size=1"}
    jobs = read_tables([write(tmp_path / "rows.csv", row, flagged, row | {"ep": "4"})]).jobs
    assert (jobs.tensor * jobs.expert).tolist() == [8, 4, 8]
    assert (jobs.tensor * jobs.expert * jobs.expert_sharers).tolist() == [8, 8, 8]


# --- What softwares differ in ---------------------------------------------------------------------------------------


def test_a_row_in_neighbouring_pieces_keeps_its_last_process_longest() -> None:
    whole = job(length=65536, context=4, data=2, sharers=2)
    (even, _), (uneven, _) = (attention_time(whole.but(uneven=kind), BELIEVED) for kind in (0, 1))
    assert float(uneven[0] / even[0]) == pytest.approx(2 - 1 / 4)
    alone = job(length=8192)
    assert took(alone.but(uneven=1)) == took(alone)  # nothing is cut


def test_what_is_done_again_lies_between_nothing_and_all() -> None:
    none, some, half, full = (
        took(job(recompute=level, redone=share)) for level, share in ((0, 0), (1, 0), (1, 0.5), (2, 0))
    )
    assert none < some < half < full
    assert took(job(recompute=2, redone=0.5)) == full


def test_sums_that_travel_beside_products_cost_no_more() -> None:
    for tensor in (2, 8):
        cut = job(tensor=tensor, data=8, near_rate=50e9)
        assert took(cut.but(beside=1)) < took(cut)
    assert took(job(beside=1)) == took(job())


def test_tokens_travel_to_the_nodes_that_their_experts_are_on() -> None:
    mixture = job(**shape("qwen3-30b-a3b"), data=64, sharers=64, micro_rows=4, far_rate=1e9)
    near, far, farther = (float(exchange_time(mixture.but(expert=count), BELIEVED)[0]) for count in (8, 16, 64))
    assert near < far < farther
    size = 4 * 4096 * 2048 * 2 * 4  # bytes of a micro-batch's tokens, there and back, forward and backward
    reached = 7 * (1 - (7 / 8) ** 8)
    assert farther == pytest.approx(size * reached / (1e9 * BELIEVED["far"]) + 4 * BELIEVED["far_delay"])


def test_a_cut_by_cost_is_as_slow_as_its_fullest_stage() -> None:
    jobs = job(**shape("llama-3.1-8b"), pipeline=np.array([2.0, 4.0, 8.0]), balanced=1)
    fullest, before = layers_before_last(jobs)
    for place, pipeline in enumerate((2, 4, 8)):
        one = jobs.take(np.array([place]))
        held = [float(stage_layers(one, float(stage))[0]) for stage in range(pipeline)]
        assert sum(held) == 32
        assert float(fullest[place]) == max(held[:-1])
        assert float(before[place]) == sum(held[:-1])


def test_narrower_circles_believe_what_wider_ones_taught() -> None:
    kinds = {"rate": Coefficient(1.0, 0.01, 100.0, 1.0, "1/s", "")}

    def formula(some: Jobs, c: dict[str, float]) -> np.ndarray:
        return some.micro_rows / c["rate"]

    many, one = job(micro_rows=np.arange(1.0, 41.0)), job(micro_rows=2)
    wider = calibrate(formula, kinds, many, many.micro_rows / 20)
    assert wider.coefficients["rate"] == pytest.approx(20, rel=0.01)
    narrow = calibrate(formula, kinds, one, np.array([2 / 25.0]), wider=wider)
    believed = calibrate(formula, kinds, one, np.array([2 / 25.0]))
    assert 20 < narrow.coefficients["rate"] < 25
    assert believed.coefficients["rate"] < narrow.coefficients["rate"]
