"""Compiling a model block by block, where it pays for itself within the run."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig

import torch
import torch._functorch.config
import torch._inductor.config
from torch import nn

from danlu.model.config import ModelConfig
from danlu.model.transformer import Block, Embedded
from danlu.train.precision import gemm_rate
from danlu.train.settings import Compile

# Measured by bench/tune_throughput.py; see docs/lab-notebook.md.
COST = 14.0  # seconds the first compiled step takes longer, on two cores with an empty cache
GAIN = 0.15  # share of an uncompiled step's time that compiling saves
EFFICIENCY = 0.55  # an uncompiled step's share of the matrix-product rate
PYTHON = ("-include", "Python.h", f"-I{sysconfig.get_path('include')}")
NEWEST = ("-mavx512f", "-mavx512vnni", "-mavx512bf16", "-mamx-tile")


def compiler_name() -> str:
    """The C++ compiler that torch.compile takes."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def can_compile() -> bool:
    """Whether a C++ compiler and Python's headers are at hand, which torch.compile needs on a CPU."""
    return _accepts("-fopenmp", *PYTHON)


def _accepts(*options: str) -> bool:
    """Whether the compiler takes these options, for an empty file."""
    if shutil.which(compiler_name()) is None:
        return False
    command = [compiler_name(), *options, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def choose_compile(asked: Compile, flops: float, dtype: torch.dtype, device: str = "cpu") -> tuple[bool, str]:
    """Whether to compile, and why, in words.

    Args:
        asked: "on", "off" or "auto": where it saves more time than it takes.
        flops: of the whole run, forward and backward, on this process.
        device: the type of what computes.
    """
    if asked != "auto":
        return asked == "on", f"{asked}, as asked"
    if not can_compile():
        return False, "off: no C++ compiler with Python's headers found"
    seconds = flops / (gemm_rate(dtype, device=device) * 1e9 * EFFICIENCY)
    saved = GAIN * seconds
    words = f"compiling would save about {saved:,.0f} s of {seconds:,.0f} s and take {COST:,.0f} s"
    return saved > COST, ("on: " if saved > COST else "off: ") + words


def parameters(config: ModelConfig) -> int:
    """Weights that take part in matrix products for every token: all linear layers and the head."""
    inner, shared = config.heads * config.head_width, config.kv_heads * config.head_width
    block = config.width * (2 * inner + 2 * shared + 3 * config.feedforward_width)
    return config.layers * block + config.vocab_size * config.width


def compile_blocks(model: nn.Module) -> None:
    """Compile each block in place, before anything is wrapped around it; one program serves all that are alike."""
    _trust_compiler()
    # Keep a tenth less for the backward pass: norms and gates are computed again, which costs next to nothing.
    torch._functorch.config.activation_memory_budget = 0.9
    if isinstance(model, Embedded) and not any(weight.requires_grad for weight in model.embedding.parameters()):
        # The first block's input then asks for a gradient as every other's does: without it, it needs its own program.
        model.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    for block in model.modules():
        if isinstance(block, Block):
            # Not what hooks around it do.
            block.forward = torch.compile(block.forward, dynamic=False)  # type: ignore[method-assign]


def _trust_compiler() -> None:
    """Skip the library's trial builds of vector code (7 s) where the compiler knows the instructions they try."""
    if platform.machine() in ("x86_64", "AMD64") and _accepts(*NEWEST):
        torch._inductor.config.cpp.vec_isa_ok = True
