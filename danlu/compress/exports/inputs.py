"""Inputs of few bits, as engines that read compressed-tensors round them while a model runs."""

from __future__ import annotations

from torch import Tensor, nn

from danlu.compress.quantizing.formats.grid import inverse
from danlu.compress.quantizing.formats.grouped import FLOAT8, Grouped


def round_inputs(blocks: nn.Module, form: Grouped) -> None:
    """From now on every linear layer of these blocks multiplies what its inputs become in few bits."""

    def rounded(_module: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
        return by_token(given[0], form)

    for layer in blocks.modules():
        if type(layer) is nn.Linear:
            layer.register_forward_pre_hook(rounded)


def by_token(x: Tensor, form: Grouped) -> Tensor:
    """Numbers [..., columns] in few bits, each token by its largest: compressed-tensors' "strategy": "token".

    The step is the largest of all sizes over half the range of codes, so that of 8 bits 127.5 stand for it.
    """
    low, high = form.levels[0], form.levels[-1]
    step = x.abs().amax(-1, keepdim=True) / ((high - low) / 2)
    codes = (x * inverse(step)).clamp(low, high)
    return (codes.to(FLOAT8).to(x.dtype) if form.floating else codes.round()) * step
