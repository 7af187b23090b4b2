"""How full the battery is, and the table of what may be lost for it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from danlu.device.battery import DEFAULT, POLICY, Step, read_charge, read_policy, rise_at, write_policy
from danlu.errors import DanluError


def supply(root: Path, place: str, **files: object) -> None:
    """A source of power as the kernel shows it."""
    (root / place).mkdir(parents=True)
    for name, value in files.items():
        (root / place / name).write_text(f"{value}\n")


def test_a_charge_as_told() -> None:
    assert read_charge("20%").share == 0.2 and read_charge("0.2").share == 0.2
    for wrong in ("much", "120%", "-1"):
        with pytest.raises(DanluError, match="is no charge"):
            read_charge(wrong)


def test_this_machines_charge(tmp_path: Path) -> None:
    assert read_charge("auto", tmp_path).share == 1.0
    supply(tmp_path, "mouse", type="Battery", scope="Device", capacity=3, status="Discharging")
    assert read_charge("auto", tmp_path).source == "no battery here"
    supply(tmp_path, "BAT0", type="Battery", capacity=60, status="Discharging")
    supply(tmp_path, "BAT1", type="Battery", capacity=18, status="Unknown")
    supply(tmp_path, "AC", type="Mains", online=0)
    assert read_charge("auto", tmp_path).share == 0.18
    (tmp_path / "AC" / "online").write_text("1\n")
    assert read_charge("auto", tmp_path).share == 1.0


@pytest.mark.parametrize(
    ("found", "share"),
    [
        (None, 1.0),
        (SimpleNamespace(percent=30, power_plugged=False), 0.3),
        (SimpleNamespace(percent=30, power_plugged=True), 1.0),
    ],
)
def test_other_systems_are_asked_through_psutil(
    found: SimpleNamespace | None, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "sensors_battery", lambda: found, raising=False)
    assert read_charge("auto", tmp_path / "absent").share == share


def test_a_battery_that_is_charged_counts_as_full(tmp_path: Path) -> None:
    supply(tmp_path, "BAT0", type="Battery", capacity=18, status="Charging")
    found = read_charge("auto", tmp_path)
    assert found.share == 1.0 and "18%" in found.source


def test_the_table_is_read_as_it_was_written_and_can_be_changed(tmp_path: Path) -> None:
    file = tmp_path / POLICY
    assert read_policy(file) == DEFAULT
    write_policy(file)
    assert read_policy(file) == DEFAULT
    file.write_text("- {charge: 100%, loss: 1%}\n- {charge: 30%, loss: null}\n", encoding="utf-8")
    steps = read_policy(file)
    assert steps == (Step(charge=0.3, loss=None), Step(charge=1.0, loss=0.01))
    assert [rise_at(charge, steps) for charge in (0.0, 0.3, 0.31, 1.0)] == [None, None, 0.01, 0.01]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- {charge: 30%, loss: 1%}", "says nothing of a full battery"),
        ("- {charge: 100%, loss: -1}", "0.loss"),
        ("- {charge: 2.0, loss: 0}", "0.charge"),
        ("- {charge: 100%, lost: 0}", "0.loss: field required"),
        ("[", "is no YAML"),
        ("", "says nothing|valid tuple"),
    ],
)
def test_damaged_tables(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / POLICY).write_text(text, encoding="utf-8")
    with pytest.raises(DanluError, match=told):
        read_policy(tmp_path / POLICY)
