"""Exact causal attention for CPUs, tile by tile, as plain matrix products.

On a CPU the library's fused attention runs at a fifth of the matrix-product rate; the same work written as batched
products of one tile of queries with the keys it may see runs at nearly the full rate, and skips what the causal
mask, document borders and padding hide. Probabilities are computed again in the backward pass, as in
FlashAttention (arXiv:2205.14135), so memory stays linear in the length.
"""

from __future__ import annotations

from functools import cache
from itertools import groupby, pairwise

import numpy as np
import torch
from torch import Tensor

QUERIES = 64  # queries a tile: small enough to skip the hidden half, large enough to feed the matrix units


def make_tiles(batch: int, length: int, segments: Tensor | None, window: int | None) -> Tensor:
    """Cut a batch into tiles: int64 [n, 5] of (first row, end row, first query, end query, first key).

    The queries of a tile see keys from the first key up to their own place (and no further back than `window`).
    Padding (segment 0) is in no tile. Neighbouring rows whose documents lie alike share tiles: larger products.
    """
    rows = [[(0, length)]] * batch if segments is None else [_runs(numbers) for numbers in segments.cpu().numpy()]
    tiles = []
    row = 0
    for spans, alike in groupby(rows):
        row_end = row + len(list(alike))
        for first, end in spans:
            for query in range(first, end, QUERIES):
                key = first if window is None else max(first, query - window + 1)
                tiles.append((row, row_end, query, min(query + QUERIES, end), key))
        row = row_end
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
    kv_heads = key.shape[2]
    queries, keys, values = (_by_head(x, kv_heads) for x in (query, key, value))
    mixed = torch.zeros_like(queries)
    for tile in tiles.tolist():
        rows, here, there = _slices(tile, kv_heads, query.shape[2] // kv_heads)
        if rows.start == rows.stop:
            continue
        probability = _probability(queries[rows, here], keys[rows, there], tile, window)
        torch.bmm(probability, values[rows, there], out=mixed[rows, here])
    return _by_place(mixed, query.shape)


@tiled_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, tiles: Tensor, window: int) -> Tensor:
    return _like(query)


@torch.library.custom_op("danlu::tiled_attention_backward", mutates_args=())
def tiled_attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, tiles: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `tiled_attention` for query, key and value; sums over tiles are kept in fp32."""
    kv_heads = key.shape[2]
    queries, keys, values, upstream = (_by_head(x, kv_heads) for x in (query, key, value, gradient))
    to_query = torch.zeros_like(queries)
    to_key = torch.zeros(keys.shape, dtype=torch.float32)
    to_value = torch.zeros(values.shape, dtype=torch.float32)
    for tile in tiles.tolist():
        rows, here, there = _slices(tile, kv_heads, query.shape[2] // kv_heads)
        if rows.start == rows.stop:
            continue
        probability = _probability(queries[rows, here], keys[rows, there], tile, window)
        to_value[rows, there] += torch.bmm(probability.transpose(1, 2), upstream[rows, here])
        to_probability = torch.bmm(upstream[rows, here], values[rows, there].transpose(1, 2))
        to_score = torch._softmax_backward_data(to_probability, probability, -1, probability.dtype)
        torch.bmm(to_score, keys[rows, there], out=to_query[rows, here])
        to_key[rows, there] += torch.bmm(to_score.transpose(1, 2), queries[rows, here])
    return (
        _by_place(to_query, query.shape),
        _by_place(to_key.to(key.dtype), key.shape),
        _by_place(to_value.to(value.dtype), value.shape),
    )


@tiled_attention_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, tiles: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(query), _like(key), _like(value)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    query, key, value, tiles, window = inputs
    ctx.save_for_backward(query, key, value, tiles)
    ctx.window = window  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, tiles = ctx.saved_tensors  # type: ignore[attr-defined]
    window = ctx.window  # type: ignore[attr-defined]
    return *tiled_attention_backward(gradient, query, key, value, tiles, window), None, None


tiled_attention.register_autograd(_backward, setup_context=_save)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _by_head(x: Tensor, kv_heads: int) -> Tensor:
    """[B, T, heads, width] -> contiguous [B x kv_heads, T x group, width].

    The heads that share a key head (a group, one for keys and values themselves) stand together at each place, so
    the queries of a tile are one slice and one matrix.
    """
    batch, length, heads, width = x.shape
    grouped = x.view(batch, length, kv_heads, heads // kv_heads, width).transpose(1, 2)
    return grouped.reshape(batch * kv_heads, -1, width).contiguous()


def _by_place(x: Tensor, shape: torch.Size) -> Tensor:
    """The way back from `_by_head`, to [B, T, heads, width]."""
    batch, length, heads, width = shape
    kv_heads = len(x) // batch
    return x.view(batch, kv_heads, length, heads // kv_heads, width).transpose(1, 2).reshape(shape).contiguous()


def _slices(tile: list[int], kv_heads: int, group: int) -> tuple[slice, slice, slice]:
    """Where a tile's rows, queries and keys lie in what `_by_head` returns."""
    row, row_end, query, query_end, key = tile
    return slice(row * kv_heads, row_end * kv_heads), slice(query * group, query_end * group), slice(key, query_end)


def _probability(queries: Tensor, keys: Tensor, tile: list[int], window: int) -> Tensor:
    """softmax(query key^T) of one tile, [rows x kv_heads, queries x group, keys]."""
    _, _, first_query, end_query, first_key = tile
    count = end_query - first_query
    group = queries.shape[1] // count
    score = torch.bmm(queries, keys.transpose(1, 2))
    # Only the last `count` keys can lie ahead of a query; only the first can lie behind its window.
    score[..., -count:].add_(_ahead(count, group, score.dtype))
    if window:
        distance = torch.arange(first_query, end_query)[:, None] - torch.arange(first_key, end_query)[None, :]
        score.masked_fill_((distance >= window).repeat_interleave(group, 0), float("-inf"))
    return torch.softmax(score, -1)


@cache
def _ahead(count: int, group: int, dtype: torch.dtype) -> Tensor:
    """-inf where one of `count` keys lies ahead of one of as many queries, else 0: [count x group, count]."""
    hidden = torch.full((count, count), float("-inf")).triu(1)
    return hidden.repeat_interleave(group, 0).to(dtype)
