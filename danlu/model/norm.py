"""Normalisation of the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from danlu.model.config import ModelConfig


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (arXiv:1910.07467), computed in fp32 whatever the input's dtype.

    Args:
        width: features.
        epsilon: added to the mean square.
        plus_one: the weight is what is added to 1, and multiplied before the result is rounded (Gemma).
    """

    def __init__(self, width: int, epsilon: float, plus_one: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if plus_one else torch.ones(width))
        self.epsilon = epsilon
        self.plus_one = plus_one

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same shape and dtype."""
        wide = x.float()
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        if self.plus_one:
            return (normal * (1 + self.weight.float())).to(x.dtype)
        return normal.to(x.dtype) * self.weight


class BatchNorm(nn.BatchNorm1d):
    """Normalisation of each feature over all tokens of a batch (arXiv:1502.03167)."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same shape and dtype."""
        return super().forward(x.flatten(0, -2)).view(x.shape)


def make_norm(config: ModelConfig, width: int | None = None) -> nn.Module:
    """The norm that a configuration asks for, over `width` features (by default the stream's)."""
    width = width or config.width
    if config.norm == "rms":
        return RMSNorm(width, config.norm_epsilon, config.norm_plus_one)
    if config.norm == "layer":
        return nn.LayerNorm(width, config.norm_epsilon)
    return BatchNorm(width, config.norm_epsilon)
