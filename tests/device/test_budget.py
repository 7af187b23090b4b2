"""Which setting a memory and a battery allow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.device.battery import DEFAULT, Charge, rise_at
from danlu.device.budget import Budget, Measured, Setting, choose, read_elastic, read_size, within
from danlu.errors import DanluError


def setting(name: str, size: int, loss: float, cost: float, token: int = 100, joules: float | None = None) -> Setting:
    def amount(value: float, unit: str) -> Measured:
        return Measured(value=value, unit=unit)

    return Setting(
        name=name,
        **dict.fromkeys(("layers", "heads", "channels", "width"), 1),
        file_bytes=size,
        token_bytes=token,
        peak_memory=amount(size, "byte"),
        loss=amount(loss, "nat/token"),
        decode=amount(1 / cost, "token/s"),
        processor=amount(cost, "s/token"),
        energy=None if joules is None else amount(joules, "J/token"),
    )


LARGE, MIDDLE, SMALL = (
    setting("large", 3_000_000, 2.0, 0.03),
    setting("middle", 2_000_000, 2.1, 0.02),
    setting("small", 1_000_000, 3.0, 0.01),
)
ALL = (LARGE, MIDDLE, SMALL)


def chosen(memory: int | None = None, charge: float | None = None, context: int = 1000) -> str:
    full = None if charge is None else Charge(charge, "as told")
    return choose(ALL, Budget(context, memory, full, DEFAULT))[0].name


def test_memory_is_a_limit_with_keys_and_values_in_it() -> None:
    assert chosen(10_000_000) == "large" and chosen(3_100_000) == "large"
    assert chosen(3_099_999) == "middle" and chosen(3_099_999, context=10) == "large"
    with pytest.raises(DanluError, match=r"keeps to 1.05 MB: the nearest, small, takes 1.10 MB, of which 100.0 kB are"):
        chosen(1_050_000)
    with pytest.raises(DanluError, match="--context 500"):
        chosen(1_050_000)


def test_the_emptier_the_battery_the_less_is_spent() -> None:
    by_charge = [chosen(charge=charge) for charge in (1.0, 0.6, 0.2, 0.06, 0.05)]
    assert by_charge == ["large", "large", "middle", "middle", "small"]
    assert chosen(2_500_000, 1.0) == "middle" and chosen(1_500_000, 1.0) == "small"


def test_joules_go_before_processor_time() -> None:
    settings = (setting("slow", 1, 2.0, 0.03, joules=0.1), setting("fast", 1, 2.0, 0.01, joules=0.2))
    best, why = choose(settings, Budget(10, None, Charge(0.01, "as told"), DEFAULT))
    assert best.name == "slow" and "0.1 J/token" in why and "processor" not in why


@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0.5, 5), st.floats(1e-3, 1)), min_size=1, max_size=8),
    st.integers(1, 60),
    st.floats(0, 1),
)
def test_the_budget_is_kept_to(sizes: list[tuple[int, float, float]], memory: int, charge: float) -> None:
    settings = [setting(f"s{number}", *each, token=1) for number, each in enumerate(sizes)]
    inside = [each for each in settings if each.memory(5) <= memory]
    budget = Budget(5, memory, Charge(charge, "as told"), DEFAULT)
    if not inside:
        with pytest.raises(DanluError, match="no setting keeps to"):
            choose(settings, budget)
        return
    found, _ = choose(settings, budget)
    rise, best = rise_at(charge, DEFAULT), min(each.loss.value for each in inside)
    near = [each for each in inside if rise is None or each.loss.value <= best * (1 + rise)]
    assert found in near and found.cost.value == min(each.cost.value for each in near)


def test_sizes_and_models_of_one_size(tmp_path: Path) -> None:
    assert read_size("20MB") == 20_000_000 and read_size(None) is None
    with pytest.raises(DanluError, match="is no size"):
        read_size("much")
    assert within("runs/any", None, None, 10) == "runs/any"
    with pytest.raises(DanluError, match="has one size"):
        within(tmp_path, "20MB", None, 10)


def test_a_device_needs_no_pytorch_to_choose_and_cut() -> None:
    asked = "import sys, danlu.device.budget; print(*({'torch', 'llama_cpp'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert not ended.stdout.split()


def test_a_table_that_is_damaged_or_of_another_file(tmp_path: Path) -> None:
    (tmp_path / "elastic.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DanluError, match="is damaged"):
        read_elastic(tmp_path)
    table = {"sha256": "0" * 64, "context": 64, "settings": [SMALL.model_dump(mode="json", exclude_none=True)]}
    (tmp_path / "elastic.json").write_text(json.dumps(table), encoding="utf-8")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(DanluError, match=r"is not the file that elastic\.json is of"):
        read_elastic(tmp_path)
