"""metrics.jsonl: going on takes as long after a million steps as after ten, whatever a kill has left of the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from danlu.train.card import Steps
from danlu.train.loop import Validation, train
from danlu.train.mesh import Mesh
from danlu.train.metrics import METRICS, TAIL, cut_back, read_back
from danlu.train.state import Checkpoints
from tests.train.test_loop import lines, make


class Second(Mesh):
    """As the second of several processes sees it."""

    @property
    def rank(self) -> int:
        return 1


def line(step: int) -> str:
    return json.dumps({"step": step, "loss": 1 / step, "seconds": 0.5, "memory_bytes": step, "batch": "f" * 200}) + "\n"


def write(home: Path, steps: int) -> Path:
    (home / METRICS).write_text("".join(map(line, range(1, steps + 1))))
    return home / METRICS


def bytes_read() -> int:
    """By this process, from files and caches alike."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="this system does not count what a process reads")
def test_going_on_reads_as_much_after_many_steps_as_after_few(tmp_path: Path) -> None:
    read, sizes = [], []
    for steps in (10_000, 100_000):
        home = tmp_path / str(steps)
        train(make(home, 4, validation=Validation(1, lambda: 1.0)))
        run = make(home, 6, validation=Validation(1, lambda: 1.0), checkpoint_steps=1)
        write(home, 4)
        whole = (home / METRICS).read_text()
        (home / METRICS).write_text("".join(line(1) for _ in range(steps)) + whole)
        sizes.append((home / METRICS).stat().st_size)
        before = bytes_read()
        train(run)
        read.append(bytes_read() - before)
    assert sizes[1] > 9 * sizes[0] > 20 * TAIL
    assert read[1] < 1.1 * read[0] < 4 * TAIL
    assert [at["step"] for at in lines(home)[-4:]] == [3, 4, 5, 6]


def test_a_checkpoint_does_not_grow_with_the_steps_before_it(tmp_path: Path) -> None:
    losses = iter(range(1000, 0, -1))
    train(make(tmp_path, 200, checkpoint_steps=20, validation=Validation(1, lambda: float(next(losses)))))
    sizes = {}
    for step in (180, 200):
        saved = Checkpoints(tmp_path / "checkpoints", 2).open(step)
        assert saved is not None and saved.extra["progress"]["best"] == 1001.0 - step
        sizes[step] = len(json.dumps(saved.extra["progress"]))
    assert sizes[200] < 200


def test_only_the_first_process_looks_at_the_file(tmp_path: Path) -> None:
    train(make(tmp_path, 4))
    before, run = (tmp_path / METRICS).read_bytes(), make(tmp_path, 8)
    run.replica.mesh = Second()
    train(run)
    assert (tmp_path / METRICS).read_bytes() == before


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(steps=st.integers(0, 900), done=st.integers(0, 1000), torn=st.text(alphabet='{"step: 19\r\x00é', max_size=40))
def test_what_is_past_the_checkpoint_is_cut_off(tmp_path: Path, steps: int, done: int, torn: str) -> None:
    path = write(tmp_path, steps)
    with path.open("a", encoding="utf-8") as file:
        file.write(torn)  # a line that a kill has cut short
    cut_back(path, done)
    assert path.read_text() == "".join(map(line, range(1, min(steps, done) + 1)))


@pytest.mark.parametrize("spoilt", ["\0" * 300, '{"step": 7, "lo', "[7]", '{"step": "7"}', "{}", "\x1b", ""])
def test_a_line_that_cannot_be_read_is_dropped_with_those_after_it(
    spoilt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(make(tmp_path, 12))
    path = tmp_path / METRICS
    whole = path.read_text().splitlines()
    path.write_text("\n".join([*whole[:6], spoilt, *whole[7:]]) + "\n")
    train(make(tmp_path, 20))
    said = capsys.readouterr().err
    assert f"{path}: a line after step 6 cannot be read; it and those after it are dropped" in said
    assert [at["step"] for at in lines(tmp_path)] == [*range(1, 7), *range(13, 21)]


def test_a_line_that_a_kill_cut_short_is_none_to_speak_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(make(tmp_path, 12))
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 13, "loss')
    train(make(tmp_path, 16))
    assert "cannot be read" not in capsys.readouterr().err
    assert [at["step"] for at in lines(tmp_path)] == [*range(1, 17)]


def test_a_broken_line_far_back_stands_in_nobodys_way(tmp_path: Path) -> None:
    path = write(tmp_path, 2 * TAIL // len(line(1)))
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*kept[:5], "broken\n", *kept[6:]]))
    cut_back(path, len(kept) - 10)
    left = [at["step"] for at in read_back(path)]
    assert left == [step for step in range(len(kept) - 10, 0, -1) if step != 6]


def test_a_card_counts_the_steps_of_its_own_start(tmp_path: Path) -> None:
    write(tmp_path, 1000)
    found = Steps.read(tmp_path, 990)
    assert (list(found.seconds), found.memory) == ([0.5] * 10, 1000)
