"""What computing costs a battery: joules by the processor's own counter, where there is one that may be read.

Linux's powercap interface counts the energy of each processor package in microjoules, wrapping at a known range
(kernel documentation, power/powercap). It counts all that the package does, other programs included. Most systems let
only root read it (CVE-2020-8694).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """The energy counters of all packages.

    Attributes:
        ranges: of each counter's file, the microjoules at which it starts from 0 again.
    """

    ranges: Mapping[Path, int]

    @classmethod
    def find(cls, root: Path = POWERCAP) -> Counter | None:
        """This machine's; None where it has none, or none that this process may read."""
        named = {_text(zone / "name"): zone for zone in sorted(root.glob("*:*"))}  # some count one package twice
        packages = [zone for name, zone in named.items() if name.startswith("package")]
        ranges = {zone / "energy_uj": _text(zone / "max_energy_range_uj") for zone in packages}
        readable = {file: int(most) for file, most in ranges.items() if most.isdigit() and _text(file).isdigit()}
        return cls(readable) if readable else None

    def read(self) -> dict[Path, int]:
        """Where each counter stands now, in microjoules. Raises OSError where one is gone."""
        return {file: int(file.read_text()) for file in self.ranges}

    def joules(self, before: Mapping[Path, int], after: Mapping[Path, int]) -> float:
        """Between two readings, which must be less than one round of a counter (minutes at the least) apart."""
        return sum((after[file] - before[file]) % most for file, most in self.ranges.items()) / 1e6


def _text(file: Path) -> str:
    """What a file of the system says; nothing where it may not be read."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
