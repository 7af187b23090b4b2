"""Rotary positions (arXiv:2104.09864): each pair of features turns with the position, at its own frequency."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from danlu.model.config import ModelConfig, RopeScaling


def frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """The angle per position of every feature pair, fp32 [head_width / 2], and the scale on cos and sin."""
    half = torch.arange(0, config.head_width, 2, dtype=torch.int64).float() / config.head_width
    plain = 1.0 / (config.rope_base**half)
    scaling = config.rope_scaling
    if scaling is None:
        return plain, 1.0
    if scaling.kind == "linear":
        return plain / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(plain, scaling), 1.0
    return _yarn(plain, scaling, config)


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    turns = scaling.original_context * plain / (2 * math.pi)
    blend = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
    blend = blend.clamp(0, 1)  # 0: slow, fully stretched; 1: fast, left alone
    return (1 - blend) * plain / scaling.factor + blend * plain


def _yarn(plain: Tensor, scaling: RopeScaling, config: ModelConfig) -> tuple[Tensor, float]:
    def pair_at(turns: float) -> float:
        """The (fractional) pair that makes this many turns over the original context."""
        length = scaling.original_context / (turns * 2 * math.pi)
        return config.head_width * math.log(length) / (2 * math.log(config.rope_base))

    low = max(math.floor(pair_at(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_at(scaling.beta_slow)), config.head_width - 1)
    ramp = (torch.arange(config.head_width // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    stretched = ramp.clamp(0, 1)
    turned = plain / scaling.factor * stretched + plain * (1 - stretched)
    attention = scaling.attention_factor
    if attention is None:
        attention = 0.1 * math.log(scaling.factor) + 1.0
    return turned, attention


def rotation(positions: Tensor, frequency: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle, fp32 [B, T, 1, head_width / 2], for positions int64 [B, T]."""
    angles = positions[..., None].float() * frequency.to(positions.device)
    return (angles.cos() * scale).unsqueeze(-2), (angles.sin() * scale).unsqueeze(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn [B, T, heads, head_width]; feature j is paired with j + head_width / 2, as Hugging Face stores weights."""
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)
