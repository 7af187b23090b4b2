"""Measuring in a process of its own: clean memory, the same losses, and errors that come through."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from danlu.device.engine import IGNORED, Engine
from danlu.device.measure import Document, Measurement, Request, measure
from danlu.errors import DanluError

IDS = list(range(400, 464))
DOCUMENT = Document(IDS, [*IDS[1:], IGNORED])


def request_for(model: Path) -> Request:
    return Request(str(model), 128, 1, IDS, decode_tokens=4, repeats=2, documents=[DOCUMENT], exact=True)


@pytest.fixture(scope="module")
def measured(smollm2: Path) -> Measurement:
    return measure(request_for(smollm2))


def test_the_process_holds_the_model_and_no_torch(measured: Measurement, smollm2: Path) -> None:
    assert not measured.imported_torch
    assert measured.file_bytes == smollm2.stat().st_size
    assert measured.weight_bytes < measured.peak_memory < measured.weight_bytes + 150e6


def test_the_parents_memory_is_not_counted(smollm2: Path, measured: Measurement) -> None:
    ballast = bytearray(400_000_000)
    ballast[::4096] = b"\1" * len(ballast[::4096])
    again = measure(replace(request_for(smollm2), repeats=1, documents=[]))
    assert again.peak_memory < measured.peak_memory * 1.1


def test_losses_are_those_of_the_engine(measured: Measurement, smollm2: Path) -> None:
    with Engine(smollm2, context=128, threads=1, exact=True) as engine:
        loss, correct = engine.token_losses(DOCUMENT.tokens, DOCUMENT.targets)
    assert measured.losses == [pytest.approx(float(loss.sum()), rel=1e-4)]
    assert measured.correct == [int(correct.sum())]
    assert DOCUMENT.count == 63


def test_speed_is_a_median_with_its_range(measured: Measurement) -> None:
    assert len(measured.prefill) == len(measured.decode) == 2
    for made in (measured.prefill_figure(), measured.decode_figure()):
        assert 0 < made["low"] <= made["value"] <= made["high"]
        assert made["unit"] == "token/s" and "median of 2" in made["by"]


def test_work_is_told_as_processor_time_and_energy_where_it_is_counted(measured: Measurement) -> None:
    work = measured.processor_figure()
    assert 0 < work["low"] <= work["value"] <= work["high"] and work["unit"] == "s/token"
    # Threads compute and wait at most all the time that a token takes.
    busy = [each * rate for each, rate in zip(measured.processor, measured.decode, strict=True)]
    assert max(busy) < 1.1 * measured.threads
    counted = replace(measured, energy=[0.2, 0.4, 0.3]).energy_figure()
    assert counted is not None and (counted["low"], counted["value"], counted["high"]) == (0.2, 0.3, 0.4)
    assert replace(measured, energy=[]).energy_figure() is None


def test_an_error_comes_through(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    with pytest.raises(DanluError, match="cannot load this GGUF") as error:
        measure(request_for(broken))
    assert error.value.where == str(broken) and error.value.fix


def test_a_process_that_dies_is_said(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_cpp.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(DanluError, match="ended with code -4"):
        measure(request_for(smollm2))
