"""Weights on disk, whatever the format, and the one way they become a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from danlu.errors import DanluError
from danlu.model.config import ModelConfig
from danlu.model.families.family import translate
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


@dataclass(frozen=True)
class Weights:
    """All weights of one checkpoint.

    Attributes:
        path: the checkpoint, named where a weight is missing.
        names: the table of our weights' names and the format's.
        found: our name of each weight -> where it lies.
    """

    path: Path
    names: Mapping[str, str]
    found: Mapping[str, Stored]


def build(config: ModelConfig, stored: Weights, dtype: torch.dtype, device: torch.device | str) -> Decoder:
    """A decoder filled from disk, one tensor at a time; no memory is taken for weights before they are checked.

    Args:
        config: its shape.
        stored: its weights.
        dtype: of all parameters.
        device: where they are put.

    Raises DanluError naming the first weight that is missing, of another shape, or not part of the model.
    """
    check(config, stored)
    model = _without_memory(config)
    weights = {name: stored.found[name].read(dtype).to(device) for name in model.state_dict()}
    model.load_state_dict(weights, assign=True)
    return model


def check(config: ModelConfig, stored: Weights) -> None:
    """Compare names and shapes with what the model needs, before anything is read or a single layer is built."""
    needed = set()
    for name, shape in _needed(config, stored):
        needed.add(name)
        found = stored.found.get(name)
        if found is None:
            what = f"{translate(name, stored.names)} of shape {list(shape)} is missing"
            raise DanluError(
                what, where=stored.path, fix="the file is incomplete, or its configuration another model's"
            )
        if found.shape != shape:
            what = f"{found.name} has shape {list(found.shape)}, but the configuration makes it {list(shape)}"
            raise DanluError(what, where=found.file, fix="the weights and the configuration belong to different models")
    for name, found in stored.found.items():
        if name not in needed:
            raise DanluError(
                f"{found.name} is no part of the model its configuration describes",
                where=found.file,
                fix="the weights and the configuration belong to different models",
            )


def _needed(config: ModelConfig, stored: Weights) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight, layer by layer: a damaged number of layers costs neither time nor memory."""
    try:
        one = _without_memory(replace(config, layers=1)).state_dict()
    except (RuntimeError, TypeError, OverflowError):
        raise DanluError("the configuration describes a model of impossible size", where=stored.path) from None
    first = "blocks.0."
    for name, weight in one.items():
        if not name.startswith(first):
            yield name, tuple(weight.shape)
    for layer in range(config.layers):
        for name, weight in one.items():
            if name.startswith(first):
                yield f"blocks.{layer}.{name.removeprefix(first)}", tuple(weight.shape)


def _without_memory(config: ModelConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config)
