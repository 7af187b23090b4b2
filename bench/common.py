"""What every benchmark shares: the machine and commit it ran on, and its last line, one JSON object."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from danlu.artifact import write_json

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "numpy",
    "tokenizers",
    "pyarrow",
    "datasketch",
    "transformers",
    "peft",
    "llama-cpp-python",
    "onnxruntime",
    "compressed-tensors",
    "openvino",
    "executorch",
    "torchao",
)


def commit() -> str:
    """The commit measured, with `+changes` where the tree differs from it; `unknown` outside a checkout."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory in bytes, system, Python, and the versions of what is measured."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": processor(),
        "cores": usable,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def emit(name: str, figures: dict[str, Any], save: bool) -> None:
    """Print the one JSON line a benchmark ends with; with `save`, keep it as bench/results/NAME.json too."""
    record = {"bench": name, "commit": commit(), "machine": machine(), "figures": figures}
    if save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record), flush=True)


def kept(folder: Path, name: str, make: Callable[[], Any]) -> Any:
    """What `make` gives, JSON-ready, or what it gave when FOLDER was worked in before."""
    file = folder / f"{name}.json"
    if not file.is_file():
        print(f"bench: {name}", flush=True)
        write_json(file, make())
    return json.loads(file.read_text(encoding="utf-8"))


def with_saved(name: str, parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is saved of a benchmark's parts, those measured now in the place of theirs; each names its commit."""
    file, now = RESULTS / f"{name}.json", commit()
    saved = json.loads(file.read_text(encoding="utf-8"))["figures"] if file.is_file() else {}
    return saved | {part: {"commit": now} | figures for part, figures in parts.items()}


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with `--save`, which every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="keep the figures under bench/results/")
    return parser
