"""The feed-forward of a block: gated (arXiv:2002.05202) or plain."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.model.config import Activation, ModelConfig


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), the approximation that CLIP was trained with (arXiv:1606.08415)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "tanh": torch.tanh,
}


class FeedForward(nn.Module):
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))): [..., width] -> [..., width].

    Args:
        config: of the stack.
        inner: inner features; by default the stack's `feedforward_width`.
    """

    def __init__(self, config: ModelConfig, inner: int | None = None) -> None:
        super().__init__()
        width, inner, bias = config.width, inner or config.feedforward_width, config.feedforward_bias
        self.gate = nn.Linear(width, inner, bias=bias) if config.gated else None
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))
