"""What is looked at before minutes of work are spent: libraries, room on the disk, targets that nothing could meet."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from danlu.artifact import WORK
from danlu.errors import DanluError, need_extra
from danlu.recipe import Recipe, RecipeFile

if TYPE_CHECKING:
    from danlu.model.config import ModelConfig

FP32 = 4  # bytes


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

    Tuning writes the merged model; in full and partial tuning each checkpoint holds the weights and both of AdamW's
    moments, and a new one is whole before an old one goes; those of a run that is gone on with are there already.
    Compressing writes the model in fp32, and beside it candidates that together are hardly larger.
    """
    checkpoints = 3 * (recipe.tune.keep_checkpoints + 1) if recipe.tune.method in ("full", "partial") else 0
    tuned = 1 if "tune" in stages else 0
    copies = max(tuned * max(checkpoints, 1), tuned + 2 if "compress" in stages else 0)
    need, free = copies * _weights(config) * FP32, shutil.disk_usage(root).free
    there = sum(file.stat().st_size for file in root.glob(f".tune-*.building/{WORK}/**/*") if file.is_file())
    if free + there < need:
        raise DanluError(
            f"the disk has {free / 1e9:.2f} GB free, and this run needs about {need / 1e9:.2f} GB",
            where=root,
            fix="free some space, or choose another disk with --out",
        )


def check_target(file: RecipeFile, config: ModelConfig) -> None:
    """Raise DanluError, naming the recipe's line, for a target that no type to be tried can meet."""
    from danlu.compress.presets.possible import check_target as check

    try:
        check(file.recipe.compress, file.recipe.target, config)
    except DanluError as error:
        where = file.origins.get(tuple(str(error.where).split(".")), file.path)
        raise DanluError(f"{error.where} {error.what}", where=where, fix=error.fix) from None


def check_draft(file: RecipeFile, home: Path) -> None:
    """Raise DanluError, naming the recipe's line, where the model that is to guess ahead is not there."""
    draft = file.recipe.certify.beside(home).draft
    if draft is not None and not Path(draft).is_file():
        where = file.origins.get(("certify", "draft"), file.path)
        raise DanluError(f"certify.draft: there is no file {draft}", where=where, fix="name a smaller model's GGUF")


def _weights(config: ModelConfig) -> int:
    """How many weights the matrices of a decoder hold, which is all but its norms and biases."""
    from danlu.train.compiling import parameters

    return parameters(config) + (0 if config.tied else config.vocab_size * config.width)
