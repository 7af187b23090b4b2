"""What a search may start from: the model as it is, and smaller ones that pruning makes of it.

A smaller model brings a divergence of its own, which is measured before anything is rounded. One that alone is further
from the original than rounding the whole model takes it is not gone on with.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from danlu.compress.pruning.structured import Shape, check_shape, shrink
from danlu.compress.searching.costs import Costs
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint
from danlu.model.config import ModelConfig
from danlu.model.gguf import write_gguf

WHOLE = "whole"  # the name of the model as it is
AUTO, NONE = "auto", "none"
FEWER = 0.1  # of layers and channels that go by default, at most: without distillation more cannot pay
STEPS = (256, 128, 64, 32)  # channels go in whole blocks of number formats
PART = re.compile(r"\s*(layers|heads|channels)\s*=\s*([0-9]+)\s*")


@dataclass(frozen=True)
class Start:
    """A model that a mix of formats is chosen for.

    Attributes:
        name: WHOLE, or what is left, such as layers=28,channels=1408.
        checkpoint: its weights in F32.
        costs: of rounding it.
        own: its divergence from the original before any rounding, nat a token.
    """

    name: str
    checkpoint: Checkpoint
    costs: Costs
    own: float = 0.0


def read_shape(text: str) -> Shape:
    """What is to be left, from layers=28,channels=1408. Raises DanluError where it says something else."""
    parts = [PART.fullmatch(part) for part in text.split(",")]
    asked = {found.group(1): int(found.group(2)) for found in parts if found is not None}
    if len(asked) < len(parts):
        fix = "say what is to be left, as layers=28 or layers=28,channels=1408 (heads too), or none"
        raise DanluError(f"{text!r} names no smaller model", where="--pruning", fix=fix)
    return Shape(**asked)


def name_of(shape: Shape) -> str:
    """As `read_shape` reads it."""
    return ",".join(f"{name}={count}" for name, count in asdict(shape).items() if count is not None)


def of_start(name: str) -> str:
    """In a sentence: of which model; nothing for the model as it is."""
    return "" if name == WHOLE else f" of {name}"


def smaller_shapes(config: ModelConfig, pruning: Sequence[str]) -> dict[str, Shape]:
    """The smaller models that are looked at, by their names.

    Args: pruning: shapes as written; AUTO for one and two layers fewer and a tenth of channels fewer, as far as that
        can be had; NONE for nothing.

    Raises DanluError for a shape that was asked for and cannot be had, naming the nearest.
    """
    shapes: list[Shape] = []
    for text in pruning:
        if text == AUTO:
            shapes += [shape for shape in _usual(config) if _possible(config, shape)]
        elif text != NONE:
            shapes.append(_checked(config, text))
    return {name_of(shape): shape for shape in shapes}


def smaller_config(config: ModelConfig, shape: Shape) -> ModelConfig:
    """What a smaller model is, but for which of the layers are left."""
    layers = shape.layers or config.layers
    everywhere = tuple(layer for layer in config.global_layers if layer < layers)
    return replace(check_shape(config, shape), layers=layers, global_layers=everywhere)


def _usual(config: ModelConfig) -> list[Shape]:
    shapes = [Shape(layers=config.layers - gone) for gone in (1, 2) if gone <= FEWER * config.layers]
    width = config.feedforward_width
    step = next((step for step in STEPS if step <= FEWER * width and width % step == 0), None)
    if step is not None:
        shapes.append(Shape(channels=round((1 - FEWER) * width / step) * step))
    return shapes


def _possible(config: ModelConfig, shape: Shape) -> bool:
    try:
        check_shape(config, shape)
    except DanluError:
        return False
    return True


def _checked(config: ModelConfig, text: str) -> Shape:
    shape = read_shape(text)
    try:
        check_shape(config, shape)
    except DanluError as error:
        raise DanluError(f"{text}: {error.what}", where="--pruning", fix=error.fix) from None
    return shape


def write_smaller(checkpoint: Checkpoint, shape: Shape, calibration: str, tokens: int, out: Path) -> None:
    """Make the smaller model and write it as an F32 GGUF.

    Args: calibration, tokens: see `shrink`.

    Raises DanluError where no architecture of Hugging Face computes it.
    """
    with tempfile.TemporaryDirectory(prefix=".smaller-", dir=out.parent) as folder:
        made = Path(folder) / "model"
        shrink(checkpoint, shape, calibration, made, tokens)
        write_gguf(Checkpoint.open(made).load(), checkpoint.tokenizer, out)
