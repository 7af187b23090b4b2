"""What the work is spread over: accelerators, nodes and links, from one data file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml

from danlu.errors import DanluError, nearest

FILE = "hardware.yaml"


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

    def rate(self, precision: str) -> float:
        """FLOP/s of matrix products; fp4 and fp8 fall back to nothing: raises DanluError where there are none."""
        if precision not in self.peak:
            known = ", ".join(self.peak)
            raise DanluError(f"{self.name} has no {precision} products", where="hardware", fix=f"it has {known}")
        return self.peak[precision]


@dataclass(frozen=True)
class Cluster:
    """So many equal accelerators."""

    accelerator: Accelerator
    count: int

    @property
    def launch(self) -> str:
        """What `danlu train` is told to start a process for each accelerator."""
        nodes, rest = divmod(self.count, self.accelerator.node)
        if nodes <= 1 or rest:
            return f"--nproc {self.count}"
        return f"--nodes {nodes} --nproc {self.accelerator.node} --rendezvous HOST:PORT"

    @classmethod
    def parse(cls, text: str) -> Cluster:
        """`64xH100` or `8 x a100-40gb`. Raises DanluError where it is neither, or names no accelerator known."""
        found = re.fullmatch(r"\s*(?:(\d+)\s*x\s*)?(.+?)\s*", text, re.IGNORECASE)
        if found is None or (found.group(1) and int(found.group(1)) < 1):
            raise DanluError(f"{text!r} is no cluster", where="--gpus", fix="write it as 64xH100")
        return cls(accelerator(found.group(2)), int(found.group(1) or 1))


@cache
def accelerators() -> dict[str, Accelerator]:
    """All of the data file, by name and by other spelling, in lower case."""
    read = yaml.safe_load(files("danlu.plan").joinpath(FILE).read_text(encoding="utf-8"))
    known: dict[str, Accelerator] = {}
    for name, values in read.items():
        made = Accelerator(name=name, **{key: value for key, value in values.items() if key != "names"})
        known |= {spelling: made for spelling in (name, *map(str, values["names"]))}
    return known


def accelerator(name: str) -> Accelerator:
    """One by name. Raises DanluError with the nearest names where there is none."""
    known = accelerators()
    found = known.get(name.lower())
    if found is None:
        meant = nearest(name.lower(), list(known))
        ask = f"did you mean {meant}? " if meant else ""
        names = ", ".join(sorted({each.name for each in known.values()}))
        fix = f"{ask}known: {names}; add others to danlu/plan/{FILE}"
        raise DanluError(f"no accelerator is called {name}", where="--gpus", fix=fix)
    return found
