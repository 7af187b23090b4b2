"""The doctor on this very machine, and the parts of it that can go wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from danlu.device.bandwidth import read_bandwidth
from danlu.device.cores import usable_cores
from danlu.device.probe import EXTRAS, compiler, print_probe, probe, recommend, try_import


@pytest.fixture(scope="module")
def found() -> dict:
    return probe()


def test_it_takes_less_than_15_seconds(found: dict) -> None:
    assert found["seconds"] < 15


def test_what_it_finds_is_json_and_plausible(found: dict) -> None:
    json.dumps(found)
    assert 1 <= found["cores"]["usable"] <= found["cores"]["logical"]
    assert 1 < found["gemm"]["cpu"]["fp32"]["value"] < 1e5
    assert 0.5 < found["read_bandwidth"]["value"] < 1e4
    assert 0 < found["memory"]["available"]["value"] <= found["memory"]["total"]["value"]
    assert found["disk"]["free"]["unit"] == "byte"
    assert found["versions"]["torch"] != "absent"


def test_it_prints_every_extra_and_an_advice(found: dict, capsys: pytest.CaptureFixture[str]) -> None:
    print_probe(found)
    said = capsys.readouterr().out
    for name in found["extras"]:
        assert f"extra {name}" in said
    assert said.splitlines()[-1] == found["recommendation"]
    assert "GB/s" in said and "GFLOP/s bf16" in said


def test_an_import_is_tried_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "crashing.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    assert try_import(("json",)) == ""
    assert try_import(("json", "no_such_thing")) == "ModuleNotFoundError: No module named 'no_such_thing'"
    assert "SIGILL: built for another processor" in try_import(("crashing",))


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiler() == {"works": "", "why": "no-such-compiler not found, so torch.compile cannot be used"}


def test_the_advice_follows_the_measurement(found: dict) -> None:
    def rate(value: float) -> dict:
        return {"value": value, "unit": "GFLOP/s"}

    slow_bf16 = found | {"gemm": {"cpu": {"fp32": rate(100.0), "bf16": rate(40.0)}}, "extras": {"serve": "gone"}}
    assert recommend(slow_bf16).startswith("tune in fp32") and "danlu[serve]" in recommend(slow_bf16)
    fast_bf16 = found | {"gemm": {"cpu": {"fp32": rate(100.0), "bf16": rate(400.0)}}, "extras": {"serve": ""}}
    assert recommend(fast_bf16).startswith("tune in bf16") and "mended" not in recommend(fast_bf16)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no processor affinity")
def test_cores_respect_affinity() -> None:
    one = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, {{{one}}})\n"
        "from danlu.device.cores import usable_cores\nprint(usable_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
    assert usable_cores() >= 1


def test_bandwidth_is_bytes_a_second() -> None:
    assert 5e8 < read_bandwidth(threads=1, repeats=2) < 1e13


def test_extras_are_those_of_the_project() -> None:
    with (Path(__file__).parents[2] / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    distributions = metadata.packages_distributions()
    for name in extras.keys() - {"demo", "dev"}:
        asked = {re.split(r"[>\[]", requirement)[0].replace("-", "_") for requirement in extras[name]}
        # Of what is not installed the module has the distribution's name.
        own = (found for module in EXTRAS[name] for found in distributions.get(module, [module]))
        assert asked == {found.replace("-", "_") for found in own}
