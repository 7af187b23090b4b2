"""What is looked at before minutes of work are spent: libraries, room on the disk, and targets nothing could meet."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from danlu.errors import DanluError, need_extra
from danlu.recipe import Recipe, RecipeFile

if TYPE_CHECKING:
    from danlu.model.config import ModelConfig

FP32 = 4  # bytes
DOUBT = 2.0  # a measured bandwidth may be this much too low, on a machine that is busy


def check_packages(recipe: Recipe, stages: Sequence[str]) -> None:
    """Raise DanluError where a library that the stages need is not installed."""
    needed = [
        ("data" in stages and recipe.data.deduplicate == "near", "datasketch", "data"),
        ("compress" in stages or "certify" in stages, "llama_cpp", "device"),
        ("report" in stages, "matplotlib", "report"),
    ]
    for is_needed, package, extra in needed:
        if is_needed and importlib.util.find_spec(package) is None:
            raise need_extra(package, extra)


def check_room(root: Path, config: ModelConfig, recipe: Recipe, stages: Sequence[str]) -> None:
    """Raise DanluError where the disk has less room than the weights that will be written.

    Tuning writes the merged model; in full tuning each checkpoint holds the weights and both of AdamW's moments, and a
    new one is whole before an old one goes. Compressing writes the model in fp32, and beside it candidates that
    together are hardly larger.
    """
    checkpoints = 3 * (recipe.tune.keep_checkpoints + 1) if recipe.tune.method == "full" else 0
    tuned = 1 if "tune" in stages else 0
    copies = max(tuned * max(checkpoints, 1), tuned + 2 if "compress" in stages else 0)
    need, free = copies * matrix_weights(config) * FP32, shutil.disk_usage(root).free
    if free < need:
        raise DanluError(
            f"the disk has {free / 1e9:.2f} GB free, and this run needs about {need / 1e9:.2f} GB",
            where=root,
            fix="free some space, or choose another disk with --out",
        )


def check_target(file: RecipeFile, config: ModelConfig) -> None:
    """Raise DanluError for a target that none of the types to be tried can meet, whatever tuning brings.

    The bound is a low one: every weight in the smallest type, nothing for scales of norms, caches or the program.
    Decoding one token reads all weights but an untied embedding, so bandwidth bounds its speed.
    """
    target, types = file.recipe.target, file.recipe.compress.types
    embedding = config.vocab_size * config.width
    smallest = min(types, key=bytes_per_weight)
    whole = bytes_per_weight(smallest) * matrix_weights(config)
    touched = whole if config.tied else whole - bytes_per_weight(smallest) * embedding
    for name, asked, least in (("file_size", target.file_size, whole), ("memory", target.memory, touched)):
        if asked is not None and asked < least:
            reason = f"in {smallest}, the smallest type tried, the weights alone are {_megabytes(least)}"
            raise _impossible(file, name, _megabytes(asked), reason)
    if target.speed is not None:
        from danlu.device.bandwidth import read_bandwidth

        bandwidth = read_bandwidth()
        if target.speed > DOUBT * bandwidth / touched:
            most = f"{bandwidth / touched:,.0f} token/s of {smallest}, the smallest type tried"
            reason = f"this machine reads {bandwidth / 1e9:.0f} GB/s, enough for {most}"
            raise _impossible(file, "speed", f"{target.speed:,g} token/s", reason)


def matrix_weights(config: ModelConfig) -> int:
    """How many weights the matrices of a decoder hold, which is all but its norms and biases."""
    attention = 2 * config.width * config.head_width * (config.heads + config.kv_heads)
    feedforward = 3 * config.width * config.feedforward_width
    embeddings = config.vocab_size * config.width * (1 if config.tied else 2)
    return config.layers * (attention + feedforward) + embeddings


def bytes_per_weight(file_type: str) -> float:
    """Of a llama.cpp file type's main tensor type: q4_k_m is made of Q4_K and larger ones."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    tensor_type = re.sub(r"(_K)_[SML]$", r"\1", file_type.upper())
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[tensor_type]]
    return size / block


def _impossible(file: RecipeFile, name: str, asked: str, reason: str) -> DanluError:
    return DanluError(
        f"target.{name}: {asked} cannot be met: {reason}",
        where=file.origins.get(("target", name), file.path),
        fix="ask for less, try smaller types, or start from a smaller model",
    )


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
