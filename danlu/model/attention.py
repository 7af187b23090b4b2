"""Grouped-query attention (arXiv:2305.13245) with rotary positions, packed documents and a key/value cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.model.config import ModelConfig
from danlu.model.norm import RMSNorm
from danlu.model.position import rotate


class Cache:
    """Keys and values of every layer for a batch whose rows may be of different lengths.

    Attributes:
        keys, values: per layer, [B, length, kv_heads, head_width].
        lengths: int64 [B], the tokens each row holds. `Decoder.forward` adds what it was given; after a prefill of
            right-padded rows set it to the true lengths: what lies past a row's length is never looked at.
    """

    def __init__(self, config: ModelConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (batch, length, config.kv_heads, config.head_width)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.layers)]
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.length = length

    def put(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, T, kv_heads, head_width] at positions [B, T] and return all keys and values of the layer."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        self.keys[layer][rows, positions] = key
        self.values[layer][rows, positions] = value
        return self.keys[layer], self.values[layer]


@dataclass(frozen=True)
class Sight:
    """Which keys each query may see, worked out once per batch and shared by all layers.

    Attributes:
        causal: every query sees all keys up to its own place, and nothing else limits it.
        mask: otherwise, bool [B, 1, T, keys], True where it may look.
    """

    causal: bool
    mask: Tensor | None


def sight(config: ModelConfig, positions: Tensor, segments: Tensor | None, keys: int | None) -> Sight:
    """Build the `Sight` of a batch.

    Args:
        positions: int64 [B, T], places within each document (or within each cached row).
        segments: int32 [B, T], document numbers of packed rows; tokens of different documents never meet.
        keys: with a cache, the number of key places; place j holds position j of its row.
    """
    window = config.sliding_window
    if keys is None:
        length = positions.shape[1]
        if segments is None and (window is None or window >= length):
            return Sight(causal=True, mask=None)
        place = torch.arange(length, device=positions.device)
        mask = place[:, None] >= place[None, :]
        if window is not None:
            mask &= place[:, None] - place[None, :] < window
        mask = mask[None, None]
        if segments is not None:
            mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
        return Sight(causal=False, mask=mask)
    place = torch.arange(keys, device=positions.device)
    mask = place[None, None, :] <= positions[:, :, None]
    if window is not None:
        mask &= place[None, None, :] > positions[:, :, None] - window
    return Sight(causal=False, mask=mask[:, None])


class Attention(nn.Module):
    """Multi-head attention with shared key/value heads: [B, T, width] -> [B, T, width]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_heads, config.head_width
        inner, shared = config.heads * config.head_width, config.kv_heads * config.head_width
        self.query = nn.Linear(config.width, inner, bias=config.attention_bias)
        self.key = nn.Linear(config.width, shared, bias=config.attention_bias)
        self.value = nn.Linear(config.width, shared, bias=config.attention_bias)
        self.output = nn.Linear(inner, config.width, bias=config.output_bias)
        self.query_norm = RMSNorm(config.head_width, config.norm_epsilon) if config.qk_norm else None
        self.key_norm = RMSNorm(config.head_width, config.norm_epsilon) if config.qk_norm else None

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, see: Sight, cache: Cache | None, layer: int, positions: Tensor
    ) -> Tensor:
        batch, length, _ = x.shape
        query = self.query(x).view(batch, length, self.heads, self.head_width)
        key = self.key(x).view(batch, length, self.kv_heads, self.head_width)
        value = self.value(x).view(batch, length, self.kv_heads, self.head_width)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if cache is not None:
            key, value = cache.put(layer, positions, key, value)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=see.mask,
            is_causal=see.causal,
            enable_gqa=self.heads != self.kv_heads,
        )
        return self.output(mixed.transpose(1, 2).reshape(batch, length, -1))
