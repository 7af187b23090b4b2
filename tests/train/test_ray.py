"""The worker on a local Ray cluster of two nodes: the same result, the same answers to failures and stops."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from danlu.cli import explain
from danlu.console import complain
from danlu.train.hang import read_sign
from danlu.train.launch import LaunchSettings
from danlu.train.ray_launch import launch_on_ray
from tests.train.test_launch import WORKER, newest, undisturbed, wait_until
from tests.train.tiny_run import assert_same_curve, command, here, write_recipe

pytest.importorskip("ray", reason="Ray is not installed (pip install 'danlu[cluster]')")
QUIET = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}


def main() -> None:
    """In a process of its own: a cluster of two nodes with one CPU each, and one launch after another on it."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    alive = sum(node["Alive"] for node in ray.nodes())
    print(json.dumps({"address": cluster.address, "nodes": alive}), flush=True)
    for line in sys.stdin:
        print(json.dumps(carry_out(**json.loads(line))), flush=True)
    ray.shutdown()
    cluster.shutdown()


def carry_out(home: str, arguments: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    run, found = Path(home), LaunchSettings.model_validate({"nproc": 1, "nodes": 2} | settings)
    try:
        told = {"home": home, **arguments}
        return {"exit": 0, "result": launch_on_ray(WORKER, told, found, run_dir=run, progress=lambda: newest(run))}
    except Exception as error:
        message, code = explain(error)
        complain(message)
        return {"exit": code, "message": message}


class Driver:
    """A process with a cluster; `begin` and `answer` are one launch."""

    address = ""

    def __init__(self, home: Path) -> None:
        self.log = home / "said"
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from tests.train.test_ray import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            cwd=root,
            env=os.environ | QUIET | {"PYTHONPATH": str(root)},
            start_new_session=True,
        )

    def begin(self, home: Path, settings: dict[str, Any] | None = None, **arguments: Any) -> None:
        told = {"home": str(home), "arguments": arguments, "settings": settings or {}}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(told) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """The next line that is ours; Ray prints others."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise AssertionError(self.log.read_text())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(60)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    made = Driver(tmp_path_factory.mktemp("ray"))
    try:
        told = made.answer()
        assert told["nodes"] == 2
        made.address = told["address"]
        yield made
    finally:
        made.close()


@pytest.mark.soak
def test_a_killed_rank_is_started_again_and_nothing_is_lost(driver: Driver, tmp_path: Path) -> None:
    driver.begin(tmp_path, steps=30, pause=0.05)
    wait_until(lambda: newest(tmp_path) >= 4)
    victim = read_sign(tmp_path, 1)
    assert victim is not None
    os.kill(victim.pid, signal.SIGKILL)
    assert driver.answer() == {
        "exit": 0,
        "result": {"step": 30, "weight": pytest.approx(undisturbed(30, 2), rel=1e-12)},
    }
    assert "going on from the newest checkpoint (restart 1 of at most 3" in driver.log.read_text()


def test_the_command_trains_on_two_nodes_as_one_process_does(driver: Driver, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    here(recipe, tmp_path / "one")
    words = ("--on", "ray", "--nodes", "2", "--nproc", "1", "--plan", "shard=2", "--json")
    ended = subprocess.run(
        command(recipe, tmp_path / "two", *words),
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | QUIET | {"RAY_ADDRESS": driver.address},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert json.loads(ended.stdout)["plan"] == "shard=2"
    assert_same_curve(tmp_path / "two", tmp_path / "one")
    assert (tmp_path / "two" / "model" / "model.safetensors").exists()


@pytest.mark.soak
def test_a_stop_before_the_first_step_ends_at_once(driver: Driver, tmp_path: Path) -> None:
    driver.begin(tmp_path, steps=1, prepares=60.0)
    wait_until(lambda: read_sign(tmp_path, 1) is not None)
    driver.process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    assert driver.answer() == {"exit": 0, "result": None} and time.monotonic() - asked < 30
    assert "stopped before the first step" in driver.log.read_text()


@pytest.mark.soak
def test_a_stop_is_heard_by_every_rank(driver: Driver, tmp_path: Path) -> None:
    driver.begin(tmp_path, steps=1_000_000, pause=0.01)
    wait_until(lambda: newest(tmp_path) >= 3)
    driver.process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    answer = driver.answer()
    assert answer["exit"] == 0 and time.monotonic() - asked < 30
    step = answer["result"]["step"]
    assert {(tmp_path / f"last-{rank}").read_text() for rank in range(2)} == {str(step)} and newest(tmp_path) == step


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        pytest.param("mistake", 2, "rows.jsonl: is empty\n  add a row", marks=pytest.mark.soak),
        pytest.param(
            "stumble", 70, f"rank 1 on {socket.gethostname()}: ValueError: a stone lies here\n", marks=pytest.mark.soak
        ),
        pytest.param("spin", 3, "nothing has moved for 2 s: rank 1 on ", marks=pytest.mark.soak),
    ],
)
def test_the_first_error_is_told(driver: Driver, tmp_path: Path, fault: str, code: int, message: str) -> None:
    hang = {"timeout": 2.0, "first_timeout": 60.0}
    driver.begin(tmp_path, {"max_restarts": 0, "hang": hang}, steps=5, fault=fault)
    answer = driver.answer()
    assert answer["exit"] == code and message in answer["message"]


def test_a_cluster_that_is_too_small(driver: Driver, tmp_path: Path) -> None:
    driver.begin(tmp_path, {"nproc": 3}, steps=1)
    assert driver.answer()["message"].startswith(
        "Ray: 6 processes are asked for, and the cluster has 2 CPUs and 0 GPUs"
    )
