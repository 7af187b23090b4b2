"""One file with models of many sizes in it: the best that keeps to a memory and a battery, cut out when it is needed.

`danlu compress elastic` makes such a directory: model.gguf, the largest, and elastic.json, what each setting is and
what was measured of it. Choosing and cutting need neither PyTorch nor llama.cpp.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from danlu.artifact import user_cache
from danlu.console import say
from danlu.device.battery import POLICY, Charge, Step, read_charge, read_policy, rise_at
from danlu.device.cut import Cut, write_cut
from danlu.errors import DanluError
from danlu.settings import Settings, read_bytes

MODEL, TABLE, CUTS = "model.gguf", "elastic.json", "cuts"
AGAIN = "make the directory again: danlu compress elastic"


class Measured(Settings):
    """A figure of a card."""

    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    by: str | None = None


class Setting(Settings):
    """One size that the model may have."""

    name: str = Field(pattern=r"^[\w-]+$")
    layers: int
    heads: int
    channels: int
    width: int
    file_bytes: int = Field(description="of the file that is cut out")
    token_bytes: int = Field(description="of a token's keys and values, as F16")
    peak_memory: Measured = Field(description="of a whole process that reads and decodes")
    loss: Measured = Field(description="on held-out text")
    loss_change: Measured | None = Field(None, description="beside the largest; None for it")
    decode: Measured = Field(description="token/s")
    processor: Measured = Field(description="seconds of all cores for a token")
    energy: Measured | None = Field(None, description="joules for a token, where the machine counts them")
    cut: Cut | None = Field(None, description="what it is of the file; None for all of it")

    def memory(self, context: int) -> int:
        """Bytes of the file and of keys and values of so many tokens."""
        return self.file_bytes + self.token_bytes * context

    @property
    def cost(self) -> Measured:
        """What a token takes of a battery: joules or, where they were not counted, processor time."""
        return self.processor if self.energy is None else self.energy


class Elastic(Settings):
    """What elastic.json says."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of model.gguf")
    context: int = Field(description="the longest that the model was trained for")
    settings: tuple[Setting, ...] = Field(min_length=1, description="the largest first")


def read_elastic(directory: Path) -> Elastic:
    """What a directory holds. Raises DanluError where it is no model of many sizes, or is damaged."""
    table = directory / TABLE
    if not table.is_file():
        what = "has one size: nothing can be chosen by memory or battery"
        raise DanluError(what, where=directory, fix="danlu compress elastic makes a model of many")
    try:
        found = Elastic.model_validate(json.loads(table.read_text(encoding="utf-8")))
    except (ValueError, ValidationError):
        raise DanluError("is damaged", where=table, fix=AGAIN) from None
    model = directory / MODEL
    size = model.stat().st_size if model.is_file() else None
    if size not in {setting.file_bytes for setting in found.settings if setting.cut is None}:
        raise DanluError(f"is not the file that {TABLE} is of", where=model, fix=AGAIN)
    return found


@dataclass(frozen=True)
class Budget:
    """What a setting must keep to.

    Attributes:
        context: tokens that keys and values are held for.
        memory: bytes of file, keys and values, at most; None for any.
        charge: of the battery; None where it does not matter.
        policy: what may be lost at which charge, by rising charge.
    """

    context: int
    memory: int | None = None
    charge: Charge | None = None
    policy: Sequence[Step] = ()


def choose(settings: Sequence[Setting], budget: Budget) -> tuple[Setting, str]:
    """The setting that a budget allows, and why it is that one.

    Memory is a limit; of what keeps to it the best is taken or, where the battery matters, of those that are nearly as
    good as the table of charges asks the one that takes least of it.

    Raises DanluError where none keeps to the memory, naming the smallest.
    """
    limit = budget.memory
    inside = [each for each in settings if limit is None or each.memory(budget.context) <= limit]
    if not inside:
        raise _too_little(settings, budget)
    best = min(inside, key=lambda each: (each.loss.value, each.memory(budget.context)))
    why = "" if limit is None else f"{len(inside)} of {len(settings)} settings keep to {_size(limit)}"
    if budget.charge is None:
        return best, f"{why}; it is the best of them"
    rise = rise_at(budget.charge.share, budget.policy)
    near = inside if rise is None else [each for each in inside if each.loss.value <= best.loss.value * (1 + rise)]
    chosen = min(near, key=lambda each: (each.cost.value, each.loss.value))
    lost = "may be any" if rise is None else f"may be {rise:.0%} above the best"
    told = f"battery at {budget.charge.share:.0%} ({budget.charge.source}): the loss {lost}"
    cost = f"{chosen.cost.value:.3g} {chosen.cost.unit}" + (" of processor time" if chosen.energy is None else "")
    spends = f"of {len(near)} such settings it spends least, {cost}"
    return chosen, "; ".join(part for part in (why, told, spends) if part)


def _too_little(settings: Sequence[Setting], budget: Budget) -> DanluError:
    smallest = min(settings, key=lambda each: each.memory(budget.context))
    held = smallest.token_bytes * budget.context
    what = (
        f"no setting keeps to {_size(budget.memory or 0)}: the nearest, {smallest.name}, takes "
        f"{_size(smallest.memory(budget.context))}, of which {_size(held)} are keys and values of "
        f"{budget.context:,} tokens"
    )
    room = ((budget.memory or 0) - smallest.file_bytes) // smallest.token_bytes
    shorter = f", or a shorter context: --context {room}" if room > 0 else ""
    return DanluError(what, where="--memory", fix=f"allow that much{shorter}")


def within(ref: str | Path, memory: str | None, battery: str | None, context: int) -> str | Path:
    """The file to load for what a user asks; `ref` itself where nothing is asked.

    Args:
        ref: a directory of `danlu compress elastic`.
        memory: most of it, as 60MB.
        battery: its charge, as 20%, or "auto".
        context: tokens that are to fit; at most those the model was trained for count.

    Raises DanluError where the directory has one size, a limit is none, or no setting keeps to it.
    """
    if memory is None and battery is None:
        return ref
    directory = Path(ref)
    elastic = read_elastic(directory)
    charge = None if battery is None else read_charge(battery)
    budget = Budget(min(context, elastic.context), read_size(memory), charge, read_policy(directory / POLICY))
    chosen, why = choose(elastic.settings, budget)
    held, tokens = _size(chosen.memory(budget.context)), f"{budget.context:,} tokens"
    say(f"{directory}: {chosen.name}, {held} with keys and values of {tokens}, loss {chosen.loss.value:.4f}")
    say(f"  {why}")
    return file_of(directory, elastic, chosen)


def file_of(directory: Path, elastic: Elastic, setting: Setting) -> Path:
    """A setting's file: the whole, or what was cut out of it before, or is now.

    Parts stay in the directory's cuts/ or, where nothing can be written there, in the user's cache.
    """
    if setting.cut is None:
        return directory / MODEL
    kept = directory / CUTS if os.access(directory, os.W_OK) else user_cache() / CUTS
    file = kept / elastic.sha256[:16] / f"{setting.name}.gguf"
    if not file.is_file() or file.stat().st_size != setting.file_bytes:
        write_cut(directory / MODEL, setting.cut, file)
        say(f"  cut out of {directory / MODEL} into {file}")
    return file


def read_size(text: str | None) -> int | None:
    """ "20MB" -> 20,000,000. Raises DanluError where it is no size."""
    try:
        size = read_bytes(text)
    except ValueError as error:
        raise DanluError(str(error), where="--memory") from None
    assert size is None or isinstance(size, int)
    return size


def _size(count: int) -> str:
    return f"{count / 1e6:,.2f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"
