"""The clock: profiles that travel, sums that are those of the parts, and a stack that llama.cpp really runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from danlu.cli import app
from danlu.device import clock
from danlu.device.clock import probe_device
from danlu.device.engine import Engine
from danlu.device.profile import READ, CacheRate, DeviceProfile, Rate, Rest
from danlu.device.stack import Stack, bytes_per_weight, fills, layers_for, write_stack
from danlu.device.workload import Matrix, Workload
from danlu.errors import DanluError
from danlu.gguf_header import read_header


def profile(**changes: Any) -> DeviceProfile:
    """A device where a number of q4_0 takes 1 ns in long rows, 2 ns in rows of 500."""
    rates = (("q4_0", 500, 2e-9), ("q4_0", 1000, 1.5e-9), ("q4_0", 4000, 1.125e-9), ("q8_0", 500, 3e-9))
    made = {
        "engine": "0.0.1",
        "processor": "none",
        "instructions": (),
        "threads": 2,
        "memory": 10**9,
        "bandwidth": 1e10,
        "matrices": tuple(Rate(type=type, columns=n, batch=1, seconds=each) for type, n, each in rates),
        "rest": (Rest(batch=1, layer=1e-5, step=2e-5),),
        "caches": (CacheRate(type="f16", batch=1, seconds=1e-9),),
        "word": 1e-9,
        "seconds": 1.0,
    }
    return DeviceProfile(**(made | changes))


def test_times_lie_on_a_line_between_what_was_measured() -> None:
    known = profile()
    for columns, each in ((500, 2e-9), (2000, 1.25e-9), (4000, 1.125e-9), (100, 2e-9), (10**5, 1.125e-9)):
        assert known.matrix_seconds(Matrix("q4_0", 7, columns)) == pytest.approx(7 * columns * each)


def test_a_step_is_the_sum_of_its_parts() -> None:
    work = Workload((Matrix("q4_0", 10, 500), Matrix("q8_0", 20, 500)), layers=3, attention=64, words=1000)
    parts = 10 * 500 * 2e-9 + 20 * 500 * 3e-9 + 3 * 1e-5 + 2e-5 + 1000 * 1e-9 + 100 * 3 * 64 * 1e-9
    assert profile().seconds_for(work, depth=100) == pytest.approx(parts)


def test_what_was_not_measured_is_not_guessed() -> None:
    with pytest.raises(DanluError, match="says nothing of q2_k"):
        profile().matrix_seconds(Matrix("q2_k", 1, 512))
    assert profile().knows(["f16"]) and not profile().knows(["f16", "q8_0"])
    with pytest.raises(DanluError, match="a cache of q8_0"):
        profile().rest_seconds(Workload((), 1, 64, 10), cache="q8_0")


def test_a_profile_travels_and_another_engine_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "device.json"
    profile().save(file)
    assert DeviceProfile.load(file) == profile()
    assert "was measured with llama-cpp-python 0.0.1" in capsys.readouterr().err
    broken = json.loads(file.read_text()) | {"threads": 0}
    file.write_text(json.dumps(broken))
    for place in (file, tmp_path / "none.json", Path(__file__)):
        with pytest.raises(DanluError, match=r"cannot be read|is no device profile"):
            DeviceProfile.load(place)


def test_a_stack_is_what_its_name_says(tmp_path: Path) -> None:
    stack = Stack("q4_0", 128, 3, words=96)
    write_stack(stack, tmp_path / "stack.gguf")
    work = Workload.of_file(tmp_path / "stack.gguf")
    assert work == Workload.of_stack(stack)
    assert sum(matrix.rows * matrix.columns for matrix in work.matrices) == stack.weights + 96 * 128
    header = read_header(tmp_path / "stack.gguf")
    assert header.size > stack.weights * bytes_per_weight("q4_0")
    assert layers_for("q4_0", 128, stack.weights * bytes_per_weight("q4_0")) == 3
    assert fills("q4_0", 576) and not fills("q4_k", 576)


def test_a_real_model_asks_for_its_matrices(smollm2: Path) -> None:
    work = Workload.of_file(smollm2)
    assert (work.layers, work.attention, work.words) == (30, 576, 49_152)
    assert sum(matrix.rows * matrix.columns for matrix in work.matrices) == pytest.approx(134.5e6, rel=0.001)


def test_probing_tells_small_matrices_from_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "SIZE", 2e6)
    monkeypatch.setattr(clock, "LENGTH", 256)
    monkeypatch.setattr(clock, "DECODED", 8)
    made = probe_device(("q8_0", "q4_k"), (192,), ("f16",), threads=1, rounds=1, batches=(16,))
    assert {(rate.type, rate.columns, rate.batch) for rate in made.matrices} == {
        *(("q8_0", 192, batch) for batch in (1, 16)),
        *(("q4_k", 256, batch) for batch in (1, 16)),
    }
    assert all(1e-12 < rate.seconds < 1e-6 for rate in made.matrices)
    small, large = (Workload.of_stack(Stack("q8_0", 192, layers)) for layers in (4, 64))
    assert made.seconds_for(large) > 4 * made.seconds_for(small) > 0
    assert made.seconds_for(small, batch=16) > made.seconds_for(small) / 2
    assert made.word > 0 or made.rest[0].step > 0


def test_stacks_of_narrow_matrices_have_no_more_layers_than_the_engine_takes(tmp_path: Path) -> None:
    stack = clock._stack("q4_0", 64)
    assert stack.layers < layers_for("q4_0", 64, clock.SIZE)
    write_stack(stack, tmp_path / "stack.gguf")
    with Engine(tmp_path / "stack.gguf", context=64, threads=1) as engine:
        assert len(list(engine.generate([1, 2], max_new_tokens=2))) == 2


def test_reading_a_prompt_is_told_where_it_was_measured() -> None:
    work = Workload((Matrix("q4_0", 10, 500), Matrix("q4_0", 1000, 500)), layers=3, attention=64, words=1000)
    known = profile()
    assert not known.reads(work)
    rates = (*known.matrices, Rate(type="q4_0", columns=500, batch=READ, seconds=1e-7))
    rest = (*known.rest, Rest(batch=READ, layer=1e-3, step=2e-3))
    caches = (*known.caches, CacheRate(type="f16", batch=READ, seconds=1e-10))
    told = profile(matrices=rates, rest=rest, caches=caches)
    parts = 10 * 500 * 1e-7 + 1000 * 500 * 2e-9 + 2e-3 + 3 * 1e-3 + 1000 * 1e-9 + READ * READ / 2 * 3 * 64 * 1e-10
    assert told.reads(work) and told.prompt_seconds(work) == pytest.approx(parts), (
        "the head behind the last token alone"
    )
    assert not told.reads(work, "q8_0")


@pytest.mark.parametrize("words", [("device", "probe"), ("plan", "--probe")])
def test_a_place_that_is_not_there_is_refused_before_anything_is_measured(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    ended = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "not" / "device.json")])
    assert ended.exit_code == 2 and "there is no such directory" in ended.stderr
    assert "stacks" not in ended.stderr and not list(tmp_path.iterdir())
