"""Weights on disk, whatever the format, and the one way they become a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from danlu.errors import DanluError
from danlu.model.config import ModelConfig
from danlu.model.transformer import Decoder


@dataclass(frozen=True)
class Stored:
    """One tensor on disk.

    Attributes:
        name: its name in the file.
        file: where it lies.
        shape: outermost dimension first.
        read: reads it into new memory, in the dtype asked for.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    read: Callable[[torch.dtype], Tensor]


def build(config: ModelConfig, stored: Mapping[str, Stored], dtype: torch.dtype, device: torch.device | str) -> Decoder:
    """A decoder filled from disk, one tensor at a time; no memory is taken for weights before they are read.

    Args:
        config: its shape.
        stored: our name of each weight -> where it lies.
        dtype: of all parameters.
        device: where they are put.

    Raises DanluError naming the first weight that is missing, of another shape, or not part of the model.
    """
    with torch.device("meta"):
        model = Decoder(config)
    check(model, stored)
    weights = {name: stored[name].read(dtype).to(device) for name in model.state_dict()}
    model.load_state_dict(weights, assign=True)
    return model


def check(model: Decoder, stored: Mapping[str, Stored]) -> None:
    """Compare names and shapes with what the model needs, before anything is read."""
    needed = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    for name, shape in needed.items():
        if name not in stored:
            some = next(iter(stored.values()), None)
            raise DanluError(f"the weight {name} is missing", where=some.file.parent if some else None)
        found = stored[name]
        if found.shape != shape:
            what = f"{found.name} has shape {list(found.shape)}, but the configuration makes it {list(shape)}"
            raise DanluError(what, where=found.file, fix="the weights and the configuration belong to different models")
    for name, found in stored.items():
        if name not in needed:
            raise DanluError(
                f"{found.name} is no part of the model its configuration describes",
                where=found.file,
                fix="the weights and the configuration belong to different models",
            )
