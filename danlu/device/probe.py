"""`danlu doctor`: what this machine is, what it measures, and what works on it."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from danlu import __version__
from danlu.artifact import figure, library_version
from danlu.console import result, table
from danlu.device.bandwidth import read_bandwidth
from danlu.device.cores import usable_cores

# As the kernel spells them -> as people call them: x86, then Arm.
INSTRUCTIONS = {
    "avx2": "AVX2", "fma": "FMA", "f16c": "F16C", "avx512f": "AVX-512", "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX-512 VNNI", "avx512_bf16": "AVX-512 BF16", "avx512_fp16": "AVX-512 FP16",
    "amx_bf16": "AMX BF16", "amx_int8": "AMX INT8",
    "asimd": "NEON", "asimddp": "dot product", "i8mm": "INT8 matrix", "bf16": "BF16", "sve": "SVE", "sve2": "SVE2",
    "sme": "SME",
}  # fmt: skip
LIBRARIES = ("torch", "numpy", "tokenizers", "safetensors", "llama-cpp-python", "datasketch", "transformers", "peft")
EXTRAS = {
    "data": ("datasketch",),
    "device": ("llama_cpp",),
    "serve": ("starlette", "uvicorn"),
    "report": ("matplotlib",),
    "tensorboard": ("tensorboard",),
    "evaluate": ("sacrebleu",),
    "cluster": ("ray",),
    "float8": ("torchao",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "onnxruntime", "openvino"),
    "executorch": ("executorch",),
    "few-bits": ("transformers", "compressed_tensors"),
    "lowrank": ("tensorly",),
    "examples": ("gymnasium", "PIL"),
    "check": ("transformers",),
    "bench": ("transformers", "peft"),
}
PATIENCE = 7.0  # seconds an extra may take to import
GEMM_SECONDS = 0.4  # of measuring one matrix product


def probe(place: Path | None = None) -> dict[str, Any]:
    """Look at this machine and measure it, in under 15 s.

    Args:
        place: a directory on the disk that will hold runs; by default the current one.

    Returns: JSON-ready values: processor, cores, instructions, memory, disk, gemm, read_bandwidth, gpus, versions,
        extras, compiler, recommendation, seconds.
    """
    started = time.monotonic()
    extras = try_extras()  # before anything is measured: imports in other processes would disturb it
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(place or Path.cwd())
    found: dict[str, Any] = {
        "processor": processor(),
        "cores": {"usable": usable_cores(), "logical": os.cpu_count()},
        "instructions": instructions(),
        "memory": {"total": figure(memory.total, "byte"), "available": figure(memory.available, "byte")},
        "disk": {"total": figure(disk.total, "byte"), "free": figure(disk.free, "byte")},
        "gemm": {"cpu": _gemm("cpu")},
        "read_bandwidth": figure(read_bandwidth() / 1e9, "GB/s", by=f"best of 12 passes, {usable_cores()} threads"),
        "gpus": _gpus(),
        "versions": {"danlu": __version__, "python": platform.python_version(), **_versions()},
        "extras": extras,
        "compiler": compiler(),
    }
    found["recommendation"] = recommend(found)
    found["seconds"] = round(time.monotonic() - started, 1)
    return found


def print_probe(found: dict[str, Any]) -> None:
    """What `probe` found, as tables and one line of advice."""
    cpu = found["gemm"]["cpu"]
    rows = [
        ("processor", found["processor"]),
        ("cores", f"{found['cores']['usable']} usable, {found['cores']['logical']} logical"),
        ("instructions", ", ".join(found["instructions"]) or "not known"),
        ("memory", f"{_gigabytes(found['memory']['available'])} free of {_gigabytes(found['memory']['total'])}"),
        ("disk", f"{_gigabytes(found['disk']['free'])} free of {_gigabytes(found['disk']['total'])}"),
        ("matrix product", ", ".join(f"{rate['value']:,.0f} {rate['unit']} {name}" for name, rate in cpu.items())),
        ("reading memory", f"{found['read_bandwidth']['value']:.1f} GB/s"),
        ("C++ compiler", found["compiler"]["works"] or f"none: {found['compiler']['why']}"),
    ]
    for gpu in found["gpus"]:
        rates = ", ".join(f"{rate['value']:,.0f} {rate['unit']} {name}" for name, rate in gpu["gemm"].items())
        rows.append(("GPU", f"{gpu['name']}, {_gigabytes(gpu['memory'])}, {rates}"))
    rows += [("version", f"{name} {number}") for name, number in found["versions"].items()]
    rows += [(f"extra {name}", why or "works") for name, why in found["extras"].items()]
    table("This machine", ("what", "found"), rows)
    result(found["recommendation"])


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def instructions() -> list[str]:
    """The instruction sets that matter to matrix products, of those the processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features"))).split()
    except (OSError, StopIteration):
        return ["NEON"] if platform.machine() in ("arm64", "aarch64") else []
    return [name for flag, name in INSTRUCTIONS.items() if flag in flags]


def try_extras() -> dict[str, str]:
    """Import the packages of every extra, each in a process of its own; the reason it fails, or "" where it works."""
    with ThreadPoolExecutor(len(EXTRAS)) as pool:
        return dict(zip(EXTRAS, pool.map(try_import, EXTRAS.values()), strict=True))


def try_import(packages: tuple[str, ...]) -> str:
    """Why these packages cannot be imported, or "" where they can; a crash ends another process, not this one."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", f"import {', '.join(packages)}"],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"takes more than {PATIENCE:.0f} s to import"
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        hint = ": built for another processor, install it from source" if name == "SIGILL" else ""
        return f"crashes when imported ({name}{hint})"
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def compiler() -> dict[str, str]:
    """The C++ compiler that torch.compile would use, its version in `works`; or in `why` what is missing."""
    from danlu.train.compiling import can_compile, compiler_name

    name = compiler_name()
    if shutil.which(name) is None:
        return {"works": "", "why": f"{name} not found, so torch.compile cannot be used"}
    if not can_compile():
        return {"works": "", "why": f"{name} is there, but Python's headers are not, so torch.compile cannot be used"}
    said = subprocess.run([name, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
    return {"works": said[0] if said else name, "why": ""}


def recommend(found: dict[str, Any]) -> str:
    """One line of advice drawn from what was measured."""
    rates = {name: rate["value"] for name, rate in found["gemm"]["cpu"].items()}
    precision = "bf16" if rates["bf16"] > 1.2 * rates["fp32"] else "fp32"
    blocks = "compiled" if found["compiler"]["works"] else "not compiled (no C++ compiler)"
    speed = found["read_bandwidth"]["value"] * 1e9
    missing = [name for name, why in found["extras"].items() if why]
    where = "on the GPU" if found["gpus"] else f"with {found['cores']['usable']} threads"
    advice = (
        f"tune in {precision} {where}, {blocks}; a model of 100 MB decodes at most at {speed / 100e6:,.0f} token/s here"
    )
    return advice + (f"; to be mended: danlu[{', '.join(missing)}]" if missing else "")


def _gemm(device: str) -> dict[str, Any]:
    import torch

    from danlu.train.precision import gemm_rate

    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    by = "2048 x 2048 x 2048, the best of several"
    return {name: figure(gemm_rate(kind, GEMM_SECONDS, device), "GFLOP/s", by=by) for name, kind in kinds.items()}


def _gpus() -> list[dict[str, Any]]:
    """CUDA devices, each measured."""
    import torch

    if not torch.cuda.is_available():
        return []
    return [
        {
            "name": torch.cuda.get_device_name(number),
            "memory": figure(torch.cuda.get_device_properties(number).total_memory, "byte"),
            "gemm": _gemm(f"cuda:{number}"),
        }
        for number in range(torch.cuda.device_count())
    ]


def _versions() -> dict[str, str]:
    return {name: library_version(name) or "absent" for name in LIBRARIES}


def _gigabytes(amount: dict[str, Any]) -> str:
    return f"{amount['value'] / 1e9:,.1f} GB"
