"""Grouped-query attention (arXiv:2305.13245) with rotary positions, packed documents and a key/value cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.model.config import ModelConfig
from danlu.model.norm import RMSNorm
from danlu.model.position import frequencies, rotate, rotation
from danlu.model.tiled_attention import make_tiles, tiled_attention


@dataclass
class LayerCache:
    """Keys and values of one layer, [B, length, kv_heads, head_width]."""

    keys: Tensor
    values: Tensor

    def put(self, positions: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, T, kv_heads, head_width] at positions [B, T] and return all keys and values."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        self.keys[rows, positions] = key
        self.values[rows, positions] = value
        return self.keys, self.values


class Cache:
    """Keys and values of every layer for a batch whose rows may be of different lengths.

    Attributes:
        layers: one `LayerCache` a block.
        lengths: int64 [B], the tokens each row holds. `Decoder.forward` adds what it was given; after a prefill of
            right-padded rows set it to the true lengths: what lies past a row's length is never looked at.
        length: places in each row.
    """

    def __init__(self, config: ModelConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (batch, length, config.kv_heads, config.head_width)
        self.layers = [
            LayerCache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
            for _ in range(config.layers)
        ]
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.length = length


@dataclass(frozen=True)
class Sight:
    """Where the tokens of a batch stand and which keys each may see; worked out once and shared by all layers.

    Attributes:
        positions: int64 [B, T], places within each document (or within each cached row).
        cos, sin: the rotation of each position.
        window: keys a token may look back on, itself included; 0 for no limit.
        tiles: on a CPU without a cache, the work list of `tiled_attention`.
        keep: the probabilities it keeps, a query.
        mask: otherwise, bool [B, 1, T, keys], True where a query may look; None for plain causal.
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor
    window: int
    tiles: Tensor | None
    keep: int
    mask: Tensor | None


def sight(config: ModelConfig, positions: Tensor, segments: Tensor | None, keys: int | None, keep: int) -> Sight:
    """Build the `Sight` of a batch.

    Args:
        positions: int64 [B, T].
        segments: int32 [B, T], document numbers of packed rows; tokens of different documents never meet.
        keys: with a cache, the number of its places; place j holds position j of its row.
        keep: see `Decoder`.
    """
    cos, sin = rotation(positions, *frequencies(config))
    window = config.sliding_window or 0
    tiles = mask = None
    if keys is not None:
        place = torch.arange(keys, device=positions.device)
        mask = place <= positions[:, :, None]
        if window:
            mask &= place > positions[:, :, None] - window
        mask = mask[:, None]
    elif positions.device.type == "cpu":
        tiles = make_tiles(positions.shape[0], positions.shape[1], segments, config.sliding_window)
        torch._dynamo.mark_dynamic(tiles, 0)  # every packing has its own number of tiles: compile once for all
    elif segments is not None or window:
        mask = _mask(positions, segments, window)
    return Sight(positions, cos, sin, window, tiles, keep, mask)


def _mask(positions: Tensor, segments: Tensor | None, window: int) -> Tensor:
    place = torch.arange(positions.shape[1], device=positions.device)
    distance = place[:, None] - place[None, :]
    mask = (distance >= 0)[None, None]
    if window:
        mask = mask & (distance < window)
    if segments is not None:
        mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
    return mask


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

    def forward(self, x: Tensor, see: Sight, cache: LayerCache | None) -> Tensor:
        batch, length, _ = x.shape
        query = self.query(x).view(batch, length, self.heads, self.head_width)
        key = self.key(x).view(batch, length, self.kv_heads, self.head_width)
        value = self.value(x).view(batch, length, self.kv_heads, self.head_width)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        scale = self.head_width**-0.5  # of the scores; put into the queries' rotation, where it costs nothing
        query, key = rotate(query, see.cos * scale, see.sin * scale), rotate(key, see.cos, see.sin)
        if cache is not None:
            key, value = cache.put(see.positions, key, value)
        return self.output(self._mix(query, key, value, see).reshape(batch, length, -1))

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, see: Sight) -> Tensor:
        """[B, T, heads, head_width] of scaled queries -> the same shape of mixed values."""
        if see.tiles is not None:
            mixed, _ = tiled_attention(query, key, value, see.tiles, see.window, see.keep)
            return mixed
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=see.mask,
            is_causal=see.mask is None,
            scale=1.0,
            enable_gqa=self.heads != self.kv_heads,
        )
        return mixed.transpose(1, 2)
