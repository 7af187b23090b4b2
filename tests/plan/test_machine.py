"""Measured machines: the file that travels, how processes share a processor, and what runs on it teach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from danlu.cli import app
from danlu.errors import DanluError
from danlu.plan.calibrate import believed
from danlu.plan.cluster import Cluster, accelerator
from danlu.plan.explain import changes, whole_run
from danlu.plan.fit import smallest_cluster
from danlu.plan.formulas import device_memory, step_time
from danlu.plan.jobs import Column, Jobs
from danlu.plan.learned import calibrations, fullest, seconds
from danlu.plan.machine import Figures, Machine, Taught, Trial, machine_file, read_machine
from danlu.plan.memory import MEMORY
from danlu.plan.plan import Plan
from danlu.plan.processor import PROCESSOR_TIME
from danlu.plan.processor_memory import PROCESSOR_MEMORY
from danlu.plan.search import Asked, search
from danlu.plan.search import given as given_plan
from danlu.plan.shapes import shape
from danlu.plan.teach import Ran, teach, together, trials
from danlu.plan.time import TIME

CLOCK, SCALE = believed(PROCESSOR_TIME, 0.2), believed(PROCESSOR_MEMORY, 0.1)
GPU_CLOCK, GPU_SCALE = believed(TIME, 0.2), believed(MEMORY, 0.1)
SMALL = shape("smollm2-135m")


def figures(**changed: Any) -> Figures:
    plain = {"name": "some cores", "processor": True, "peak": {"fp32": 2e11, "bf16": 4e11}, "memory": 16e9,
             "memory_rate": 3e10, "units": 4, "near": 2e9, "node": 4}  # fmt: skip
    return Figures(**(plain | changed))


def machine(**changed: Any) -> Machine:
    seen = figures(**changed)
    clock, scale = (CLOCK, SCALE) if seen.processor else (GPU_CLOCK, GPU_SCALE)
    trial = Trial(what="one", seconds=1, optimizer_seconds=0.1, gib=1, predicted_seconds=1.1, predicted_gib=0.9)
    return Machine(figures=seen, time=Taught.of(clock), memory=Taught.of(scale), trials=(trial,), by="a test",
                   when="2026-01-01T00:00:00+00:00", torch="2", seconds=1.5)  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    machine().write(tmp_path / "machine.json")
    return tmp_path / "machine.json"


def asked(file: Path, count: int = 1, **changed: Any) -> Asked:
    plain: dict[str, Any] = {"length": 512, "rows": 8, "precision": "fp32"}
    return Asked(SMALL, Cluster.parse(f"{count}x{file}"), **(plain | changed))


def test_a_machine_comes_back_as_it_was_written(file: Path) -> None:
    assert read_machine(file) == machine()
    clock, scale = calibrations(Cluster.parse(str(file)))
    assert (clock.coefficients, clock.spread) == (CLOCK.coefficients, CLOCK.spread)
    assert scale.coefficients == SCALE.coefficients


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("kind",), "another", "no measured machine"),
        (("figures", "memory"), -1, "figures.memory"),
        (("figures", "memory"), "16 GB", "figures.memory"),
        (("figures", "memory"), 16, "figures.memory"),
        (("figures", "near"), 1.4, "figures.near"),
        (("figures", "peak", "fp32"), 0.2, "figures.peak.fp32"),
        (("figures", "colour"), "red", "figures.colour"),
        (("time", "coefficients", "gemm"), 9.0, "not between"),
        (("memory", "coefficients", "fixed"), 0.0, "not between"),
        (("time", "coefficients", "magic"), 1.0, "another version"),
        (("figures", "processor"), False, "another version"),
    ],
)
def test_a_damaged_file_is_refused(file: Path, where: tuple[str, ...], value: Any, said: str) -> None:
    read = json.loads(file.read_text())
    inner = read
    for name in where[:-1]:
        inner = inner[name]
    inner[where[-1]] = value
    file.write_text(json.dumps(read))
    with pytest.raises(DanluError, match=said) as raised:
        Cluster.parse(f"2x{file}")
    assert str(file) in str(raised.value)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    for text, said in (("[1, 2]", "no measured machine"), ("{", "cannot be read"), ("\0", "cannot be read")):
        path.write_text(text)
        with pytest.raises(DanluError, match=said):
            read_machine(path)
    with pytest.raises(DanluError, match="no such file"):
        read_machine(tmp_path / "none.json")


def test_processes_share_a_processor(file: Path) -> None:
    whole = Cluster.parse(str(file)).share
    for count in (2, 4):
        part = Cluster.parse(f"{count}x{file}").share
        assert part.units == 4 // count
        for name in ("memory", "memory_rate"):
            assert getattr(part, name) * count == pytest.approx(getattr(whole, name))
        assert part.peak["bf16"] * count == pytest.approx(whole.peak["bf16"])
    with pytest.raises(DanluError, match="4 cores, fewer than 5"):
        Cluster.parse(f"5x{file}")
    assert Cluster.parse(f"3 X {file}").launch == "--nproc 3"


def test_a_process_told_to_use_fewer_threads_leaves_cores_to_others(tmp_path: Path) -> None:
    machine(units=1).write(tmp_path / "one.json")
    one, four = (Cluster.parse(f"{count}x{tmp_path / 'one.json'}").share for count in (1, 4))
    assert one.peak == four.peak
    assert four.memory * 4 == one.memory


def test_gpus_are_not_shared(tmp_path: Path) -> None:
    machine(processor=False, node=2, near=None).write(tmp_path / "gpus.json")
    two = Cluster.parse(f"2x{tmp_path / 'gpus.json'}")
    assert two.share == two.accelerator
    with pytest.raises(DanluError, match="2 accelerators, fewer than 3"):
        Cluster.parse(f"3x{tmp_path / 'gpus.json'}")


def test_what_runs_taught_decides(file: Path, tmp_path: Path) -> None:
    read = json.loads(file.read_text())
    read["time"]["coefficients"]["gemm"] /= 2
    for name in ("fixed", "group"):
        read["memory"]["coefficients"][name] *= 2
    slow = tmp_path / "slow.json"
    slow.write_text(json.dumps(read))
    for count in (1, 2):
        fast, other = search(asked(file, count)).best[0], search(asked(slow, count)).best[0]
        assert other.seconds > 1.2 * fast.seconds
        assert other.memory["fixed"] == pytest.approx(2 * fast.memory["fixed"])
        assert fast.high / fast.seconds == pytest.approx(np.exp(CLOCK.spread))


def test_a_machine_is_planned_as_a_whole(file: Path) -> None:
    found = search(asked(file, 2))
    assert all(each.gib < 8 for each in found.best)
    assert {"matrix products", "optimizer", "communication"} <= set(found.best[0].times)
    assert not [change for change in changes(asked(file, 2), found) if change.what.startswith("+")]
    assert smallest_cluster(asked(file)).cluster.count == 1
    run = whole_run(asked(file), 1.0, 10**6)
    assert run.kilowatt_hours is None and run.watts is None
    with pytest.raises(DanluError, match="too few"):
        smallest_cluster(asked(file, rows=1, length=2**20))


def test_the_command_plans_with_a_machine(file: Path) -> None:
    words = ["plan", "--model", "smollm2-135m", "--seq", "512", "--tokens-per-step", "4k", "--precision", "fp32"]
    told = CliRunner().invoke(app, [*words, "--gpus", f"2x{file}", "--tokens", "1M"])
    assert told.exit_code == 0, told.output
    assert "what they draw is not known" in told.output
    assert "--nproc 2" in told.output
    for more, said in ((["--probe"], "plans for nothing"), (["--out", "x.json", "--gpus", "h100"], "--out is for")):
        refused = CliRunner().invoke(app, [*words, *more])
        assert refused.exit_code == 2 and said in refused.output
    assert "name the cluster" in CliRunner().invoke(app, words).output


def test_the_cache_folder_can_be_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine_file() == tmp_path / "danlu" / "machine.json"


def test_processors_of_the_data_file_can_be_planned_for() -> None:
    server, laptop = accelerator("cpu"), accelerator("cpu-laptop")
    assert server.processor and laptop.processor
    quick = search(Asked(SMALL, Cluster.parse("cpu-laptop"), 512, 8)).best[0]
    slow = search(Asked(SMALL, Cluster.parse("cpu"), 512, 8)).best[0]
    assert quick.seconds < slow.seconds


# --- The formulas ---------------------------------------------------------------------------------------------------

ROWS = st.sampled_from((1, 2, 4))
DEGREES = st.sampled_from(("data=1", "shard=2", "tensor=2", "shard=2,tensor=2", "data=2", "pipeline=2,micro_batches=2"))
SHAPES = st.sampled_from(("smollm2-135m", "gpt2", "qwen3-30b-a3b", "llama-3.2-1b"))
PRECISION = st.sampled_from(("fp32", "bf16"))


def job(name: str = "smollm2-135m", plan: str = "data=1", rows: int = 4, precision: str = "bf16",
        recompute: str = "none", **changed: Any) -> Jobs:  # fmt: skip
    from danlu.plan.cluster import measured
    from danlu.plan.search import planned

    made = Plan.read(Plan.parse(plan))
    cluster = Cluster(measured(figures(**changed), "here"), made.world)
    rows *= made.readers * made.micro_batches
    return planned(Asked(shape(name), cluster, 512, rows, precision), made, recompute)


@settings(deadline=None, max_examples=60)
@given(SHAPES, DEGREES, ROWS, PRECISION, st.sampled_from(("none", "selective", "full")))
def test_parts_are_a_sum(name: str, plan: str, rows: int, precision: str, recompute: str) -> None:
    one = job(name, plan, rows, precision, recompute)
    for parts in (step_time(one, CLOCK.coefficients), device_memory(one, SCALE.coefficients)):
        told = sum(float(part[0]) for each, part in parts.items() if each != "total")
        assert told == pytest.approx(float(parts["total"][0]))
        assert all(float(part[0]) >= 0 for part in parts.values())


@settings(deadline=None, max_examples=60)
@given(SHAPES, DEGREES, ROWS, PRECISION, st.sampled_from(("peak", "memory_rate", "near_rate")))
def test_faster_hardware_is_never_slower(name: str, plan: str, rows: int, precision: str, what: str) -> None:
    one = job(name, plan, rows, precision)
    faster = one.but(**{what: getattr(one, what) * 2})
    assert seconds(faster, CLOCK.coefficients)[0] <= seconds(one, CLOCK.coefficients)[0]


@settings(deadline=None, max_examples=60)
@given(SHAPES, ROWS, PRECISION)
def test_what_saves_memory_saves_it(name: str, rows: int, precision: str) -> None:
    def held(**changed: Any) -> float:
        return float(fullest(job(name, rows=rows, precision=precision, **changed), SCALE.coefficients)[0])

    assert held(recompute="full") <= held() * (1 + 1e-12)  # equal where the peak is at the end
    assert held(plan="shard=4") <= held(plan="shard=2")
    assert held(plan="tensor=4") <= held(plan="tensor=2")


def test_rows_do_not_see_each_other() -> None:
    some = [job(plan=plan, rows=rows) for plan in ("data=1", "shard=2", "tensor=2") for rows in (1, 4)]
    for formula, known in ((seconds, CLOCK), (fullest, SCALE)):
        alone = np.concatenate([formula(one, known.coefficients) for one in some])
        np.testing.assert_allclose(formula(together(some), known.coefficients), alone, rtol=1e-12)


def test_recomputing_takes_as_much_longer_as_a_forward_pass() -> None:
    plain, again = (step_time(job(recompute=how), CLOCK.coefficients) for how in ("none", "full"))
    assert again["matrix products"][0] == pytest.approx(plain["matrix products"][0] * 4 / 3)
    assert again["optimizer"][0] == plain["optimizer"][0]


def test_runs_teach_what_made_them() -> None:
    """Coefficients moved by up to a half are found again: jobs that nobody measured are told within 5 %."""
    chance = np.random.default_rng(0)
    truth = {name: float(np.clip(each.start * np.exp(chance.uniform(-0.4, 0.4)), each.low, each.high))
             for name, each in PROCESSOR_TIME.items()}  # fmt: skip
    held = {name: float(np.clip(each.start * np.exp(chance.uniform(-0.2, 0.2)), each.low, each.high))
            for name, each in PROCESSOR_MEMORY.items()}  # fmt: skip
    some = [job(name, plan, rows, precision)
            for name in ("smollm2-135m", "gpt2", "llama-3.2-1b") for plan in ("data=1", "shard=2", "tensor=2")
            for rows in (1, 4) for precision in ("fp32", "bf16")]  # fmt: skip
    runs = [ran(one, truth, held) for one in some]
    apart = runs[::3]
    clock, scale = teach([each for number, each in enumerate(runs) if number % 3])
    unseen = together([each.job for each in apart])
    np.testing.assert_allclose(clock.predict(seconds, unseen), [each.seconds for each in apart], rtol=0.05)
    np.testing.assert_allclose(scale.predict(fullest, unseen), [each.gib for each in apart], rtol=0.05)
    for name, each in PROCESSOR_TIME.items():
        assert each.low <= clock.coefficients[name] <= each.high
    assert [trial.seconds for trial in trials(runs, clock, scale)] == [each.seconds for each in runs]


def ran(one: Jobs, truth: dict[str, float], held: dict[str, float]) -> Ran:
    parts = step_time(one, truth)
    return Ran("one", one, float(parts["total"][0]), float(parts["optimizer"][0]), float(_gib(one, held)[0]))


def _gib(one: Jobs, held: dict[str, float]) -> Column:
    return fullest(one, held)


def test_one_plan_is_told_as_the_search_tells_it(file: Path) -> None:
    best = search(asked(file, 2)).best[0]
    again = given_plan(asked(file, 2), Plan.read(Plan.parse(best.plan)), best.recompute)
    assert again.seconds == pytest.approx(best.seconds)


@pytest.mark.soak
def test_this_machine_can_be_measured(tmp_path: Path) -> None:
    """A probe of three tiny runs: every figure is there, and the file plans."""
    pytest.importorskip("torch")
    from danlu.device.plan_probe import Sample, plan_probe

    samples = [Sample(64, 2, 2, 2, 128, 300, 4, 64), Sample(64, 2, 2, 2, 128, 300, 8, 64, "bf16"),
               Sample(96, 2, 2, 2, 128, 600, 4, 64, recompute="full")]  # fmt: skip
    found = plan_probe(samples)
    found.write(tmp_path / "machine.json")
    assert read_machine(tmp_path / "machine.json") == found
    assert 1e9 < found.figures.peak["fp32"] < 1e15
    assert 1e9 < found.figures.memory_rate < 1e13
    assert len(found.trials) == 3
    assert all(0.1 < each.gib < 4 for each in found.trials)
    assert search(asked(tmp_path / "machine.json")).best[0].seconds > 0
