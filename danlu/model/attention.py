"""Attention: multi-head (arXiv:1706.03762), grouped and multi-query (arXiv:2305.13245), of a stack over itself or over
another one's output, with a key/value cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from danlu.model.config import ModelConfig
from danlu.model.norm import RMSNorm
from danlu.model.position import rotate
from danlu.model.ring_attention import ring_attention
from danlu.model.sight import Sight
from danlu.model.tiled_attention import tiled_attention


@dataclass
class LayerCache:
    """Keys and values of one layer.

    Attributes:
        keys, values: [B, length, kv_heads, head_width].
        memory: those of the encoder's output, once they are known.
    """

    keys: Tensor
    values: Tensor
    memory: tuple[Tensor, Tensor] | None = None

    def put(self, positions: Tensor, key: Tensor, value: Tensor, seen: int) -> tuple[Tensor, Tensor]:
        """Store [B, T, kv_heads, head_width] at positions [B, T] and return the first `seen` keys and values."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        self.keys[rows, positions] = key
        self.values[rows, positions] = value
        return self.keys[:, :seen], self.values[:, :seen]


class Cache:
    """Keys and values of every layer for a batch whose rows may be of different lengths.

    Attributes:
        layers: one `LayerCache` a block.
        lengths: int64 [B], the tokens each row holds. A model's `forward` adds what it was given; after a prefill of
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

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, int64 [n], in this order; a row may be taken several times."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
            if layer.memory is not None:
                layer.memory = layer.memory[0][rows], layer.memory[1][rows]
        self.lengths = self.lengths[rows]


class Attention(nn.Module):
    """[B, T, width] -> [B, T, width].

    Args:
        config: of the stack.
        cross: keys and values come from `memory`, another stack's output.
    """

    def __init__(self, config: ModelConfig, cross: bool = False) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_heads, config.head_width
        self.scale, self.dropout = config.score_scale, config.attention_dropout
        inner, shared = config.heads * config.head_width, config.kv_heads * config.head_width
        self.query = nn.Linear(config.width, inner, bias=config.attention_bias)
        self.key = nn.Linear(config.width, shared, bias=config.attention_bias)
        self.value = nn.Linear(config.width, shared, bias=config.attention_bias)
        self.output = nn.Linear(inner, config.width, bias=config.output_bias)
        normed = config.qk_norm and not cross
        self.query_norm, self.key_norm = (
            RMSNorm(config.head_width, config.norm_epsilon, config.norm_plus_one) if normed else None for _ in range(2)
        )

    def forward(self, x: Tensor, see: Sight, cache: LayerCache | None = None, memory: Tensor | None = None) -> Tensor:
        """Args: see: of these queries; cache: filled and looked at; memory: [B, S, width], the keys' stack's output."""
        query = self._heads(self.query(x))
        if memory is not None:
            key, value = self._remembered(memory, cache)
        else:
            key, value = self._heads(self.key(x)), self._heads(self.value(x))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if see.rotation is None:
            query = query * self.scale
        else:
            cos, sin = see.rotation
            # The scores' scale costs nothing in the queries' rotation.
            query, key = rotate(query, cos * self.scale, sin * self.scale), rotate(key, cos, sin)
        if cache is not None and memory is None:
            assert see.mask is not None
            key, value = cache.put(see.positions, key, value, see.mask.shape[-1])
        return self.output(self._mix(query, key, value, see).reshape(*x.shape[:2], -1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_width)

    def _remembered(self, memory: Tensor, cache: LayerCache | None) -> tuple[Tensor, Tensor]:
        """Keys and values of another stack's output, computed once where there is a cache."""
        if cache is None:
            return self._heads(self.key(memory)), self._heads(self.value(memory))
        if cache.memory is None:
            cache.memory = self._heads(self.key(memory)), self._heads(self.value(memory))
        return cache.memory

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, see: Sight) -> Tensor:
        """[B, T, heads, head_width] of scaled queries -> the same shape of mixed values."""
        if see.tiles is not None:
            mixed, _ = tiled_attention(query, key, value, see.tiles, see.window, see.keep, see.bias)
            return mixed
        if see.ring is not None:
            return ring_attention(query, key, value, see.ring)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        grouped = self.heads != self.kv_heads
        if see.blocks is not None:
            flexible = _compiled_flex_attention() if query.is_cuda else cast(Callable[..., Any], flex_attention)
            return flexible(query, key, value, block_mask=see.blocks, scale=1.0, enable_gqa=grouped).transpose(1, 2)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=see.mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=see.causal,
            scale=1.0,
            enable_gqa=grouped,
        ).transpose(1, 2)


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    """FlexAttention is a fused kernel only when compiled."""
    return torch.compile(flex_attention)
