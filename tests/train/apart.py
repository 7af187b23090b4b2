"""Workers that train apart, for tests: in this process, and in processes of their own with the loop."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from danlu.data.stream import Rows, Stream
from danlu.model.config import ModelConfig
from danlu.model.initialize import initialize
from danlu.model.transformer import Decoder
from danlu.train.exchange.ledger import Ledger, Round
from danlu.train.exchange.settings import LocalSettings
from danlu.train.local_steps import LocalSteps, shared_weights
from danlu.train.loop import Run, Turn, train
from danlu.train.objective import next_token
from danlu.train.optimizer import Optimizer, masters_of
from danlu.train.optimizing.settings import OptimizerSettings
from danlu.train.replica import Replica
from danlu.train.state import Checkpoints

PATIENT = 60.0  # a deadline that no test reaches
SHAPE: dict[str, Any] = {
    "vocab_size": 65,
    "width": 48,
    "layers": 2,
    "heads": 4,
    "kv_heads": 4,
    "head_width": 12,
    "feedforward_width": 96,
    "context": 64,
    "tied": True,
}
WINDOW = 32


# --- In this process --------------------------------------------------------------------------------------------------


class Apprentice:
    """A small network that learns to copy another, whose gradients depend on the number of the step alone."""

    def __init__(self, settings: LocalSettings, worker: str, rows: int = 0, rule: str = "adamw") -> None:
        torch.manual_seed(4)
        self.model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        inner = Optimizer(*masters_of(self.model, torch.float32), OptimizerSettings(name=cast(Any, rule)))
        self.optimizer = LocalSteps(inner, settings, worker)
        self.rows, self.done = rows, 0

    def learn(self, steps: int) -> None:
        for _ in range(steps):
            chance = torch.Generator().manual_seed(1000 * self.rows + self.done)
            x = torch.randn(16, 6, generator=chance)
            (self.model(x) - x[:, :3] * x[:, 3:]).square().mean().backward()
            self.optimizer.step(0.05)
            self.optimizer.zero()
            self.done += 1

    def weights(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.model.named_parameters()}


def settings(home: Path, **changes: Any) -> LocalSettings:
    return LocalSettings(**{"home": home, "local_steps": 3, "deadline": PATIENT} | changes)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-6) -> bool:
    return all(torch.allclose(one[name], other[name], rtol=0, atol=tolerance) for name in one)


def together(*works: Callable[[], Any]) -> list[Any]:
    """Call all at once, each in a thread of its own."""
    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(work) for work in works]]


def shared(home: Path) -> dict[str, Tensor]:
    found = shared_weights(home)
    names = [name.removeprefix("shared.") for name in found.names if name.startswith("shared.")]
    return {name: found.read(f"shared.{name}") for name in names}


def rounds(home: Path) -> list[Round]:
    ledger = Ledger(home, "", 0)
    newest = ledger.newest()
    assert newest is not None
    return [ledger.round(number) for number in range(newest + 1)]


def shares(made: Round) -> list[tuple[str, int, float]]:
    return [(one.delivery.worker, one.delivery.number, one.weight) for one in made.counted]


# --- With the loop ----------------------------------------------------------------------------------------------------


def rows_of(ids: np.ndarray) -> Rows:
    """Rows of `WINDOW` tokens that follow one another, all learned."""
    tokens = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW).astype(np.int32)
    whole = cast(Any, np.ones_like)
    return Rows(cast(Any, tokens), whole(tokens), whole(tokens, dtype=bool))


def synthetic(count: int, seed: int) -> Rows:
    """Text whose next character follows from the last two, most of the time."""
    chance = np.random.default_rng(seed)
    table = np.random.default_rng(0).integers(0, 65, (65, 65))
    ids = [1, 2]
    for noise in chance.random(count * WINDOW):
        ids.append(int(table[ids[-1] % 8, ids[-2] % 8]) if noise < 0.9 else int(noise * 1e6) % 65)
    return rows_of(np.array(ids))


def learner(rows: Rows, seed: int, rank: int, world: int, batch: int) -> tuple[Decoder, Stream]:
    model = Decoder(ModelConfig(**SHAPE))
    initialize(model, "normal", 5)
    return model, Stream(rows, batch, seed, rank, world)


def run_of(model: Decoder, stream: Stream, optimizer: Any, out: Path, steps: int, **more: Any) -> Run:
    return Run(
        Replica(model, [next_token]),
        [Turn(optimizer, lambda step: 3e-3 * min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps), clip=1.0)],
        stream,
        steps=steps,
        seed=2,
        checkpoints=Checkpoints(out / "checkpoints", 2, background=False),
        out=out,
        **{"checkpoint_steps": 7} | more,
    )


def adam(model: nn.Module) -> Optimizer:
    return Optimizer(*masters_of(model, torch.float32), OptimizerSettings())


def apart(
    out: Path, chosen: LocalSettings, rows: Rows, rank: int, world: int, batch: int, steps: int, pause: float = 0.0
) -> dict[str, Tensor]:
    """One worker's whole run; what it ends with."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "pid").write_text(str(os.getpid()))
    model, stream = learner(rows, 1, rank, world, batch)

    def alive(step: int, phase: str) -> None:
        if phase == "data":
            time.sleep(pause)

    waits: list[float] = []

    def timed(began: float) -> Any:
        due = wait(began)
        waits.append(time.monotonic() - began)
        return due

    with LocalSteps(adam(model), chosen, out.name) as optimizer:
        wait, optimizer._until_due = optimizer._until_due, timed  # type: ignore[method-assign]
        train(run_of(model, stream, optimizer, out, steps, alive=alive))
        optimizer.finish()
    (out / "waits.json").write_text(json.dumps(waits))
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def measured(weights: dict[str, Tensor], rows: Rows) -> float:
    """The mean loss of rows, in nat/token."""
    model, stream = learner(rows, 0, 0, 1, 64)
    model.load_state_dict(weights, strict=False)
    return Replica(model, [next_token]).measure([stream.batch(0), stream.batch(1)])


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
