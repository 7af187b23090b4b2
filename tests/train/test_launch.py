"""Real processes that are killed, fail, hang and are stopped: the run goes on, or ends and says why."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.elastic.rendezvous import dynamic_rendezvous

from danlu.artifact import only_writer, write_json
from danlu.cli import explain
from danlu.console import complain
from danlu.errors import DanluError
from danlu.train.failures import NO_ROOM, Failure, Patience, cause, described, ended_without_a_word
from danlu.train.hang import read_sign
from danlu.train.launch import LaunchSettings, Place, check_master, launch, place_given
from danlu.train.rank import Rank
from tests.test_cli import small_disk

WORKER = "tests.train.test_launch:work"
PATIENCE = 120  # seconds; the machine may be busy
KILLS = 6


# --- The worker: a layer that learns, saved at every step -----------------------------------------------------------


def work(
    rank: Rank, home: str, steps: int, fault: str = "", pause: float = 0.0, prepares: float = 0.0
) -> dict[str, Any]:
    """Learn with all ranks until `steps` are done or somebody asks for a stop; at step 3, rank 1 meets its fault.

    Args:
        pause, prepares: seconds of each step, and before the first, that are slept.
    """
    time.sleep(prepares)
    place = Path(home) / "checkpoint.json"
    saved = json.loads(place.read_text()) if place.exists() else {"step": 0, "weight": [1.0, -1.0]}
    if rank.world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([saved["weight"]], dtype=torch.float64)
    step = saved["step"]
    while step < steps:
        step += 1
        rank.alive.note(step, "forward")
        if step == 3 and fault:
            dist.barrier()  # so that step 2 is saved
            if rank.number == 1:
                globals()[fault](place.parent)
        layer.zero_grad()
        layer(torch.tensor([float(step % 5), rank.number + 1.0], dtype=torch.float64)).square().sum().backward()
        stop = torch.tensor(float(rank.stopping.asked))
        if rank.world > 1:
            dist.all_reduce(layer.weight.grad)
            dist.all_reduce(stop)
        layer.weight.data -= 0.001 * layer.weight.grad
        time.sleep(pause)
        if rank.number == 0:
            write_json(place, {"step": step, "weight": layer.weight.tolist()[0]})
        if stop > 0:
            break
    (Path(home) / f"last-{rank.number}").write_text(str(step))
    if rank.world > 1:
        dist.barrier()
    return {"step": step, "weight": layer.weight.tolist()[0]}


def stumble(home: Path) -> None:
    raise ValueError("a stone lies here")


def mistake(home: Path) -> None:
    raise DanluError("is empty", where="rows.jsonl", fix="add a row")


def spin(home: Path) -> None:
    while True:
        pass


def wait_for_nothing(home: Path) -> None:
    dist.recv(torch.zeros(1), src=0)


def halt(home: Path) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fill_the_disk(home: Path) -> None:
    with (home / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def undisturbed(steps: int, world: int) -> list[float]:
    """The weights that the worker ends with, in one process."""
    weight = torch.tensor([1.0, -1.0], dtype=torch.float64)
    for step in range(1, steps + 1):
        rows = torch.tensor([[float(step % 5), number + 1.0] for number in range(world)], dtype=torch.float64)
        weight = weight - 0.001 * (2 * (rows @ weight)[:, None] * rows).sum(0)
    return weight.tolist()


# --- The launcher: a process that carries out one launch after another, as told on its standard input ----------------


def newest(home: Path) -> int:
    place = home / "checkpoint.json"
    return int(json.loads(place.read_text())["step"]) if place.exists() else 0


def carry_out(home: str, arguments: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """One launch; what it returned, or the message and exit code of the command."""
    run = Path(home)
    try:
        found = launch(
            WORKER,
            {"home": home, **arguments},
            LaunchSettings.model_validate(settings),
            run_dir=run,
            progress=lambda: newest(run),
        )
    except (Exception, KeyboardInterrupt) as error:
        message, code = explain(error)
        complain(message)
        return {"exit": code}
    return {"exit": 0, "result": found}


def let_the_clock_jump(seconds: float) -> None:
    """From SIGUSR1 on the wall clock of this process, the elastic agent's included, is so many seconds off."""
    true, off = time.time, 0.0

    def jump(number: int, frame: object) -> None:
        nonlocal off
        off = seconds

    class Jumping(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return datetime.fromtimestamp(time.time(), tz)

    signal.signal(signal.SIGUSR1, jump)
    time.time = lambda: true() + off
    dynamic_rendezvous.datetime = Jumping  # type: ignore[misc]


def main() -> None:
    if "CLOCK_JUMPS" in os.environ:
        let_the_clock_jump(float(os.environ["CLOCK_JUMPS"]))
    for line in sys.stdin:
        print(json.dumps(carry_out(**json.loads(line))), flush=True)


class Launcher:
    """A launching process of its own; `run` and `answer` are one launch."""

    def __init__(self, log: Path, command: tuple[str, ...] = (sys.executable,), **environment: str) -> None:
        self.log, self.home = log, log.parent
        code = "from tests.train.test_launch import main; main()"
        self.process = subprocess.Popen(
            [*command, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "FATAL"} | environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            start_new_session=True,
        )

    def run(self, home: Path, nproc: int = 3, steps: int = 5, **arguments: Any) -> Launcher:
        """Begin a launch; what is a setting of the launch goes there, the rest to the worker."""
        self.home, self.said_before = home, len(self.log.read_text())
        settings = {key: arguments.pop(key) for key in list(arguments) if key in LaunchSettings.model_fields}
        told = {"home": str(home), "arguments": arguments | {"steps": steps}, "settings": {"nproc": nproc, **settings}}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(told) + "\n")
        self.process.stdin.flush()
        return self

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))

    def said(self) -> str:
        return self.log.read_text()[self.said_before :]

    def reach(self, step: int) -> None:
        """Wait until the worker has saved this step."""
        wait_until(lambda: newest(self.home) >= step)

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(PATIENCE)


def wait_until(true: Callable[[], bool]) -> None:
    patience = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < patience
        time.sleep(0.01)


def pids(home: Path, world: int = 3) -> list[int]:
    """The processes of the ranks."""
    return [sign.pid for rank in range(world) if (sign := read_sign(home, rank)) is not None]


def is_gone(pid: int) -> bool:
    """Whether a process has ended; what nobody has waited for yet counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    made = Launcher(tmp_path_factory.mktemp("launcher") / "said")
    yield made
    made.close()


# --- Dying ----------------------------------------------------------------------------------------------------------


@pytest.mark.soak  # tests/train/test_kills.py kills ranks of real runs
@pytest.mark.parametrize("kills", [KILLS, 5 * KILLS])
def test_ranks_killed_at_random_lose_nothing(launcher: Launcher, tmp_path: Path, kills: int) -> None:
    chance = random.Random("丹炉")
    steps = 8 * kills
    launcher.run(tmp_path, steps=steps, pause=0.02, max_restarts=1)
    killed: set[int] = set()
    for kill in range(kills):
        launcher.reach(6 * kill + 2)
        time.sleep(chance.uniform(0, 0.05))
        victim = chance.choice(pids(tmp_path))
        os.kill(victim, signal.SIGKILL)
        killed.add(victim)
        wait_until(lambda gone=victim: is_gone(gone))
    answer = launcher.answer()
    assert answer == {"exit": 0, "result": {"step": steps, "weight": pytest.approx(undisturbed(steps, 3), rel=1e-12)}}
    assert len(killed) == kills
    assert launcher.said().count("was killed by SIGKILL; going on from the newest checkpoint") == kills


@pytest.mark.parametrize("seconds", [-86_400, pytest.param(86_400, marks=pytest.mark.soak)])
def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, seconds: int) -> None:
    launcher = Launcher(tmp_path / "said", CLOCK_JUMPS=str(seconds))
    launcher.run(tmp_path, steps=80, pause=0.05).reach(3)
    launcher.process.send_signal(signal.SIGUSR1)
    reached = newest(tmp_path)
    launcher.reach(reached + 20)  # the agent has looked at its clock
    os.kill(pids(tmp_path)[1], signal.SIGKILL)
    answer = launcher.answer()
    launcher.close()
    assert answer == {"exit": 0, "result": {"step": 80, "weight": pytest.approx(undisturbed(80, 3), rel=1e-12)}}
    assert launcher.said().count("was killed by SIGKILL; going on from the newest checkpoint") == 1


def test_a_crash_loop_ends_and_the_first_error_is_the_last_word(launcher: Launcher, tmp_path: Path) -> None:
    answer = launcher.run(tmp_path, fault="stumble", max_restarts=2).answer()
    assert answer == {"exit": 70}
    said = launcher.said()
    assert said.count("going on from the newest checkpoint") == 2
    last = said[said.index("danlu: ") :]
    assert last.startswith(f"danlu: rank 1 on {socket.gethostname()}: ValueError: a stone lies here\n")
    assert last.rstrip().endswith("ValueError: a stone lies here") and "in stumble" in last
    assert not any(word in said for word in ("gloo", "elastic", "Connection"))


def test_a_users_mistake_is_not_tried_again(launcher: Launcher, tmp_path: Path) -> None:
    answer = launcher.run(tmp_path, fault="mistake").answer()
    assert answer == {"exit": 2}
    assert launcher.said() == "danlu: rows.jsonl: is empty\n  add a row\n"


def test_a_full_disk_ends_the_run(launcher: Launcher, tmp_path: Path) -> None:
    with small_disk(tmp_path / "run", 1) as mounted:
        if not mounted:
            pytest.skip("this system lets us mount no small disk")
        answer = launcher.run(tmp_path / "run", fault="fill_the_disk").answer()
        assert answer == {"exit": 2} and newest(tmp_path / "run") == 2
    assert re.fullmatch(r"danlu: (\S+: )?the disk is full\n  free some space, .*\n", launcher.said())


def test_one_process_runs_here(tmp_path: Path) -> None:
    def run(**settings: Any) -> Any:
        arguments = {"home": str(tmp_path), "steps": 4}
        return launch(WORKER, arguments, LaunchSettings(**settings), run_dir=tmp_path, progress=lambda: 0)

    assert run() == {"step": 4, "weight": pytest.approx(undisturbed(4, 1), rel=1e-12)}
    assert pids(tmp_path) == [os.getpid()]
    with pytest.raises(DanluError, match="2 machines have nowhere to meet"):
        run(nodes=2)
    with only_writer(tmp_path), pytest.raises(DanluError, match=f"another danlu .process {os.getpid()}. is working"):
        run(nproc=2)


# --- Stopping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to_a_rank", [False, True])
def test_sigterm_ends_all_ranks_at_the_same_step(launcher: Launcher, tmp_path: Path, to_a_rank: bool) -> None:
    launcher.run(tmp_path, steps=1_000_000, pause=0.01).reach(3)
    os.kill(pids(tmp_path)[2] if to_a_rank else launcher.process.pid, signal.SIGTERM)
    asked = time.monotonic()
    answer = launcher.answer()
    assert answer["exit"] == 0 and time.monotonic() - asked < 30
    step = answer["result"]["step"]
    assert {(tmp_path / f"last-{rank}").read_text() for rank in range(3)} == {str(step)} and newest(tmp_path) == step
    assert answer["result"]["weight"] == pytest.approx(undisturbed(step, 3), rel=1e-12)


def test_who_does_not_stop_is_ended(launcher: Launcher, tmp_path: Path) -> None:
    launcher.run(tmp_path, fault="spin", grace=1.0).reach(2)
    os.kill(launcher.process.pid, signal.SIGTERM)
    assert launcher.answer() == {"exit": 1}
    assert "not every process had saved and ended 1 s after SIGTERM" in launcher.said()
    assert all(map(is_gone, pids(tmp_path))) and newest(tmp_path) == 2


def test_a_killed_launcher_takes_its_ranks_along_and_control_c_stops(tmp_path: Path) -> None:
    first = Launcher(tmp_path / "first")
    first.run(tmp_path, steps=1_000_000, pause=0.01).reach(3)
    first.process.kill()
    first.close()
    wait_until(lambda: all(map(is_gone, pids(tmp_path))))
    reached = newest(tmp_path)
    second = Launcher(tmp_path / "second")
    second.run(tmp_path, steps=1_000_000, pause=0.01).reach(reached + 3)
    os.killpg(second.process.pid, signal.SIGINT)  # as the terminal does: to the launcher, the ranks and all else
    answer = second.answer()
    assert answer["exit"] == 0 and answer["result"]["step"] == newest(tmp_path) > reached
    assert answer["result"]["weight"] == pytest.approx(undisturbed(newest(tmp_path), 3), rel=1e-12)
    second.close()


# --- Hanging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("spin", r"rank 1 on \S+ \(process \d+\) is in step 3, forward, at \S+, line \d+ in spin"),
        ("halt", r"rank 1 on \S+ \(process \d+\) is in step 3, forward, stopped by a signal"),
        ("wait_for_nothing", "no rank is behind the others; all are in step 3, forward"),
    ],
)
def test_a_hang_is_told_with_every_stack_and_ended(launcher: Launcher, tmp_path: Path, fault: str, told: str) -> None:
    answer = launcher.run(tmp_path, fault=fault, hang={"timeout": 3.0, "first_timeout": 60.0}).answer()
    assert answer == {"exit": 3}
    said = launcher.said()
    assert re.search(rf"^danlu: \S+: nothing has moved for 3 s: {told}\n", said), said
    report = (tmp_path / "hang.txt").read_text()
    for rank in range(3):
        page = report[report.index(f"\nrank {rank} on ") + 1 :].partition("\nrank ")[0]
        assert (", line " in page) != (fault == "halt" and rank == 1), report
    assert report.count("in all_reduce") >= 2
    assert all(map(is_gone, pids(tmp_path)))


# --- Several machines, and other launchers --------------------------------------------------------------------------


def test_two_machines_restart_together(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = f"127.0.0.1:{free.getsockname()[1]}"
    machines = [Launcher(tmp_path / f"machine-{number}") for number in range(2)]
    for machine in machines:
        machine.run(tmp_path, nproc=1, nodes=2, rendezvous=meeting, steps=60, pause=0.05)
    machines[0].reach(4)
    os.kill(pids(tmp_path, 2)[1], signal.SIGKILL)
    for machine in machines:
        assert machine.answer()["result"]["weight"] == pytest.approx(undisturbed(60, 2), rel=1e-12)
        machine.close()
    assert "".join(machine.said() for machine in machines).count("was killed by SIGKILL; going on") >= 1


def environment(rank: int = 1, world: int = 4, local: int = 1, **other: str) -> dict[str, str]:
    given = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(local)}
    return given | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"} | other


@given(st.integers(1, 64), st.data())
def test_what_a_launcher_gives_is_believed(world: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, world - 1))
    local = data.draw(st.integers(0, rank))
    if torch.cuda.is_available():
        local = 0
    assert place_given(environment(rank, world, local), LaunchSettings()) == Place(rank, world, local)
    assert place_given(environment(rank, world, local), LaunchSettings(nproc=world)) == Place(rank, world, local)


def test_no_other_launcher() -> None:
    assert place_given({"MASTER_ADDR": "head", "MASTER_PORT": "1"}, LaunchSettings(nproc=2)) is None
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "node[0-7]"}
    assert place_given(slurm, LaunchSettings()) is None


@pytest.mark.parametrize(
    ("given_here", "told"),
    [
        ({"RANK": "0"}, "RANK is set, but WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not"),
        ({"WORLD_SIZE": "8", "MASTER_PORT": "1"}, "WORLD_SIZE, MASTER_PORT are set, but RANK"),
        (environment(rank=4), "RANK=4 is not below WORLD_SIZE=4"),
        (environment(local=5), "LOCAL_RANK=5 is not below LOCAL_WORLD_SIZE=4"),
        (environment(LOCAL_WORLD_SIZE="1"), "LOCAL_RANK=1 is not below LOCAL_WORLD_SIZE=1"),
        (environment(LOCAL_WORLD_SIZE="two"), "LOCAL_WORLD_SIZE=two is no number"),
        (environment(RANK="first"), "RANK=first is no number"),
        (environment(world=2), "WORLD_SIZE=2, but 2 x 3 = 6 processes are asked for"),
    ],
)
def test_variables_left_by_another_launcher(given_here: dict[str, str], told: str) -> None:
    with pytest.raises(DanluError) as error:
        place_given(given_here, LaunchSettings(nproc=3, nodes=2) if "2 x 3" in told else LaunchSettings())
    assert told in error.value.what and error.value.where == "environment"
    assert error.value.fix is not None
    assert error.value.fix.startswith("unset RANK" if "RANK" in given_here else "unset WORLD_SIZE MASTER_PORT")


def test_with_variables_left_by_another_launcher_a_run_stays_as_it_is(launcher: Launcher, tmp_path: Path) -> None:
    assert launcher.run(tmp_path, steps=4).answer()["exit"] == 0
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    other = Launcher(tmp_path.parent / "said", RANK="0", MASTER_ADDR="gone", SLURM_PROCID="0")
    assert other.run(tmp_path, steps=9).answer() == {"exit": 2}
    other.close()
    assert "environment: RANK, MASTER_ADDR are set, but WORLD_SIZE, LOCAL_RANK, MASTER_PORT not" in other.said()
    assert "unset RANK MASTER_ADDR" in other.said()
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_master_that_cannot_be_reached() -> None:
    with socket.socket() as master:
        master.bind(("127.0.0.1", 0))
        port = str(master.getsockname()[1])
        with pytest.raises(DanluError, match=f"MASTER_PORT={port}: cannot be reached: connection refused"):
            check_master(environment(MASTER_PORT=port), Place(1, 4, 1), seconds=0.3)
        master.listen()
        check_master(environment(MASTER_PORT=port), Place(1, 4, 1), seconds=5)
        with pytest.raises(DanluError, match="address already in use"):
            check_master(environment(rank=0, MASTER_PORT=port), Place(0, 4, 0), seconds=5)
        check_master(environment(MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True"), Place(0, 4, 0), seconds=5)
    with pytest.raises(DanluError, match="MASTER_ADDR=no-such-host"):
        check_master(environment(MASTER_ADDR="no-such-host.invalid"), Place(1, 4, 1), seconds=1)


@pytest.mark.parametrize("rendezvous", ["node0", "node0:", ":29400", "node0:port"])
def test_a_meeting_place_is_host_and_port(rendezvous: str) -> None:
    with pytest.raises(ValueError, match="is no HOST:PORT"):
        LaunchSettings(nodes=2, rendezvous=rendezvous)


# --- Which of several failures is told ------------------------------------------------------------------------------


def failure(error: Exception, rank: int) -> Failure:
    return described(error, rank)


def test_patience_counts_failures_without_progress() -> None:
    reached = [0]
    patience = Patience(lambda: reached[0], restarts=2)
    lost = ended_without_a_word(0, -signal.SIGKILL)
    assert [patience.bears(lost) for _ in range(3)] == [True, True, False]
    for step in range(1, 20):
        reached[0] = step
        assert patience.bears(lost)
    assert patience.bears(lost) and not patience.bears(lost)
    reached[0] = 20
    assert not patience.bears(failure(DanluError("is empty"), 0))
    assert not Patience(lambda: 0, restarts=0).bears(lost)


def test_a_full_disk_is_known_however_it_is_said() -> None:
    for error in (OSError(28, "No space left on device", "/runs/a"), RuntimeError("IoError: No space left on device")):
        told = failure(error, 0).error()
        assert told.what == "the disk is full" and told.exit_code == 2
    assert ended_without_a_word(1, NO_ROOM).foreseen and not failure(OSError(2, "No such file"), 0).foreseen


def test_the_cause_is_told_before_its_consequences() -> None:
    early = failure(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234"), 0)
    late = failure(KeyError("weight"), 1)
    nccl = failure(RuntimeError("NCCL error: remote process exited or there was a network error"), 2)
    assert early.consequence and nccl.consequence and not late.consequence
    assert cause([early, nccl, late]) == late
    assert cause([nccl, early]) == early
    killed = ended_without_a_word(3, -signal.SIGKILL)
    assert cause([early, failure(RuntimeError("tensor parallel peer lost"), 4), killed]) == killed
    assert "SIGKILL" in killed.what and "memory" in (killed.fix or "")
    assert cause([ended_without_a_word(5, -signal.SIGABRT), late]) == late
