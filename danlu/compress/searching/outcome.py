"""A file that was made and measured, and how it stands to the target."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from danlu.artifact import Figures, write_json
from danlu.compress.searching.costs import Told
from danlu.compress.searching.settings import Preference
from danlu.device.settings import Target
from danlu.device.verdict import Line, amount, judge, worst_miss


@dataclass(frozen=True)
class Outcome:
    """A file, what was told of it and what was measured.

    Attributes:
        number: of the candidate; its file is NUMBER.gguf.
        forms: the format of each matrix. cache: of keys and values.
        told: before it was made.
        figures: as measured: see danlu/device/proof.py.
        start: the model that was rounded: see danlu/compress/searching/starts.py.
        limits: that it was chosen for, see `Asked.limits`.
    """

    number: int
    forms: dict[str, str]
    cache: str
    told: Told
    figures: Figures
    start: str
    limits: str

    @classmethod
    def load(cls, path: Path) -> Outcome:
        """What `save` wrote."""
        read = json.loads(path.read_text(encoding="utf-8"))
        return cls(**(read | {"told": Told(**read["told"])}))

    def save(self, folder: Path) -> None:
        """Beside its file."""
        write_json(folder / f"{self.number}.json", asdict(self))

    def file(self, folder: Path) -> Path:
        """Where it lies."""
        return folder / f"{self.number}.gguf"

    def value(self, name: str) -> float:
        """Of a figure."""
        return float(self.figures[name]["value"])

    def lines(self, target: Target) -> list[Line]:
        """Of the target, judged as the certificate judges them: the loss by its interval's upper end."""
        return judge(
            target,
            file_size=self.figures["file_size"],
            memory=self.figures["memory"],
            decode=self.figures["decode"],
            loss_rise=self.figures["heldout_loss_rise"],
            memory_name="memory of file and cache",
        )

    def missed(self, target: Target) -> str:
        """The lines it misses, in words; empty where it meets all."""
        return "; ".join(f"{line.name}: {line.short}" for line in self.lines(target) if line.short)

    @property
    def words(self) -> str:
        """It in one line."""
        return (
            f"{amount(self.value('file_size'), 'byte')}, {self.value('decode'):,.0f} token/s, "
            f"KLD {self.value('divergence'):.4f}, loss {self.value('heldout_loss_rise'):+.2%}"
        )


def choose(outcomes: Sequence[Outcome], target: Target, prefer: Preference) -> Outcome:
    """The best, smallest or fastest that meets the target; where none does, the one whose worst line misses least."""
    meeting = [each for each in outcomes if worst_miss(each.lines(target)) == 0]
    if not meeting:
        return min(outcomes, key=lambda each: worst_miss(each.lines(target)))
    if prefer == "smallest":
        return min(meeting, key=lambda each: each.value("memory"))
    if prefer == "fastest":
        return max(meeting, key=lambda each: each.value("decode"))
    return min(meeting, key=lambda each: each.value("divergence"))


def plain(outcome: Outcome, target: Target, chosen: bool) -> dict[str, Any]:
    """As in frontier.json."""
    counts: dict[str, int] = {}
    for form in outcome.forms.values():
        counts[form] = counts.get(form, 0) + 1
    return {
        "number": outcome.number,
        "start": outcome.start,
        "formats": counts,
        "matrices": outcome.forms,
        "cache": outcome.cache,
        "told": asdict(outcome.told),
        "figures": outcome.figures,
        "missed": outcome.missed(target),
        "chosen": chosen,
    }
