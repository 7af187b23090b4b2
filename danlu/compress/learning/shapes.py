"""The shape of a model for a device: a supernet of many shapes, a search among them, and the best ones taught alike.

The model is put in order and trained so that its parts are models (`danlu.train.objectives.elastic`); an evolutionary
search (arXiv:1802.01548) finds parts within the device's memory and time; the best are taught by the whole for the same
number of steps, each by itself, before they are ranked: what a part says as it is cut out and what it can learn are not
the same.
"""

from __future__ import annotations

import json
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from danlu.artifact import (
    CARD,
    Figures,
    code_version,
    figure,
    inventory,
    make_card,
    peak_memory,
    write_json,
)
from danlu.compress.learning.distill import Teaching, distill
from danlu.compress.learning.supernet import in_order, part_model, save_part, sizes, workload
from danlu.compress.learning.tuning import Tuning, beginning, heldout_rows, keep_to, note, prepare, row_losses, tune
from danlu.compress.quantizing.formats.known import format_of
from danlu.compress.quantizing.mixes import PLAIN, file_bytes
from danlu.console import progress, say, table, warn
from danlu.device.profile import DeviceProfile
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint, save_checkpoint
from danlu.model.config import ModelConfig
from danlu.model.gguf import keys_bytes
from danlu.train.objectives.elastic import block_weights, parts_of
from danlu.train.recipe import ElasticSettings

POPULATION = 16  # shapes that live at once
SAMPLE = 4  # of them, those of which the best has the next child
CHILDREN = 48  # of the whole search
TABLE = "shapes.json"
SEARCH = "search.json"  # what the search in a directory is of


@dataclass(frozen=True)
class Device:
    """What a shape must keep to.

    Attributes:
        form: the number format its matrices are asked for in, as by `danlu compress quantize --type`.
        memory: bytes of the file, at most; None for any.
        speed: token/s of decoding, at least; None for any.
        profile: of the device, which tells the speed.
        keys: bytes of the file that are no weights: the words.

    Raises DanluError for a format that is not known, and where a speed is asked for without a profile.
    """

    form: str = "q8_0"
    memory: int | None = None
    speed: float | None = None
    profile: DeviceProfile | None = None
    keys: int = 0

    def __post_init__(self) -> None:
        format_of(self.form)
        if self.speed is not None and self.profile is None:
            what = "a speed is that of a device, and none is named"
            raise DanluError(what, where="--speed", fix="measure one: danlu device probe, and name it with --device")

    def size(self, part: ModelConfig) -> int:
        """Bytes of the file that `danlu compress quantize` makes of a shape."""
        return file_bytes(part, self.form, self.keys)

    def rate(self, part: ModelConfig) -> float | None:
        """Token/s, as the profile tells it.

        Raises DanluError where it says nothing of a format, or rows fill the blocks of none and would stay fp32.
        """
        if self.profile is None:
            return None
        work = workload(part, self.form)
        odd = next((matrix.columns for matrix in work.matrices if matrix.type == PLAIN), None)
        if odd is not None:
            what = f"rows of {odd:,} numbers do not fill blocks of {self.form} and stay {PLAIN}, which is not timed"
            raise DanluError(what, where="shape", fix="name sizes whose rows are a multiple of 32 numbers")
        return 1 / self.profile.seconds_for(work)

    def allows(self, part: ModelConfig) -> bool:
        """Whether a shape keeps to it."""
        rate = self.rate(part)
        slow = self.speed is not None and rate is not None and rate < self.speed
        return not slow and (self.memory is None or self.size(part) <= self.memory)


@dataclass(frozen=True)
class Candidate:
    """A shape that was looked at.

    Attributes:
        part: it.
        loss: as it is cut out, nat/token on held-out rows.
        taught: after it was taught; None where it was not.
    """

    part: ModelConfig
    loss: float
    taught: float | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values."""
        sizes = {"layers": self.part.layers, "heads": self.part.heads, "channels": self.part.feedforward_width}
        return {**sizes, "width": self.part.width, "loss": self.loss, "loss_taught": self.taught}


@dataclass(frozen=True)
class Found:
    """What came of a search.

    Attributes:
        model: the directory of the best.
        candidates: all that were looked at within the limits; first those that were taught, the best first.
        order: Kendall's tau between the losses before and after they were taught; 1 where the order stayed.
        figures: of the card.
    """

    model: Path
    candidates: list[Candidate]
    order: float
    figures: Figures

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values."""
        listed = [each.plain() for each in self.candidates]
        return {"model": str(self.model), "order": self.order, "candidates": listed, "figures": self.figures}


def find_shape(
    model: Checkpoint,
    asked: ElasticSettings,
    device: Device,
    tuning: Tuning,
    out: Path,
    finalists: int = 3,
    teaching_steps: int | None = None,
) -> Found:
    """Train a supernet from a model, search it, and teach the best parts.

    OUT/supernet is the run of the supernet, OUT/shape-1, shape-2, ... those of the finalists, OUT/model the best of
    them, OUT/shapes.json all that were looked at. The same command on the same directory goes on where it was stopped.

    Args:
        asked: the sizes that parts may have besides the model's own.
        device: what they must keep to.
        tuning: of the supernet.
        finalists: parts that are taught.
        teaching_steps: of each; by default as many as of the supernet.

    Raises DanluError where no part keeps to the limits, naming the smallest and what it misses, OUT holds another
    search, or the text is too short.
    """
    parts = parts_of(model.config, asked)
    device = replace(device, keys=_keys(model))
    allowed = [part for part in parts if device.allows(part)]
    if not allowed:
        raise _nearest(parts, device)
    begun = time.monotonic()
    settings = {"elastic": asked.plain(), "form": device.form, "memory": device.memory, "speed": device.speed}
    settings |= {"tuning": vars(tuning), "teaching_steps": teaching_steps or tuning.steps, "finalists": finalists}
    with beginning(out):
        keep_to(out / SEARCH, json.dumps({"model": model.digest, **settings}, indent=2) + "\n")
        recipe = tuning.recipe(in_order(model, out / "ordered"), {"elastic": asked.plain()}, "supernet")
        prepare(recipe, out / "supernet")
    whole = tune(recipe, out / "supernet")
    note(out / "supernet", "supernet", {"model": model.digest}, {})
    rows, net = heldout_rows(recipe, out / "supernet"), whole.load()
    looked = evolve(allowed, lambda part: row_losses(part_model(net, part), rows).mean, tuning.seed)
    looked.sort(key=lambda each: each.loss)
    budget = replace(tuning, steps=teaching_steps or tuning.steps)
    taught = [_teach(each, whole, budget, out, number) for number, each in enumerate(looked[:finalists], 1)]
    losses = [loss for _, loss in taught]
    order = kendall([each.loss for each in looked[:finalists]], losses)
    chosen = taught[losses.index(min(losses))][0]
    save_checkpoint(chosen.load(), chosen.tokenizer, out / "model")
    final = [replace(each, taught=loss) for each, loss in zip(looked, losses, strict=False)]
    ranked = sorted(final, key=lambda each: each.taught or 0.0) + looked[finalists:]
    write_json(out / TABLE, [each.plain() for each in ranked])
    figures = _figures(ranked[0], device, order, len(looked), len(parts))
    files = {f"model/{name}": about for name, about in inventory(out / "model").items()}
    card = make_card(
        "shape", settings, {"model": model.digest}, code_version("compress/learning/shapes"), figures, files,
        seconds=time.monotonic() - begun, memory=peak_memory(), resumed=False,
    )  # fmt: skip
    write_json(out / CARD, card)
    return Found(out / "model", ranked, order, figures)


def _teach(one: Candidate, whole: Checkpoint, budget: Tuning, out: Path, number: int) -> tuple[Checkpoint, float]:
    """A part that the whole has taught, and its loss on held-out rows."""
    place = out / f"part-{number}"
    part = Checkpoint.open(place) if (place / "config.json").is_file() else save_part(whole, one.part, place)
    made = distill(part, whole, budget, Teaching(), out / f"shape-{number}")
    return Checkpoint.open(made.model), made.after.mean


def evolve(allowed: Sequence[ModelConfig], loss_of: Callable[[ModelConfig], float], seed: int = 0) -> list[Candidate]:
    """Regularised evolution (arXiv:1802.01548): the best of a few has a child, and the oldest dies.

    Args:
        allowed: the shapes that may live; where they are no more than a population, each is looked at.
        loss_of: of a shape, looked at once.
        seed: decides every random choice.

    Returns: all that were looked at.
    """
    chance, losses = random.Random(seed), dict[ModelConfig, float]()
    with progress("shapes", min(len(allowed), POPULATION + CHILDREN), "looked at") as tick:

        def look(part: ModelConfig) -> None:
            if part not in losses:
                losses[part] = loss_of(part)
                tick.advance(1)

        living = deque(allowed if len(allowed) <= POPULATION else chance.sample(list(allowed), POPULATION))
        for part in living:
            look(part)
        for _ in range(CHILDREN if len(allowed) > POPULATION else 0):
            parent = min(chance.sample(list(living), SAMPLE), key=lambda part: losses[part])
            child = _child(parent, allowed, chance)
            look(child)
            living.append(child)
            living.popleft()
    return [Candidate(part, loss) for part, loss in losses.items()]


def _child(parent: ModelConfig, allowed: Sequence[ModelConfig], chance: random.Random) -> ModelConfig:
    """A shape that may live and has one size other than its parent's; any, where there is none."""

    def changed(part: ModelConfig) -> int:
        return sum(have != had for have, had in zip(sizes(part), sizes(parent), strict=True))

    return chance.choice([part for part in allowed if changed(part) == 1] or list(allowed))


def kendall(before: Sequence[float], after: Sequence[float]) -> float:
    """Kendall's tau: pairs in the same order less those in the other, of all; 1 where there are no pairs."""
    pairs = [(i, j) for i in range(len(before)) for j in range(i)]
    agreed = sum(1 if (before[i] - before[j]) * (after[i] - after[j]) > 0 else -1 for i, j in pairs)
    return agreed / len(pairs) if pairs else 1.0


def print_found(found: Found) -> None:
    """Those that were taught as a table."""
    columns = ("layers", "heads", "channels", "width", "loss cut out", "loss taught")
    taught = [each for each in found.candidates if each.taught is not None]
    lines = [(*map(str, sizes(each.part)), f"{each.loss:.4f}", f"{each.taught:.4f}") for each in taught]
    table(f"{found.model}: {len(found.candidates)} shapes looked at", columns, lines)
    say(f"order of these before and after they were taught: Kendall's tau {found.order:+.2f}")


def _keys(model: Checkpoint) -> int:
    """Bytes of a model's file that are no weights; 0, which is said, where llama.cpp would not read it."""
    try:
        return keys_bytes(model.config, model.tokenizer)
    except DanluError as error:
        warn(f"shape: sizes are those of the weights alone, of which no GGUF file can be made: {error.what}")
        return 0


def _nearest(parts: Sequence[ModelConfig], device: Device) -> DanluError:
    smallest = min(parts, key=block_weights)
    rate = device.rate(smallest)
    told = "" if rate is None else f" and {rate:,.1f} token/s"
    what = f"no shape keeps to the limits: the smallest has {device.size(smallest):,} bytes as {device.form}{told}"
    return DanluError(what, where="shape", fix="allow more, or name smaller sizes")


def _figures(best: Candidate, device: Device, order: float, looked: int, parts: int) -> Figures:
    found: Figures = {
        "loss": figure(best.taught or best.loss, "nat/token", by="held-out rows"),
        "loss_cut_out": figure(best.loss, "nat/token", by="the part of the supernet, before it was taught"),
        "bytes": figure(
            device.size(best.part), "byte", by=f"{'the GGUF file' if device.keys else 'weights'} as {device.form}"
        ),
        "order": figure(order, "Kendall's tau", by="losses of the finalists before and after they were taught"),
        "looked_at": figure(looked, "shapes", by=f"of {parts:,}"),
    }
    rate = device.rate(best.part)
    return found if rate is None else found | {"speed": figure(rate, "token/s", by="told by the device's profile")}
