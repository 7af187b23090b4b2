"""Compiling a model block by block, where it pays for itself within the run."""

from __future__ import annotations

import os
import shutil

import torch

from danlu.model.config import ModelConfig
from danlu.model.loss import Finish, softmax_gradient
from danlu.model.transformer import Decoder
from danlu.train.precision import gemm_rate

# Measured by bench/tune_throughput.py; see docs/lab-notebook.md.
COST = 25.0  # seconds the first compiled step takes longer, on two cores with an empty cache
GAIN = 0.12  # share of an uncompiled step's time that compiling saves
EFFICIENCY = 0.6  # an uncompiled step's share of the matrix-product rate


def has_compiler() -> bool:
    """Whether a C++ compiler is at hand, which torch.compile needs on a CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name)


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
    if not has_compiler():
        return False, "off: no C++ compiler found"
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


def compile_blocks(model: Decoder) -> Finish:
    """Compile each block in place (one program serves all) and return the compiled end of the loss."""
    for block in model.blocks:
        block.compile(dynamic=False)
    model.norm.compile(dynamic=False)
    return torch.compile(softmax_gradient, dynamic=True)
