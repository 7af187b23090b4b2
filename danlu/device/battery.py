"""How full the battery is, and what a model may lose for it: a table that its user can change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from pydantic import Field, TypeAdapter, ValidationError

from danlu.artifact import write_aside
from danlu.errors import DanluError
from danlu.settings import Settings, Share, read_share

POWER = Path("/sys/class/power_supply")
POLICY = "battery.yaml"
AUTO = "auto"
NONE, OWN = "no battery here", "this machine's battery"
PLUGGED = ("Charging", "Full", "Not charging")  # what a battery's status is while it feeds nothing
HEAD = """\
# How good a setting --battery takes. The first line whose charge is not below the battery's counts: among the settings
# within memory whose loss is at most `loss` above the best one's (null: any), the one that spends least on a token.
"""


class Step(Settings):
    """A line of the table."""

    charge: Share = Field(gt=0, le=1, description="up to which it counts")
    loss: Share | None = Field(ge=0, description="largest rise of the loss over the best setting's; null for any")


DEFAULT = (
    Step(charge=0.05, loss=None),
    Step(charge=0.2, loss=0.1),
    Step(charge=0.5, loss=0.02),
    Step(charge=1.0, loss=0.0),
)


@dataclass(frozen=True)
class Charge:
    """How full: a share of 1, and how that is known."""

    share: float
    source: str


def read_charge(text: str, root: Path = POWER) -> Charge:
    """What a user says, 20% or 0.2, or what this machine says where it is "auto".

    A machine that is plugged in, or has no battery, has a full one. Of several batteries the emptiest counts.

    Raises DanluError where the text is no share.
    """
    if text == AUTO:
        return _of_machine(root)
    try:
        share = float(str(read_share(text)))
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise DanluError(f"{text!r} is no charge", where="--battery", fix="write it as 20%, or auto for this machine's")
    return Charge(share, "as told")


def _of_machine(root: Path) -> Charge:
    return _of_linux(root) if root.is_dir() else _of_other_system()


def _of_other_system() -> Charge:
    """As psutil tells it, where there is no such folder of Linux's."""
    found = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if found is None:
        return Charge(1.0, NONE)
    share = min(max(found.percent / 100, 0.0), 1.0)
    return _plugged(share) if found.power_plugged else Charge(share, OWN)


def _plugged(share: float) -> Charge:
    return Charge(1.0, f"plugged in, battery at {share:.0%}")


def _of_linux(root: Path) -> Charge:
    batteries = [place for place in sorted(root.glob("*")) if _said(place, "type") == "Battery"]
    system = [place for place in batteries if _said(place, "scope") != "Device"]  # not that of a mouse or pen
    charges = [int(said) / 100 for place in system if (said := _said(place, "capacity")).isdigit()]
    if not charges:
        return Charge(1.0, NONE)
    if any(_said(place, "type") != "Battery" and _said(place, "online") == "1" for place in root.glob("*")) or all(
        _said(place, "status") in PLUGGED for place in system
    ):
        return _plugged(min(charges))
    return Charge(min(charges), OWN)


def _said(place: Path, name: str) -> str:
    try:
        return (place / name).read_text().strip()
    except OSError:
        return ""


def write_policy(out: Path, steps: Sequence[Step] = DEFAULT) -> None:
    """The table as YAML, with a word on how it is read."""
    write_aside(out, HEAD + yaml.safe_dump([step.plain() for step in steps], sort_keys=False))


def read_policy(path: Path) -> tuple[Step, ...]:
    """A table, by rising charge; the usual one where there is no file. Raises DanluError where it is damaged."""
    if not path.is_file():
        return DEFAULT
    try:
        steps: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        found = TypeAdapter(tuple[Step, ...]).validate_python(steps)
    except (yaml.YAMLError, UnicodeDecodeError):
        raise DanluError("is no YAML", where=path, fix="delete it: the usual table then counts") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
        raise DanluError(what, where=path, fix="a line is `- {charge: 20%, loss: 10%}`") from None
    if not found or max(step.charge for step in found) < 1:
        raise DanluError("says nothing of a full battery", where=path, fix="add a line with charge: 100%")
    return tuple(sorted(found, key=lambda step: step.charge))


def rise_at(charge: float, steps: Sequence[Step]) -> float | None:
    """The largest rise of the loss at a charge; None for any. `steps`: by rising charge, the last one 1."""
    return next(step.loss for step in steps if charge <= step.charge)
