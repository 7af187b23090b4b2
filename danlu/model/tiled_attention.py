"""Exact causal attention for CPUs, tile by tile, as plain matrix products.

On a CPU the library's fused attention runs at a fifth of the matrix-product rate; the same work written as batched
products of one tile of queries with the keys it may see runs at nearly the full rate, and skips what the causal
mask, document borders and padding hide. Probabilities are computed again in the backward pass, as in
FlashAttention (arXiv:2205.14135), so memory stays linear in the length.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

QUERIES = 64  # queries a tile: small enough to skip the hidden half, large enough to feed the matrix units


def make_tiles(batch: int, length: int, segments: Tensor | None, window: int | None) -> Tensor:
    """Cut a batch into tiles: int64 [n, 5] of (first row, end row, first query, end query, first key).

    The queries of a tile see keys from the first key up to their own place (and no further back than `window`).
    Padding (segment 0) is in no tile. Rows without `segments` are cut alike and share tiles.
    """
    if segments is None:
        spans = [(0, batch, 0, length)]
    else:
        spans = [
            (row, row + 1, first, end)
            for row, numbers in enumerate(segments.cpu().numpy())
            for first, end in _runs(numbers)
        ]
    tiles = []
    for row, row_end, first, end in spans:
        for query in range(first, end, QUERIES):
            key = first if window is None else max(first, query - window + 1)
            tiles.append((row, row_end, query, min(query + QUERIES, end), key))
    # Two empty tiles keep the number of tiles from being 0 or 1, which torch.compile would treat as special.
    return torch.tensor([*tiles, (0, 0, 0, 0, 0), (0, 0, 0, 0, 0)], dtype=torch.int64)


def _runs(numbers: np.ndarray) -> list[tuple[int, int]]:
    """The stretches of equal, non-zero numbers, as (first, end)."""
    borders = np.flatnonzero(np.diff(numbers)) + 1
    edges = [0, *borders.tolist(), len(numbers)]
    return [(first, end) for first, end in pairwise(edges) if numbers[first] != 0]


@torch.library.custom_op("danlu::tiled_attention", mutates_args=())
def tiled_attention(query: Tensor, key: Tensor, value: Tensor, tiles: Tensor, window: int) -> Tensor:
    """Attention of [B, T, heads, head_width] queries over [B, T, kv_heads, head_width] keys and values.

    Queries come scaled, so a score is a plain product with a key. `tiles` come from `make_tiles` with the same window
    (0 for none). Returns [B, T, heads, head_width]; places in no tile are zero. An opaque operator, so that
    torch.compile neither unrolls the tiles nor recompiles for them.
    """
    grouped, keys, values = _by_head(query, key.shape[2]), _by_head(key, None), _by_head(value, None)
    mixed = torch.zeros_like(grouped)
    for tile in tiles.tolist():
        rows, here, there = _slices(tile)
        if rows.start == rows.stop:
            continue
        probability = _probability(grouped[rows, :, :, here], keys[rows, :, there], tile, window)
        seen = values[rows, :, there].flatten(0, 1)
        mixed[rows, :, :, here] = torch.bmm(probability, seen).view(mixed[rows, :, :, here].shape)
    return _by_place(mixed)


@tiled_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, tiles: Tensor, window: int) -> Tensor:
    return torch.empty_like(query)


@torch.library.custom_op("danlu::tiled_attention_backward", mutates_args=())
def tiled_attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, tiles: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `tiled_attention` for query, key and value; sums over tiles are kept in fp32."""
    grouped, keys, values = _by_head(query, key.shape[2]), _by_head(key, None), _by_head(value, None)
    upstream = _by_head(gradient, key.shape[2])
    to_query = torch.zeros_like(grouped)
    to_key = torch.zeros(keys.shape, dtype=torch.float32)
    to_value = torch.zeros(values.shape, dtype=torch.float32)
    for tile in tiles.tolist():
        rows, here, there = _slices(tile)
        if rows.start == rows.stop:
            continue
        seen_keys, seen_values = keys[rows, :, there], values[rows, :, there]
        probability = _probability(grouped[rows, :, :, here], seen_keys, tile, window)
        above = upstream[rows, :, :, here].flatten(0, 1).flatten(1, 2)
        below = grouped[rows, :, :, here].flatten(0, 1).flatten(1, 2)
        to_value[rows, :, there] += torch.bmm(probability.transpose(1, 2), above).view(seen_values.shape)
        to_probability = torch.bmm(above, seen_values.flatten(0, 1).transpose(1, 2))
        to_score = torch._softmax_backward_data(to_probability, probability, -1, probability.dtype)
        to_query[rows, :, :, here] = torch.bmm(to_score, seen_keys.flatten(0, 1)).view(to_query[rows, :, :, here].shape)
        to_key[rows, :, there] += torch.bmm(to_score.transpose(1, 2), below).view(seen_keys.shape)
    return _by_place(to_query), _by_place(to_key.to(key.dtype)), _by_place(to_value.to(key.dtype))


@tiled_attention_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, tiles: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    query, key, value, tiles, window = inputs
    ctx.save_for_backward(query, key, value, tiles)
    ctx.window = window  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, tiles = ctx.saved_tensors  # type: ignore[attr-defined]
    window = ctx.window  # type: ignore[attr-defined]
    return *tiled_attention_backward(gradient, query, key, value, tiles, window), None, None


tiled_attention.register_autograd(_backward, setup_context=_save)


def _by_head(x: Tensor, kv_heads: int | None) -> Tensor:
    """[B, T, heads, width] -> contiguous [B, heads, T, width], or [B, kv_heads, group, T, width] for queries."""
    moved = x.transpose(1, 2).contiguous()
    return moved if kv_heads is None else moved.unflatten(1, (kv_heads, -1))


def _by_place(x: Tensor) -> Tensor:
    """The way back from `_by_head`."""
    if x.dim() == 5:
        x = x.flatten(1, 2)
    return x.transpose(1, 2).contiguous()


def _slices(tile: list[int]) -> tuple[slice, slice, slice]:
    row, row_end, query, query_end, key = tile
    return slice(row, row_end), slice(query, query_end), slice(key, query_end)


def _probability(query: Tensor, key: Tensor, tile: list[int], window: int) -> Tensor:
    """softmax(query key^T) of one tile: [rows x kv_heads, group x queries, keys]."""
    rows, heads, group, queries, width = query.shape
    count = key.shape[2]
    left, right = query.reshape(rows * heads, group * queries, width), key.flatten(0, 1).transpose(1, 2)
    score = torch.bmm(left, right)
    square = score.view(rows * heads, group, queries, count)
    # Only the last `queries` keys can lie ahead of a query; only the first can lie behind its window.
    hidden = torch.ones(queries, queries, dtype=torch.bool).triu(1)
    square[..., count - queries :].masked_fill_(hidden, float("-inf"))
    if window:
        _, _, first_query, end_query, first_key = tile
        distance = torch.arange(first_query, end_query)[:, None] - torch.arange(first_key, end_query)[None, :]
        square.masked_fill_(distance >= window, float("-inf"))
    return torch.softmax(score, -1)
