"""Energy counters, read as Linux writes them."""

from __future__ import annotations

from pathlib import Path

from danlu.device.energy import Counter


def zone(root: Path, place: str, name: str, energy: int, most: int = 1_000_000) -> Path:
    """A counter as the kernel shows it."""
    folder = root / place
    folder.mkdir(parents=True)
    for file, value in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", most)):
        (folder / file).write_text(f"{value}\n")
    return folder / "energy_uj"


def test_packages_are_added_and_wrap(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 100)
    core = zone(tmp_path, "intel-rapl:0:0", "core", 5)  # a part of the first package
    twice = zone(tmp_path, "intel-rapl-mmio:0", "package-0", 7)  # the first package by another way
    counter = Counter.find(tmp_path)
    assert counter is not None and set(counter.ranges) == {first, second}
    before = counter.read()
    first.write_text("100000\n")  # it began anew
    second.write_text("300100\n")
    for other in (core, twice):
        other.write_text("999999\n")
    assert counter.joules(before, counter.read()) == 0.5


def test_there_may_be_none_or_none_to_read(tmp_path: Path) -> None:
    assert Counter.find(tmp_path / "absent") is None
    zone(tmp_path, "intel-rapl:0", "package-0", 1).unlink()
    assert Counter.find(tmp_path) is None
