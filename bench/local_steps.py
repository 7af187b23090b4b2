"""What training apart with local steps (DiLoCo) learns, beside one process that sees the same rows.

    python bench/local_steps.py [--text tinyshakespeare.txt.gz] [--seeds 3] [--steps 600] [--groups ...] [--save]

Character Shakespeare, 2 layers 48 wide, rows of 32 characters, AdamW at 3e-3, the last tenth held out. Two workers
share the rows of a step between them, each in a process of its own with one thread, and meet every `H` steps; the peers
are one process with all rows and one with half of them, which is what a worker would be by itself. "loss" is the mean
over the seeds of the loss on held-out rows in nat/token, with the least and the most; "gap" is how far it lies above
that of one process with all rows; "bytes" is what a worker writes and reads of deliveries and rounds, for each weight
and step, from the sizes of the files. Data parallelism sends and receives 12 bytes, as an all-reduce in fp32 of two
gradients has it.

The group `plain` is the table of the lab notebook. The others ask where its gap comes from. If it is the number of
rounds, then three times the steps (`longer`) closes it; if it is how noisy the gradient of few rows is, then four times
the rows (`larger`) do. `meeting` changes how often workers meet and how far the shared weights follow.
"""

from __future__ import annotations

import gzip
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, cast

import numpy as np
import torch
from common import arguments, emit

from danlu.data.stream import Rows, Stream
from danlu.model.config import ModelConfig
from danlu.model.initialize import initialize
from danlu.model.transformer import Decoder
from danlu.train.exchange.settings import LocalSettings
from danlu.train.local_steps import LocalSteps
from danlu.train.loop import Run, Turn, train
from danlu.train.objective import next_token
from danlu.train.optimizer import Optimizer, masters_of
from danlu.train.optimizing.settings import OptimizerSettings
from danlu.train.replica import Replica
from danlu.train.state import Checkpoints

WINDOW, WARMUP, RATE, ALL_REDUCE = 32, 20, 3e-3, 12
SHAPE = {"width": 48, "layers": 2, "heads": 4, "kv_heads": 4, "head_width": 12, "feedforward_width": 96}


@dataclass(frozen=True)
class Apart:
    """How two workers come together."""

    outer_learning_rate: float
    outer_momentum: float
    compress: Literal["none", "bf16"] = "none"
    local_steps: int = 20

    def spell(self) -> str:
        short = ", bf16" if self.compress == "bf16" else ""
        return f"apart, {self.outer_learning_rate:g} and {self.outer_momentum:g}, H = {self.local_steps}{short}"


@dataclass(frozen=True)
class Setting:
    """What is learned from, and by whom.

    Attributes:
        steps: in the plain group; others take a multiple.
        rows: of a step, over all workers together.
        half: one process learns half of them.
        falling: the learning rate falls to a tenth; otherwise it stays.
        apart: None for one process.
    """

    group: str
    steps: int
    rows: int
    falling: bool
    apart: Apart | None = None
    half: bool = False

    def spell(self) -> str:
        alone = f"one process, {self.rows // 2 if self.half else self.rows} rows"
        who = self.apart.spell() if self.apart else alone
        return f"{self.steps} steps of {self.rows} rows, rate {'falls' if self.falling else 'stays'}: {who}"


MILD, MIDDLE, PAPER = Apart(1.0, 0.0), Apart(0.7, 0.5), Apart(0.7, 0.9)


def settings_of(steps: int) -> Iterator[Setting]:
    """All settings, the peers of a group before what is compared with them."""
    yield from with_peers("plain", steps, 16, False, [MILD, MIDDLE, PAPER])
    yield from with_peers("plain", steps, 16, True, [MILD, MIDDLE, replace(MIDDLE, compress="bf16"), PAPER])
    yield from with_peers("longer", 3 * steps, 16, True, [MILD, PAPER])
    yield from with_peers("larger", steps, 64, True, [MILD, PAPER])
    often, seldom = replace(MILD, local_steps=5), replace(MILD, local_steps=60)
    for way in (often, seldom, replace(PAPER, local_steps=5), Apart(0.3, 0.9)):
        yield Setting("meeting", steps, 16, True, way)


def with_peers(group: str, steps: int, rows: int, falling: bool, ways: list[Apart]) -> Iterator[Setting]:
    whole = Setting(group, steps, rows, falling)
    yield from (whole, replace(whole, half=True))
    yield from (replace(whole, apart=way) for way in ways)


def is_peer(setting: Setting) -> bool:
    """Whether it is one process with all rows."""
    return setting.apart is None and not setting.half


def key_of(setting: Setting) -> tuple[int, int, bool]:
    """What settings have alike that are to be compared."""
    return setting.steps, setting.rows, setting.falling


def sides(text: Path) -> tuple[Rows, Rows]:
    """Rows to learn from and rows held out, characters as numbers."""
    read = gzip.decompress(text.read_bytes()) if text.suffix == ".gz" else text.read_bytes()
    _, ids = np.unique(np.frombuffer(read.decode("utf-8").encode("utf-32-le"), dtype=np.uint32), return_inverse=True)
    border = len(ids) - len(ids) // 10
    return rows_of(ids[:border]), rows_of(ids[border:])


def rows_of(ids: Any) -> Rows:
    tokens = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW).astype(np.int32)
    whole = cast(Any, np.ones_like)
    return Rows(cast(Any, tokens), whole(tokens), whole(tokens, dtype=bool))


def learn(setting: Setting, worker: int, seed: int, text: str, home: str) -> dict[str, float]:
    """One process's whole run. Returns the loss on held-out rows and, for a worker, the bytes that it moves."""
    torch.set_num_threads(1)
    learned, held = sides(Path(text))
    model = Decoder(ModelConfig(vocab_size=65, context=64, tied=True, **SHAPE))  # type: ignore[arg-type]
    initialize(model, "normal", seed)
    optimizer = Optimizer(*masters_of(model, torch.float32), OptimizerSettings())
    workers, out = 1 if setting.apart is None else 2, Path(home) / str(worker)
    run = Run(
        Replica(model, [next_token]),
        [Turn(optimizer, lambda step: rate_at(setting, step), clip=1.0)],
        Stream(learned, setting.rows // (2 if setting.half else 1), seed, worker, workers),
        steps=setting.steps,
        seed=seed,
        checkpoints=Checkpoints(out / "checkpoints", 1, background=False),
        checkpoint_steps=setting.steps,
        out=out,
    )
    moved = 0.0
    if setting.apart is None:
        train(run)
    else:
        shared = Path(home) / "shared"
        chosen = LocalSettings(home=shared, workers=workers, **asdict(setting.apart))
        with LocalSteps(optimizer, chosen, str(worker)) as together:
            train(replace(run, turns=[replace(run.turns[0], optimizer=together)], finish=together.finish))
        weights = sum(weight.numel() for weight in optimizer.masters.values())
        moved = moved_bytes(shared, workers) / weights / setting.apart.local_steps
    model.eval()
    rest = Stream(held, 512, 0)
    return {"loss": Replica(model, [next_token]).measure(rest.batch(step) for step in range(6)), "bytes": moved}


def rate_at(setting: Setting, step: int) -> float:
    fall = 1 - 0.9 * step / setting.steps if setting.falling else 1.0
    return RATE * min(1.0, (step + 1) / WARMUP) * fall


def moved_bytes(shared: Path, workers: int) -> float:
    """What a worker writes and reads in a round, in the mean: whoever makes the round reads all deliveries and the last
    round, and writes the next; all write a delivery and read the new round."""
    delivery = largest(shared.glob("workers/*/given/step-*"))
    made = largest(shared.glob("workers/*/made/step-*"))
    return delivery + made + (workers * delivery + 2 * made) / workers


def largest(folders: Iterator[Path]) -> int:
    return max(sum(file.stat().st_size for file in folder.glob("part-*")) for folder in folders)


def measure(setting: Setting, seeds: int, text: str, pool: ProcessPoolExecutor) -> list[dict[str, float]]:
    """One setting with every seed; of two workers, which end with the same weights, the first one's figures."""
    with tempfile.TemporaryDirectory() as place:
        homes = [f"{place}/{seed}" for seed in range(seeds)]
        if setting.apart is None:
            alone = [pool.submit(learn, setting, 0, seed, text, home) for seed, home in enumerate(homes)]
            return [one.result() for one in alone]
        found = []
        for seed, home in enumerate(homes):  # the pool has room for two workers, who wait for each other
            pair = [pool.submit(learn, setting, worker, seed, text, home) for worker in (0, 1)]
            found.append([one.result() for one in pair][0])  # noqa: RUF015 (both must have ended well)
        return found


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    parser = arguments(__doc__)
    data = Path(os.environ.get("DANLU_DATA", "../shared/data"))
    parser.add_argument("--text", type=Path, default=data / "tinyshakespeare.txt.gz")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600, help="of the plain group")
    parser.add_argument("--groups", nargs="+", default=["plain", "longer", "larger", "meeting"])
    given = parser.parse_args()
    found: dict[str, Any] = {"all_reduce_bytes": ALL_REDUCE, "settings": []}
    everything = list(settings_of(given.steps))
    keys = {key_of(one) for one in everything if one.group in given.groups}
    wanted = [one for one in everything if one.group in given.groups or (is_peer(one) and key_of(one) in keys)]
    print(f"{'':80} {'loss':>7} {'least':>7} {'most':>7} {'gap':>7} {'bytes':>7}")
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        best: dict[tuple[int, int, bool], float] = {}
        for setting in wanted:
            runs = measure(setting, given.seeds, str(given.text), pool)
            losses = [run["loss"] for run in runs]
            if is_peer(setting):
                best[key_of(setting)] = fmean(losses)
            gap = fmean(losses) - best[key_of(setting)]
            row = [fmean(losses), min(losses), max(losses), gap, runs[0]["bytes"]]
            print(f"{setting.group + ': ' + setting.spell():80} " + " ".join(f"{x:7.3f}" for x in row), flush=True)
            found["settings"].append({**asdict(setting), "losses": losses, "gap": gap, "bytes": row[4]})
    emit("local_steps", found, given.save)


if __name__ == "__main__":
    main()
