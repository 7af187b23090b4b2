"""Signs of life, when silence is a hang, and what is told of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.train import hang
from danlu.train.hang import Alive, HangSettings, Sign, Watchdog, innermost, laggards, read_sign, sign_file

SETTINGS = HangSettings(timeout=10, first_timeout=100)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A monotonic clock that goes on when told; the wall clock is not to be asked."""
    now = [1000.0]

    def go_on(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(hang.time, "monotonic", lambda: now[0])
    monkeypatch.delattr(hang.time, "time")
    return go_on


def looked(dog: Watchdog, go_on: Callable[[float], None], seconds: float) -> float | None:
    """What the watchdog says at last, looking once a second for so long."""
    told = None
    for _ in range(round(seconds)):
        go_on(1.0)
        told = dog.silent()
    return told


def test_a_sign_is_what_was_noted_last(tmp_path: Path) -> None:
    assert read_sign(tmp_path, 3) is None
    with Alive(tmp_path, 3) as alive:
        first = read_sign(tmp_path, 3)
        assert first is not None and (first.rank, first.pid, first.phase) == (3, os.getpid(), "starting")
        for step, phase in ((8, "forward"), (8, "backward"), (9, "forward")):
            alive.note(step, phase)
            sign = read_sign(tmp_path, 3)
            assert sign is not None and (sign.step, sign.phase) == (step, phase)
        assert (sign.steps, sign.notes, sign.thread) == (1, 3, threading.get_ident())
    assert read_sign(tmp_path, 3) == alive.sign and alive.sign.phase == "done"


def test_a_reader_never_sees_half_a_sign(tmp_path: Path) -> None:
    over = threading.Event()
    with Alive(tmp_path, 0) as alive:

        def write() -> None:
            step = 0
            while not over.is_set():
                step += 1
                alive.note(step, "forward" if step % 2 else "a much longer name of a phase")

        writer = threading.Thread(target=write)
        writer.start()
        signs = [read_sign(tmp_path, 0) for _ in range(3000)]
        over.set()
        writer.join()
    assert None not in signs
    assert sign_file(tmp_path, 0).stat().st_size == hang.LINE


def test_silence_is_a_hang_once_it_is_too_long(tmp_path: Path, clock: Callable[[float], None]) -> None:
    with Alive(tmp_path, 0) as first, Alive(tmp_path, 1) as second:
        dog = Watchdog(tmp_path, [0, 1], 2, SETTINGS)
        assert looked(dog, clock, 99) is None  # the first step may take long
        for step in (1, 2):
            first.note(step, "forward")
            second.note(step, "forward")
        assert looked(dog, clock, 10) is None
        second.note(2, "backward")  # one that moves is enough: the others wait for it
        assert looked(dog, clock, 10) is None
        assert looked(dog, clock, 1) == pytest.approx(10)
        second.note(3, "forward")
        assert looked(dog, clock, 1) is None


def test_ranks_that_wait_for_one_elsewhere_are_not_hung(tmp_path: Path, clock: Callable[[float], None]) -> None:
    with Alive(tmp_path, 0) as elsewhere, Alive(tmp_path, 1) as here:
        here.note(1, "forward")
        here.note(2, "waiting")
        dog = Watchdog(tmp_path, [1], 2, SETTINGS)
        for part in range(8):
            elsewhere.note(2, f"writing part {part}")
            assert looked(dog, clock, 4) is None
        assert looked(dog, clock, 12) is not None


def test_who_never_starts_is_a_hang_too(tmp_path: Path, clock: Callable[[float], None]) -> None:
    with Alive(tmp_path, 0):
        dog = Watchdog(tmp_path, [0, 1], 2, SETTINGS)
        assert looked(dog, clock, 100) is None
        assert looked(dog, clock, 1) == pytest.approx(100)


def test_the_end_of_all_is_no_hang_but_waiting_for_one_is(tmp_path: Path, clock: Callable[[float], None]) -> None:
    dog = Watchdog(tmp_path, [0, 1], 2, SETTINGS)
    with Alive(tmp_path, 0) as late:
        with Alive(tmp_path, 1) as early:
            for alive in (late, early):
                alive.note(1, "forward")
                alive.note(2, "forward")
        assert looked(dog, clock, 12) is not None
    assert looked(dog, clock, 50) is None


def test_a_suspended_machine_is_no_hang(tmp_path: Path, clock: Callable[[float], None]) -> None:
    with Alive(tmp_path, 0) as alive:
        alive.note(1, "forward")
        alive.note(2, "forward")
        dog = Watchdog(tmp_path, [0], 1, SETTINGS)
        looked(dog, clock, 3)
        clock(86_400)
        assert dog.silent() is None
        assert looked(dog, clock, 4) is None
        assert looked(dog, clock, 3) is not None


# --- Who is behind --------------------------------------------------------------------------------------------------


def sign(rank: int, notes: int = 5, thread: int = 0xABC) -> Sign:
    return Sign(rank, "host", 100 + rank, thread, step=2, phase="forward", steps=1, notes=notes)


def dump(*threads: tuple[int, str]) -> str:
    """As faulthandler writes the stacks of threads."""
    return "\n".join(f'Thread 0x{ident:016x} (most recent call first):\n  File "{frame}\n' for ident, frame in threads)


WAITING = dump((0xDEF, 'threading.py", line 1 in wait'), (0xABC, 'x/torch/distributed/c10d.py", line 9 in all_reduce'))
WORKING = dump((0xABC, 'user.py", line 7 in load'), (0xDEF, 'x/torch/distributed/c10d.py", line 9 in _watch'))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9))
def test_those_that_noted_less_are_behind(notes: list[int]) -> None:
    signs = [sign(rank, count) for rank, count in enumerate(notes)]
    behind = laggards(signs, set(), dict.fromkeys(range(len(notes)), WAITING))
    least = {rank for rank, count in enumerate(notes) if count == min(notes)}
    assert {one.rank for one in behind} == (least if len(least) < len(notes) else set())


def test_the_stack_tells_where_all_have_come_equally_far() -> None:
    signs = [sign(rank) for rank in range(3)]
    assert laggards(signs, set(), {0: WAITING, 1: WORKING, 2: WAITING}) == [signs[1]]
    assert laggards(signs, set(), {0: WORKING, 1: WORKING, 2: WORKING}) == []
    assert laggards(signs, {2}, {0: WAITING, 1: WORKING, 2: ""}) == [signs[2]]
    assert innermost(WORKING, 0xABC) == 'File "user.py", line 7 in load'
    assert innermost(WAITING + WORKING, 0xABC) == 'File "user.py", line 7 in load'
    assert innermost("", 0xABC) == ""


# --- A process that nobody else watches -----------------------------------------------------------------------------

STUCK = """
import sys, time
from pathlib import Path
from danlu.train.hang import Alive, HangSettings, watched
run, rank, world, kind = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
def stuck_here():
    while kind == "spin": pass
    time.sleep(60)
with watched(run, rank, world, HangSettings(timeout=1, first_timeout=60)), Alive(run, rank) as alive:
    while not all((run / "ranks" / f"rank-{n:05}.alive").exists() for n in range(world)): time.sleep(0.01)
    for step in range(1, 6 - rank):
        alive.note(step, "forward")
        time.sleep(0.4)
    if kind != "slow": stuck_here()
"""


def stuck(run: Path, rank: int = 0, world: int = 1, kind: str = "sleep") -> subprocess.Popen[str]:
    words = [sys.executable, "-c", STUCK, str(run), str(rank), str(world), kind]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kind", ["sleep", "spin"])
def test_a_process_alone_ends_itself(tmp_path: Path, kind: str) -> None:
    process = stuck(tmp_path, kind=kind)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 3
    assert re.match(rf"danlu: {tmp_path}: nothing has moved for 1 s: .*step 5, forward", said)
    report = (tmp_path / "hang.txt").read_text()
    assert report.startswith("nothing has moved") and " in stuck_here\n" in report


def test_a_slow_process_is_left_alone(tmp_path: Path) -> None:
    process = stuck(tmp_path, kind="slow")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0 and said == "" and not (tmp_path / "hang.txt").exists()


def test_processes_of_another_launcher_tell_the_same(tmp_path: Path) -> None:
    both = [stuck(tmp_path, rank, 2) for rank in range(2)]
    said = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [3, 3]
    for text in said:
        assert re.search(r"rank 1 on \S+ \(process \d+\) is in step 4, forward, at .* in stuck_here\n", text), said
    assert "rank 0 on" in (tmp_path / "hang.txt").read_text()
