"""Job files: valid for what reads them, and doing at a signal what they promise."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from danlu.errors import DanluError
from danlu.train.jobs import JobSettings, kubernetes_job, slurm_job

WORDS = ("--out", "/runs/a b", "--set", "name='x'")
LARGE = JobSettings(name="big", nodes=4, gpus=8, cpus=96, memory="1.5TiB", hours=30.5, image="registry/danlu:1")


def options(script: str) -> dict[str, str]:
    """What sbatch reads."""
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH --")]
    return dict(line.partition("=")[::2] for line in lines)


def test_a_slurm_script_asks_for_what_is_needed() -> None:
    asked = options(slurm_job("recipe.yaml", WORDS, LARGE))
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("4", "1", "8")
    assert (asked["cpus-per-task"], asked["mem"], asked["time"]) == ("96", "1572864M", "1-06:30:00")
    assert asked["signal"] == "B:USR1@60" and "requeue" in asked and asked["open-mode"] == "append"
    assert "partition" not in asked and "account" not in asked
    assert "gpus-per-node" not in options(slurm_job("recipe.yaml", (), JobSettings(gpus=0)))
    named = options(slurm_job("recipe.yaml", (), JobSettings(partition="gpu", account="team")))
    assert (named["partition"], named["account"]) == ("gpu", "team")


def test_a_container_with_mounts() -> None:
    script = slurm_job(
        "recipe.yaml", (), LARGE.model_copy(update={"mounts": {"/data": "/lustre/data", "/runs": "/lustre/r"}})
    )
    assert " --container-image=registry/danlu:1 --container-mounts=/lustre/data:/data,/lustre/r:/runs danlu" in script


def cluster(home: Path, **programs: str) -> dict[str, str]:
    """An environment in which these programs are found; Slurm's own are not installed where tests run."""
    for name, body in programs.items():
        (home / name).write_text(f"#!/bin/bash\n{body}\n")
        (home / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[7-10]", "SLURM_JOB_ID": "42"}
    return os.environ | slurm | {"PATH": f"{home}:{os.environ['PATH']}", "HOME_OF_TEST": str(home)}


SCONTROL = 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$@" > "$HOME_OF_TEST/requeued"; fi'
DANLU = """printf '%s\\n' "$@" > "$HOME_OF_TEST/words.part"
trap 'echo saved > "$HOME_OF_TEST/saved"; exit 0' TERM
mv "$HOME_OF_TEST/words.part" "$HOME_OF_TEST/words"
[ -e "$HOME_OF_TEST/code" ] && exit "$(cat "$HOME_OF_TEST/code")"
while :; do sleep 0.02; done"""
SRUN = 'while [[ "$1" == --* ]]; do shift; done; exec "$@"'


def started(home: Path, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Begin, and wait until danlu is at work."""
    process = subprocess.Popen(command, env=environment)
    patience = time.monotonic() + 60
    while not (home / "words").exists():
        assert time.monotonic() < patience
        time.sleep(0.01)
    return process


def test_at_the_end_of_its_time_a_slurm_job_saves_and_queues_again(tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(slurm_job("my recipe.yaml", WORDS, LARGE))
    process = started(tmp_path, ["bash", str(script)], cluster(tmp_path, scontrol=SCONTROL, danlu=DANLU, srun=SRUN))
    told = (tmp_path / "words").read_text().splitlines()
    assert told == ["train", "my recipe.yaml", *WORDS, "--nproc", "8", "--nodes", "4", "--rendezvous", "node7:29400"]
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 0
    assert (tmp_path / "saved").exists() and (tmp_path / "requeued").read_text() == "requeue 42\n"


@pytest.mark.parametrize("code", [0, 2, 70])
def test_a_slurm_job_that_ends_by_itself_is_over(tmp_path: Path, code: int) -> None:
    (tmp_path / "code").write_text(str(code))
    (tmp_path / "job.sh").write_text(slurm_job("recipe.yaml", (), JobSettings()))
    environment = cluster(tmp_path, scontrol=SCONTROL, danlu=DANLU, srun=SRUN)
    assert subprocess.run(["bash", str(tmp_path / "job.sh")], env=environment, check=False).returncode == code
    assert "--rendezvous" not in (tmp_path / "words").read_text() and not (tmp_path / "requeued").exists()


PLAIN_TEXT = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1)


@settings(max_examples=25, deadline=None)
@given(recipe=PLAIN_TEXT, words=st.lists(PLAIN_TEXT, max_size=3), nodes=st.integers(1, 9), image=st.booleans())
def test_any_words_reach_the_command_unchanged(recipe: str, words: list[str], nodes: int, image: bool) -> None:
    wanted = JobSettings(nodes=nodes, image="danlu:1" if image else None)
    script = slurm_job(recipe, tuple(words), wanted)
    read = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert read.returncode == 0, read.stderr
    (line,) = [line for line in script.splitlines() if line.startswith("srun ")]
    told = shlex.split(line.removesuffix(" &"))
    assert told[told.index("danlu") :][: 3 + len(words)] == ["danlu", "train", recipe, *words]
    _, job = yaml.safe_load_all(kubernetes_job(recipe, tuple(words), wanted.model_copy(update={"image": "danlu:1"})))
    shell, option, line = container(job)["command"]
    assert (shell, option) == ("/bin/sh", "-c")
    told = shlex.split(line)
    assert told[told.index("danlu") :][: 3 + len(words)] == ["danlu", "train", recipe, *words]


def container(job: dict[str, Any]) -> dict[str, Any]:
    (found,) = job["spec"]["template"]["spec"]["containers"]
    return dict(found)


def test_a_kubernetes_job_has_an_address_for_every_pod() -> None:
    wanted = LARGE.model_copy(
        update={"mounts": {"/data": "corpus_v1", "/runs": "runs", "/old": "runs"}, "namespace": "ml"}
    )
    service, job = yaml.safe_load_all(kubernetes_job("recipe.yaml", WORDS, wanted))
    assert (service["kind"], service["apiVersion"], job["kind"], job["apiVersion"]) == (
        "Service",
        "v1",
        "Job",
        "batch/v1",
    )
    assert service["metadata"] == job["metadata"] == {"name": "big", "namespace": "ml"}
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == 4
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"job-name": "big"}
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["publishNotReadyAddresses"] is True
    assert pod["restartPolicy"] == "Never"  # a failure policy needs it
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2, 3]
    assert spec["activeDeadlineSeconds"] == 30.5 * 3600 and pod["terminationGracePeriodSeconds"] == 60
    made = container(job)
    assert made["image"] == "registry/danlu:1" and "--rendezvous big-0.big:29400" in made["command"][2]
    limits = made["resources"]["limits"]
    assert limits == made["resources"]["requests"] == {"cpu": "96", "memory": str(3 * 2**39), "nvidia.com/gpu": 8}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in made["volumeMounts"]}
    claims = {place: volume.get("persistentVolumeClaim", {}).get("claimName") for place, volume in mounted.items()}
    assert claims == {"/dev/shm": None, "/data": "corpus_v1", "/runs": "runs", "/old": "runs"}
    assert len(volumes) == len(pod["volumes"]) and all(name.replace("-", "").isalnum() for name in volumes)


def test_a_pod_that_is_moved_saves_and_is_no_finished_part(tmp_path: Path) -> None:
    _, job = yaml.safe_load_all(kubernetes_job("recipe.yaml", (), LARGE))
    process = started(tmp_path, container(job)["command"], cluster(tmp_path, danlu=DANLU))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143 and (tmp_path / "saved").exists()


@pytest.mark.parametrize("code", [0, 2])
def test_a_pod_ends_with_the_code_of_the_command(tmp_path: Path, code: int) -> None:
    (tmp_path / "code").write_text(str(code))
    _, job = yaml.safe_load_all(kubernetes_job("recipe.yaml", (), LARGE))
    environment = cluster(tmp_path, danlu=DANLU)
    assert subprocess.run(container(job)["command"], env=environment, check=False).returncode == code


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "My Job"},
        {"name": "-a"},
        {"name": "a" * 53},
        {"nodes": 0},
        {"processes": 4},
        {"partition": "gpu; rm -rf /"},
        {"image": "a b"},
        {"mounts": {"data": "/data"}},
        {"mounts": {"/data": "/my data"}},
        {"grace": 5},
        {"gpu": 8},
    ],
)
def test_settings_that_no_cluster_would_take(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        JobSettings(**wrong)


def test_kubernetes_needs_an_image() -> None:
    with pytest.raises(DanluError, match="needs a container image"):
        kubernetes_job("recipe.yaml", (), JobSettings())
