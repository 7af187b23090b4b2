"""Hidden states of a pupil beside its teacher's, layer by layer (arXiv:1909.10351, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from danlu.model.config import ModelConfig

TINY = 1e-6  # under the root of a state's mean square


def projections(config: ModelConfig, width: int) -> nn.ModuleDict:
    """What turns a pupil's state behind each block into one of its teacher's width, without memory."""
    with torch.device("meta"):
        return nn.ModuleDict({str(layer): nn.Linear(config.width, width, bias=False) for layer in range(config.layers)})


def counterparts(layers: int, known: int) -> list[int]:
    """The block of a teacher of `known` blocks that each of a pupil's is compared with: evenly, the last with the last.

    Blocks are counted from 0.
    """
    return [round((layer + 1) * known / layers) - 1 for layer in range(layers)]


def state_difference(model: Any, states: Sequence[Tensor], known: Sequence[Tensor], wanted: Tensor) -> Tensor:
    """The mean square of the difference between two models' states, an fp32 scalar summed over tokens.

    Each state is divided by its root mean square first, as the norms that read it do, so that neither its scale nor the
    few tokens with huge states decide; the mean is one over features and over the pupil's blocks.

    Args:
        model: the pupil, with `projections` where its width is not its teacher's.
        states: [B, T, width] before the first and after each of its blocks.
        known: [B, T, the teacher's width], the same of its teacher.
        wanted: bool [B, T], the tokens that count.
    """
    found = getattr(model, "projections", None)
    total = torch.zeros((), device=wanted.device)
    for layer, other in enumerate(counterparts(len(states) - 1, len(known) - 1)):
        own = normed(states[layer + 1][wanted])
        projected = own if found is None else found[str(layer)](own)
        apart = projected.float() - normed(known[other + 1][wanted]).float()
        total = total + apart.square().mean(-1).sum()
    return total / (len(states) - 1)


def normed(x: Tensor) -> Tensor:
    """States of root mean square 1, in their dtype."""
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + TINY).rsqrt()).to(x.dtype)
