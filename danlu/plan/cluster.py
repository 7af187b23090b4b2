"""What the work is spread over: accelerators, nodes and links, from one data file."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path

import yaml

from danlu.errors import DanluError, one_of
from danlu.plan.calibrate import Calibration
from danlu.plan.machine import Figures, read_machine

FILE = "hardware.yaml"
LEAST = {"memory": 1e8, "memory_rate": 1e9, "near": 1e8, "far": 1e8}  # in bytes, what no device has less of
LEAST_PEAK = 1e9  # FLOP/s


@dataclass(frozen=True)
class Host:
    """What one accelerator has of the machine it stands in: an equal share, where several stand there.

    Attributes:
        memory, rate: bytes of the host's memory, and bytes/s.
        link: bytes/s between the two, one way.
        disk, disk_rate: bytes of its disks, and bytes/s, reads and writes mixed.
        source: of the figures.
    """

    memory: float
    rate: float
    link: float
    disk: float
    disk_rate: float
    source: str


@dataclass(frozen=True)
class Accelerator:
    """One accelerator and its links, as in the data file.

    Attributes:
        name: as in the data file.
        peak: FLOP/s by precision, dense.
        memory: bytes.
        memory_rate: bytes/s.
        units: multiprocessors.
        near, far: bytes/s, one way, within a node and out of it.
        node: accelerators of a node.
        watts: the board's limit.
        source: of the figures.
        host: its share of the machine it stands in; None where that is not known.
        processor: whether it is all cores of a processor, which the processes of a machine share. `units` are then
            those that one process uses by itself, and `node` is how many there are.
    """

    name: str
    peak: dict[str, float]
    memory: float
    memory_rate: float
    units: int
    near: float
    far: float
    node: int
    watts: float
    source: str
    host: Host | None = None
    processor: bool = False

    def rate(self, precision: str) -> float:
        """FLOP/s of matrix products; fp4 and fp8 fall back to nothing: raises DanluError where there are none."""
        if precision not in self.peak:
            known = ", ".join(self.peak)
            raise DanluError(f"{self.name} has no {precision} products", where="hardware", fix=f"it has {known}")
        return self.peak[precision]


@dataclass(frozen=True)
class Cluster:
    """So many equal accelerators; or one processor and so many processes on it.

    Attributes:
        taught: of a measured machine, what runs on it taught of time and of memory.
    """

    accelerator: Accelerator
    count: int
    taught: tuple[Calibration, Calibration] | None = None

    @property
    def share(self) -> Accelerator:
        """What one process has: an accelerator, or its part of a processor's cores, memory and memory rate."""
        whole = self.accelerator
        if not whole.processor:
            return whole
        part = min(whole.node / (self.count * whole.units), 1.0)
        peak = {precision: rate * part for precision, rate in whole.peak.items()}
        return replace(
            whole, peak=peak, memory=whole.memory / self.count, memory_rate=whole.memory_rate * part,
            units=max(round(whole.units * part), 1), watts=whole.watts / self.count,
            host=whole.host and replace(whole.host, disk=whole.host.disk / self.count,
                                        disk_rate=whole.host.disk_rate / self.count),
        )  # fmt: skip

    @property
    def launch(self) -> str:
        """What `danlu train` is told to start a process for each accelerator."""
        nodes, rest = divmod(self.count, self.accelerator.node)
        if nodes <= 1 or rest:
            return f"--nproc {self.count}"
        return f"--nodes {nodes} --nproc {self.accelerator.node} --rendezvous HOST:PORT"

    @classmethod
    def parse(cls, text: str) -> Cluster:
        """`64xH100` or `8 x a100-40gb`; `2xmachine.json` for two processes on a machine that was measured.

        Raises DanluError where it is no such thing, names no accelerator known, the file is damaged, or there are more
        processes than cores, or than accelerators of the machine.
        """
        found = re.fullmatch(r"\s*(?:(\d+)\s*x\s*)?(.+?)\s*", text, re.IGNORECASE)
        if found is None or (found.group(1) and int(found.group(1)) < 1):
            raise DanluError(f"{text!r} is no cluster", where="--gpus", fix="write it as 64xH100")
        count, name = int(found.group(1) or 1), found.group(2)
        if name.lower().endswith(".json"):
            read = read_machine(Path(name).expanduser())
            cluster = cls(measured(read.figures, name), count, (read.time.calibration(), read.memory.calibration()))
        else:
            cluster = cls(accelerator(name), count)
        device = cluster.accelerator
        if count > device.node and (device.processor or cluster.taught):
            kind = "cores" if device.processor else "accelerators"
            what = f"{device.name} has {device.node} {kind}, fewer than {count}"
            raise DanluError(what, where="--gpus", fix="what lies between machines of such a kind is not planned for")
        return cluster


@cache
def accelerators() -> dict[str, Accelerator]:
    """All of the data file, by name and by other spelling, in lower case."""
    return read_accelerators(files("danlu.plan").joinpath(FILE).read_text(encoding="utf-8"))


def read_accelerators(text: str) -> dict[str, Accelerator]:
    """All of a data file, by every spelling. Raises DanluError where a figure is in other units than the file's."""
    read = yaml.safe_load(text)
    known: dict[str, Accelerator] = {}
    for name, values in read.items():
        for figure, least in LEAST.items():
            _check_units(name, figure, values[figure], least)
        for precision, rate in values["peak"].items():
            _check_units(name, f"peak of {precision}", rate, LEAST_PEAK)
        told = {key: value for key, value in values.items() if key not in ("names", "host")}
        host = Host(**values["host"]) if "host" in values else None
        made = Accelerator(name=name, host=host, **told)
        known |= {spelling: made for spelling in (name, *map(str, values["names"]))}
    return known


def _check_units(name: str, figure: str, value: object, least: float) -> None:
    if not isinstance(value, int | float) or value < least:
        fix = "bytes, bytes/s and FLOP/s: 80 GB are 80.0e+9, a link of 400 Gb/s 50.0e+9, 989 TFLOP/s 989.0e+12"
        raise DanluError(f"{figure} of {name} is {value}, which no device has", where=FILE, fix=fix)


def measured(figures: Figures, source: str) -> Accelerator:
    """A measured device. One alone has nobody to talk to: any rate of links will do. What it draws is not known."""
    near = figures.near or figures.memory_rate
    return Accelerator(
        name=figures.name, peak=figures.peak, memory=figures.memory, memory_rate=figures.memory_rate,
        units=figures.units, near=near, far=near, node=figures.node, watts=0, source=source,
        processor=figures.processor,
    )  # fmt: skip


def accelerator(name: str) -> Accelerator:
    """One by name. Raises DanluError with the nearest names where there is none."""
    known = accelerators()
    found = known.get(name.lower())
    if found is None:
        fix = one_of(name.lower(), list(known), listed=sorted({each.name for each in known.values()}))
        what = f"no accelerator is called {name}"
        raise DanluError(what, where="--gpus", fix=f"{fix}; add others to danlu/plan/{FILE}")
    return found
