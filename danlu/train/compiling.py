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

from danlu.model.config import ModelConfig
from danlu.model.transformer import Decoder
from danlu.train.precision import gemm_rate

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


def choose_compile(
    asked: str, config: ModelConfig, tokens: int, flops_per_parameter: int, dtype: torch.dtype
) -> tuple[bool, str]:
    """Whether to compile, and why, in words.

    Args:
        asked: "on", "off" or "auto".
        tokens: how many the run computes.
        flops_per_parameter: per token; 6 where all weights learn, 4 where only adapters do (arXiv:2001.08361).
    """
    if asked != "auto":
        return asked == "on", f"{asked}, as asked"
    if not can_compile():
        return False, "off: no C++ compiler with Python's headers found"
    flops = flops_per_parameter * parameters(config) * tokens
    seconds = flops / (gemm_rate(dtype) * 1e9 * EFFICIENCY)
    saved = GAIN * seconds
    words = f"compiling would save about {saved:,.0f} s of {seconds:,.0f} s and take {COST:,.0f} s"
    return saved > COST, ("on: " if saved > COST else "off: ") + words


def parameters(config: ModelConfig) -> int:
    """Weights that take part in matrix products for every token: all linear layers and the head."""
    inner, shared = config.heads * config.head_width, config.kv_heads * config.head_width
    block = config.width * (2 * inner + 2 * shared + 3 * config.feedforward_width)
    return config.layers * block + config.vocab_size * config.width


def compile_blocks(model: Decoder) -> None:
    """Compile each block in place; one program serves all."""
    _trust_compiler()
    # Keep a tenth less for the backward pass: norms and gates are computed again, which costs next to nothing.
    torch._functorch.config.activation_memory_budget = 0.9
    if not model.embedding.tokens.weight.requires_grad:
        # The first block's input then asks for a gradient as every other's does: without it, it needs its own program.
        model.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    for block in model.blocks.children():
        block.compile(dynamic=False)


def _trust_compiler() -> None:
    """Skip the library's trial builds of vector code (7 s) where the compiler knows the instructions they try."""
    if platform.machine() in ("x86_64", "AMD64") and _accepts(*NEWEST):
        torch._inductor.config.cpp.vec_isa_ok = True
