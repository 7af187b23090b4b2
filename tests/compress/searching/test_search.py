"""A search from limits to a certificate: it keeps them, says what it measured, goes on, and stops when told to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_cpp", reason="the extra danlu[device] is not installed")

from danlu.compress.quantizing.mixes import matrices
from danlu.compress.quantizing.quantizer import calibration_rows, quantize_model
from danlu.compress.searching import search as searching
from danlu.compress.searching import workbench
from danlu.compress.searching.asked import parts
from danlu.compress.searching.choice import Mix
from danlu.compress.searching.frontier import print_frontier
from danlu.compress.searching.rise import Rise
from danlu.compress.searching.search import Asked, search
from danlu.compress.searching.sensitivity import sensitivities
from danlu.compress.searching.settings import SearchSettings
from danlu.compress.searching.wishes import read_target
from danlu.device.certify import missed
from danlu.device.profile import CacheRate, DeviceProfile
from danlu.device.proof import in_words
from danlu.errors import DanluError
from danlu.frontier_page import render
from danlu.model.checkpoint import Checkpoint
from tests.compress.short import OTHER, TEXT
from tests.conftest import write_rows
from tests.device.test_clock import profile

TYPES = ("q8_0", "q4_0")
SMALL = SearchSettings(
    types=TYPES, caches=("f16",), context=128, threads=1, candidates=2, gradient_tokens=512, calibration_tokens=4096,
    chosen_tokens=512, heldout_tokens=512, repeats=1, answers=2, answer_tokens=32, resamples=100,
)  # fmt: skip


def bytes_in(checkpoint: Checkpoint, bits: float) -> float:
    return sum(rows * columns for rows, columns in matrices(checkpoint).values()) * bits / 8


@pytest.fixture(scope="module")
def device() -> DeviceProfile:
    """Another one than this, on which q4_0 is faster than q8_0."""
    return profile(caches=tuple(CacheRate(type=type, batch=1, seconds=1e-9) for type in ("f16", "q8_0")))


@pytest.fixture(scope="module")
def asked(small: Checkpoint, device: DeviceProfile, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """About halfway between all of q4_0, 4.5 bits, and all of q8_0, 8.5."""
    task = tmp_path_factory.mktemp("task") / "questions.jsonl"
    write_rows(task, 3)
    beside = small.path.stat().st_size - bytes_in(small, 32) + 2 * 2 * 32 * 2 * SMALL.context  # words, keys and values
    limit = bytes_in(small, 6.5) + beside
    return Asked(small, read_target(memory=f"{limit:.0f}"), SMALL, TEXT, OTHER, task, device)


@pytest.fixture(scope="module")
def found(asked: Asked, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("search") / "out"
    return out, search(asked, out)


def test_the_file_keeps_the_limit_and_mixes_formats(asked: Asked, found: tuple[Path, dict[str, Any]]) -> None:
    out, frontier = found
    best = next(each for each in frontier["measured"] if each["chosen"])
    size = (out / "model.gguf").stat().st_size
    assert asked.target.memory is not None
    assert best["figures"]["memory"]["value"] <= asked.target.memory
    assert size == best["figures"]["file_size"]["value"] == pytest.approx(best["told"]["bytes"], rel=0.01)
    assert set(best["formats"]) == set(TYPES), "neither all of one nor all of the other"
    assert best["missed"] == ""
    assert frontier["certificate"]["passed"] and missed(frontier["certificate"]) is None


def test_what_was_told_is_near_what_was_measured(found: tuple[Path, dict[str, Any]]) -> None:
    for each in found[1]["measured"]:
        assert 0.2 < each["told"]["divergence"] / each["figures"]["divergence"]["value"] < 5
    sizes = [point["bytes"] for point in found[1]["told"]]
    losses = [point["divergence"] for point in found[1]["told"]]
    assert sizes == sorted(sizes) and losses == sorted(losses, reverse=True) and len(sizes) > 3


def test_everything_is_written_and_nothing_left(found: tuple[Path, dict[str, Any]]) -> None:
    out, frontier = found
    assert json.loads((out / "frontier.json").read_text()) == frontier
    assert json.loads((out / "certificate.json").read_text()) == frontier["certificate"]
    card = json.loads((out / "card.json").read_text())
    assert set(card["files"]) == {"model.gguf", "frontier.json", "certificate.json", "device.json"}
    assert not list((out / "work").rglob("*.gguf"))
    figures = frontier["certificate"]["figures"]
    assert {"divergence", "heldout_loss_rise", "loops", "loops_original", "peak_memory"} <= set(figures)
    assert {"task_rouge_l", "task_rouge_l_original", "task_exact_change"} <= set(figures)
    assert figures["divergence"]["low"] < figures["divergence"]["value"] < figures["divergence"]["high"]
    assert "told by the profile" in figures["decode"]["by"], "another device's speed is no measurement"
    assert any("asked" in line and "met" in line for line in in_words(frontier["certificate"]))


def test_the_users_own_measure_stands_among_the_lines(found: tuple[Path, dict[str, Any]]) -> None:
    names = [line["name"] for line in found[1]["certificate"]["lines"]]
    assert {"task, ROUGE-L", "task, ROUGE-L, original", "task, exact answers, change", "decoding here"} <= set(names)


def test_the_page_shows_it(found: tuple[Path, dict[str, Any]]) -> None:
    pytest.importorskip("matplotlib", reason="the extra danlu[report] is not installed")
    page = render(found[1], "a <model>")
    assert "a &lt;model&gt;" in page and "<svg" in page and "meets the target" in page


def test_the_same_search_is_not_done_twice(
    asked: Asked, found: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("nothing must be made")

    monkeypatch.setattr(workbench, "quantize_model", never)
    assert search(asked, found[0]) == found[1]


def test_a_search_that_is_stopped_keeps_the_best_and_goes_on(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make: Callable[..., Any] = workbench.quantize_model
    calls: list[int] = []

    def stopped(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return make(*given, **named)

    monkeypatch.setattr(workbench, "quantize_model", stopped)
    loose = replace(asked, target=read_target(quality_loss="3%", memory=f"{asked.target.memory}"))
    loose = replace(
        loose, settings=SMALL.model_copy(update={"prefer": "smallest", "answers": 0, "caches": ("f16", "q8_0")})
    )
    frontier = search(loose, tmp_path / "out")
    assert len(frontier["measured"]) == 1 and (tmp_path / "out" / "model.gguf").is_file()
    said = capsys.readouterr().err
    assert "stopped: the best so far is kept" in said or len(calls) == 1

    monkeypatch.setattr(workbench, "quantize_model", make)
    beside = float(asked.target.memory or 0) - bytes_in(asked.checkpoint, 6.5)
    tighter = read_target(memory=f"{beside + bytes_in(asked.checkpoint, 5.5):.0f}")
    once = replace(loose, target=tighter, settings=loose.settings.model_copy(update={"candidates": 1}))
    measured = search(once, tmp_path / "out")["measured"]
    assert [each["chosen"] for each in measured] == [False, True], "what was made for other limits is no try at these"


def test_the_frontier_is_there_as_it_grows_and_is_not_taken_for_finished(
    asked: Asked,
    found: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    out, shown = tmp_path / "out", []
    shutil.copytree(found[0], out)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(searching, "prove", killed)
        tighter = read_target(memory=f"{0.9 * float(asked.target.memory or 0):.0f}")
        search(replace(asked, target=tighter), out, shown.append)
    before = len(found[1]["measured"])
    assert [len(each["measured"]) for each in shown] == list(range(before + 1, before + 1 + len(shown))) and shown
    grown = json.loads((out / "frontier.json").read_text())
    assert grown == shown[-1] and grown["finished"] is False and grown["certificate"] is None
    assert (out / "model.gguf").is_file(), "the last whole result stays until there is another"
    assert not (out / "card.json").exists(), "which signed another frontier"
    pytest.importorskip("matplotlib", reason="the extra danlu[report] is not installed")
    page = render(grown, "a model")
    assert "not finished" in page and "<svg" in page and "the target</strong>" not in page

    again = search(asked, out)
    assert "finished already" not in capsys.readouterr().err
    assert again["finished"] and again["certificate"]["passed"] and (out / "card.json").is_file()


def test_where_speed_and_loss_part_by_this_machines_clock_it_is_doubted(
    asked: Asked, device: DeviceProfile, tmp_path: Path
) -> None:
    def first(prefer: str, speed: float, loss: float, given: DeviceProfile | None = None) -> Mix:
        work = tmp_path / f"{prefer}-{speed}-{loss}-{given is None}"
        work.mkdir()
        device.save(work / "device.json")  # as if this machine had been timed
        target = read_target(speed=f"{speed:.9f}", quality_loss=f"{loss:.9f}")
        wanted = replace(asked, profile=given, target=target, settings=SMALL.model_copy(update={"prefer": prefer}))
        mix = workbench.Bench(wanted, work, 0.0)._first()
        assert mix is not None
        return mix

    speed = 0.97 / first("fastest", 1.0, 0.9).told.seconds
    strict, patient = (first("best", each, 0.9).told for each in (speed, speed / 1.15))
    assert patient.divergence < 0.9 * strict.divergence and patient.seconds < 1.15 * strict.seconds
    rise = Rise.of([], SMALL.chosen_tokens)
    between = (strict.divergence + patient.divergence) / 2
    loss = (rise.slope * between + rise.doubt * between**0.5) / rise.loss
    assert first("best", speed, loss).told == patient, "one of the two may be wrong, and this tells which"
    assert first("best", speed, loss, device).told == strict, "another device's clock is all that is known of it"


def test_files_are_tuned_by_so_many_steps(asked: Asked, found: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    tuned = replace(asked, settings=SMALL.model_copy(update={"candidates": 1, "answers": 0, "tuning_steps": 2}))
    [made] = search(tuned, tmp_path / "out")["measured"]
    assert made["matrices"] == found[1]["measured"][0]["matrices"], "tuning changes nothing that is told"
    fitted, twin = parts(asked.calibration)[0], tmp_path / "twin.gguf"
    for steps in (0, 2):
        quantize_model(asked.checkpoint, made["matrices"], fitted, twin, SMALL.calibration_tokens, steps)
        assert ((tmp_path / "out" / "model.gguf").read_bytes() == twin.read_bytes()) == (steps == 2)


def test_texts_that_are_not_apart_are_refused(asked: Asked, tmp_path: Path) -> None:
    with pytest.raises(DanluError, match="held-out text is in the calibration text"):
        search(replace(asked, heldout=TEXT[1000:20_000]), tmp_path / "out")
    with pytest.raises(DanluError, match="4,096 are needed"):
        search(replace(asked, calibration=TEXT[:3000]), tmp_path / "out")
    assert not list(tmp_path.rglob("*.gguf"))


def test_what_could_never_be_met_is_said_with_the_nearest(
    asked: Asked, found: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    work = tmp_path / "out" / "work" / asked.digest
    work.mkdir(parents=True)
    [kept] = (found[0] / "work").rglob("sensitivities.json")
    (work / "sensitivities.json").write_bytes(kept.read_bytes())
    hard = replace(asked, target=read_target(memory="200kB", speed="1000000"))
    with pytest.raises(DanluError) as raised:
        search(hard, tmp_path / "out")
    assert raised.value.exit_code == 2
    assert "memory: the smallest mix takes" in str(raised.value) and "speed: the fastest mix" in str(raised.value)


def test_matrices_are_told_apart(small: Checkpoint) -> None:
    rows = calibration_rows(small, TEXT, 4096)[:4]
    found = sensitivities(small, rows, ("q8_0", "q5_0", "q4_0"))
    assert set(found.rounding) == set(found.inputs) == set(matrices(small))
    for each in found.rounding.values():
        assert 0 < each["q8_0"] < each["q5_0"] < each["q4_0"]
    for each in found.inputs.values():
        assert 0 < each["q8_0"] == each["q5_0"] == each["q4_0"], "blocks of as many numbers"


def test_the_table_shows_what_was_told_and_what_was_measured(
    found: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    print_frontier(found[1])
    table = capsys.readouterr().out
    assert table.count("measured") == len(found[1]["measured"]) and "(chosen)" in table
    assert table.count("told") == len(found[1]["told"])
