"""Job files for clusters: one launcher a machine, which meet on the first one; started again, the run goes on."""

from __future__ import annotations

import re
import shlex
from typing import Any

import yaml
from pydantic import Field, field_validator, model_validator

from danlu.errors import DanluError
from danlu.settings import Bytes, Settings

MEETING_PORT = 29400  # torch's usual port of a rendezvous
USERS_MISTAKE, HANG = 2, 3  # exit codes that another attempt would meet again
MOVED = 143  # exit code of what SIGTERM ended
# Set before anything starts; $! is the last that did.
TELL_A_MOVE = f"""trap 'kill -TERM "$!"; wait "$!"; exit {MOVED}' TERM"""
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,50}[a-z0-9])?")  # of a job, as RFC 1123 has labels, with room for an index


class JobSettings(Settings):
    """What a job needs of a cluster."""

    name: str = Field("danlu", description="name of the job: lower-case letters, digits and dashes")
    nodes: int = Field(1, gt=0, description="machines")
    gpus: int = Field(8, ge=0, description="GPUs on each machine, one process each; 0 trains on CPUs")
    processes: int | None = Field(None, gt=0, description="processes on each machine; default one a GPU, or one")
    cpus: int = Field(16, gt=0, description="CPU cores of each machine")
    memory: Bytes = Field(64 * 2**30, gt=0, description="RAM of each machine")
    hours: float = Field(24.0, gt=0, description="wall time after which the job saves and ends")
    image: str | None = Field(None, description="container image that has danlu; Kubernetes needs one")
    mounts: dict[str, str] = Field(
        {}, description="place in the container -> directory (Slurm) or persistent volume claim (Kubernetes)"
    )
    grace: int = Field(60, ge=30, description="seconds between SIGTERM and SIGKILL")
    attempts: int = Field(10, ge=0, description="times the job is started again by Kubernetes")
    partition: str | None = Field(None, description="Slurm's partition")
    account: str | None = Field(None, description="Slurm's account")
    namespace: str | None = Field(None, description="Kubernetes' namespace")
    port: int = Field(MEETING_PORT, gt=1023, lt=65536, description="port where the machines meet")

    @field_validator("name")
    @classmethod
    def _name_is_a_label(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a job: at most 52 lower-case letters, digits and inner dashes")
        return name

    @field_validator("image", "partition", "account", "namespace")
    @classmethod
    def _one_word(cls, word: str | None) -> str | None:
        if word is not None and not re.fullmatch(r"[\w./:@+-]+", word):
            raise ValueError(f"{word!r} is not one plain word")
        return word

    @field_validator("mounts")
    @classmethod
    def _mounts_are_places(cls, mounts: dict[str, str]) -> dict[str, str]:
        for place, source in mounts.items():
            if (
                not place.startswith("/")
                or not re.fullmatch(r"[\w./-]+", place)
                or not re.fullmatch(r"[\w./-]+", source)
            ):
                raise ValueError(f"{place}: {source} mounts nothing; write it as /data: SOURCE, without blanks")
        return mounts

    @model_validator(mode="after")
    def _a_process_a_gpu(self) -> JobSettings:
        if self.gpus and self.processes not in (None, self.gpus):
            raise ValueError(f"{self.processes} processes cannot have {self.gpus} GPUs, one each")
        return self

    @property
    def nproc(self) -> int:
        """Processes on each machine."""
        return self.processes or self.gpus or 1


def train_command(recipe: str, words: tuple[str, ...], settings: JobSettings, meeting: str) -> list[str]:
    """The line each machine runs.

    Args:
        words: further words of the command, as in ("--out", "/runs/a").
        meeting: the machine where all meet; it may be a shell's expression.
    """
    line = ["danlu", "train", recipe, *words, "--nproc", str(settings.nproc)]
    if settings.nodes > 1:
        line += ["--nodes", str(settings.nodes), "--rendezvous", f"{meeting}:{settings.port}"]
    return line


def slurm_job(recipe: str, words: tuple[str, ...], settings: JobSettings) -> str:
    """A script for sbatch. At the end of its time the run saves, and the job queues again until the run is done.

    Slurm tells the script alone, by SIGUSR1, so that what scancel ends stays ended; clusters that set
    PreemptParameters=send_user_signal tell of a preemption in the same way. A container needs Slurm's plugin pyxis.
    """
    options: dict[str, object] = {
        "job-name": settings.name,
        "partition": settings.partition,
        "account": settings.account,
        "nodes": settings.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": settings.cpus,
        "gpus-per-node": settings.gpus or None,
        "mem": f"{-(-settings.memory // 2**20)}M",
        "time": _slurm_time(settings.hours),
        "signal": f"B:USR1@{settings.grace}",
        "output": f"{settings.name}-%j.log",
        "open-mode": "append",
    }
    head = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    srun = ["srun", "--kill-on-bad-exit=1", f'--cpus-per-task="{settings.cpus}"']
    if settings.image is not None:
        srun += [f"--container-image={settings.image}"]
        if settings.mounts:
            srun += ["--container-mounts=" + ",".join(f"{there}:{here}" for here, there in settings.mounts.items())]
    line = train_command(shlex.quote(recipe), tuple(map(shlex.quote, words)), settings, "$head")
    body = [
        "set -uo pipefail",
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "stopped=",
        f"{' '.join([*srun, *line])} &",
        "work=$!",
        """trap 'stopped=yes; kill -TERM "$work"' USR1""",
        'while wait "$work"; code=$?; kill -0 "$work" 2>/dev/null; do :; done  # a signal ends wait, not the work',
        'if [ -n "$stopped" ] && [ "$code" -eq 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
        'exit "$code"',
    ]
    return "\n".join(["#!/bin/bash", *head, "#SBATCH --requeue", "", *body, ""])


def _slurm_time(hours: float) -> str:
    minutes = max(round(hours * 60), 1)
    return f"{minutes // 1440}-{minutes % 1440 // 60:02}:{minutes % 60:02}:00"


def kubernetes_job(recipe: str, words: tuple[str, ...], settings: JobSettings) -> str:
    """An indexed Job, and the headless Service through which its pods find each other; YAML for kubectl apply.

    Exit codes 2 (a user's mistake) and 3 (a hang) end the job; after any other failure a pod is started again. A pod
    that is moved saves and ends; its shell then tells a failure, since a 0 would count as a finished part.

    Raises DanluError where no image is named.
    """
    if settings.image is None:
        raise DanluError("a Kubernetes job needs a container image", fix="name one that has danlu: --set job.image=...")
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(settings),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"job-name": settings.name},
            "ports": [{"name": "rendezvous", "port": settings.port}],
        },
    }
    ends = {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [USERS_MISTAKE, HANG]}}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(settings),
        "spec": {
            "completions": settings.nodes,
            "parallelism": settings.nodes,
            "completionMode": "Indexed",
            "backoffLimit": settings.attempts,
            "podReplacementPolicy": "Failed",
            "activeDeadlineSeconds": round(settings.hours * 3600),
            "podFailurePolicy": {
                "rules": [ends, {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}]
            },
            "template": {"spec": _pod(recipe, words, settings)},
        },
    }
    return yaml.safe_dump_all([service, job], sort_keys=False)


def _metadata(settings: JobSettings) -> dict[str, Any]:
    return {"name": settings.name} | ({"namespace": settings.namespace} if settings.namespace else {})


def _pod(recipe: str, words: tuple[str, ...], settings: JobSettings) -> dict[str, Any]:
    """One machine of the job."""
    resources: dict[str, Any] = {"cpu": str(settings.cpus), "memory": str(settings.memory)}
    if settings.gpus:
        resources["nvidia.com/gpu"] = settings.gpus
    claims = {claim: f"claim-{number}" for number, claim in enumerate(sorted(set(settings.mounts.values())))}
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]  # NCCL talks through it
    volumes += [{"name": name, "persistentVolumeClaim": {"claimName": claim}} for claim, name in claims.items()]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    mounts += [{"name": claims[claim], "mountPath": place} for place, claim in settings.mounts.items()]
    line = train_command(recipe, words, settings, meeting=f"{settings.name}-0.{settings.name}")
    return {
        "restartPolicy": "Never",
        "subdomain": settings.name,
        "terminationGracePeriodSeconds": settings.grace,
        "containers": [
            {
                "name": "train",
                "image": settings.image,
                "command": ["/bin/sh", "-c", f'{TELL_A_MOVE}; {shlex.join(line)} & wait "$!"'],
                "resources": {"requests": resources, "limits": resources},
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }


JOBS = {"slurm": slurm_job, "kubernetes": kubernetes_job}
