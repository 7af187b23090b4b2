"""Weights on disk, whatever the format, and the one way they become a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from danlu.errors import DanluError
from danlu.model.config import AnyConfig, EncoderDecoderConfig, ModelConfig
from danlu.model.names import Names
from danlu.model.transformer import Model, make_model

Make = Callable[[], Tensor]  # draws or reads a weight as a whole, on the CPU, in memory of its own


@dataclass(frozen=True)
class Stored:
    """One weight on disk.

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
        names: our weights' names and the format's.
        found: our name of each weight -> where it lies.
    """

    path: Path
    names: Names
    found: Mapping[str, Stored]


def build(config: AnyConfig, stored: Weights, dtype: torch.dtype, device: torch.device | str) -> Model:
    """A model filled from disk, one tensor at a time; no memory is taken for weights before they are checked.

    Args:
        config: its shape.
        stored: its weights.
        dtype: of all parameters.
        device: where they are put.

    Raises DanluError naming the first weight that is missing, of another shape, or not part of the model.
    """
    check(config, stored)
    model = without_memory(config)
    weights = {name: stored.found[name].read(dtype).to(device) for name in model.state_dict()}
    model.load_state_dict(weights, assign=True)
    return model.eval()  # nothing drops out until someone trains it


def check(config: AnyConfig, stored: Weights) -> None:
    """Compare names and shapes with what the model needs, before anything is read."""
    needed = _needed(config, stored)
    for name, shape in needed.items():
        found = stored.found.get(name)
        if found is None:
            what = f"{stored.names.theirs(name) or name} of shape {list(shape)} is missing"
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


def _needed(config: AnyConfig, stored: Weights) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight. A damaged number of layers costs neither time nor memory."""
    layers = sum(stack.layers for stack in stacks(config))
    if layers > len(stored.found):
        what = f"{layers:,} layers are configured, but there are only {len(stored.found):,} weights: some are missing"
        raise DanluError(what, where=stored.path, fix="the file is incomplete, or its configuration another model's")
    try:
        return {name: tuple(weight.shape) for name, weight in without_memory(config).state_dict().items()}
    except (RuntimeError, TypeError, OverflowError):
        raise DanluError("the configuration describes a model of impossible size", where=stored.path) from None


def stacks(config: AnyConfig) -> tuple[ModelConfig, ...]:
    """The stacks of a model."""
    if isinstance(config, ModelConfig):
        return (config,)
    if isinstance(config, EncoderDecoderConfig):
        return config.encoder, config.decoder
    return config.text, config.image


def without_memory(config: AnyConfig) -> Model:
    """A model on the meta device: names, shapes and modules, and no weights."""
    with torch.device("meta"):
        return make_model(config)
