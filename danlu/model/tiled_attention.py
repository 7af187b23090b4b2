"""Exact attention for CPUs, tile by tile, as plain matrix products.

On a CPU the library's fused attention runs at a fifth of the matrix-product rate; the same work written as batched
products of one tile of queries with the keys it may see runs at nearly the full rate, and skips what the causal
mask, document borders and padding hide. Probabilities are computed again in the backward pass, as in
FlashAttention (arXiv:2205.14135), unless asked to keep some; memory stays linear in the length either way.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

QUERIES = 128  # queries a tile: fewer skip more of the hidden half, more feed the matrix units better


class Tile(NamedTuple):
    """Queries of neighbouring rows and the keys that they may see: all, or if `causal` those up to their own place."""

    row: int
    row_end: int
    query: int
    query_end: int
    key: int
    key_end: int
    causal: int

    def here(self, x: Tensor) -> Tensor:
        """The places of the queries in x, [B, T, heads, width]."""
        return x[self.row : self.row_end, self.query : self.query_end]

    def there(self, x: Tensor) -> Tensor:
        """The places of the keys in x, [B, T, kv_heads, width]."""
        return x[self.row : self.row_end, self.key : self.key_end]

    def square(self, x: Tensor) -> Tensor:
        """The places of the pairs in x, [heads, T, T]."""
        return x[:, self.query : self.query_end, self.key : self.key_end]

    def pairs(self) -> int:
        """Pairs of a query and a key, for one head."""
        return (self.row_end - self.row) * (self.query_end - self.query) * (self.key_end - self.key)


def make_tiles(
    batch: int,
    length: int,
    segments: Tensor | None,
    *,
    causal: bool = True,
    window: int | None = None,
    prefix: Tensor | None = None,
) -> Tensor:
    """Cut a batch into tiles: int64 [n, 7], a `Tile` a line.

    The queries of a tile see the keys of its document: all of them, or if `causal` those up to their own place and no
    further back than `window`, and the document's first `prefix` in any case. Padding (segment 0) is in no tile.
    Neighbouring rows whose documents lie alike share tiles: larger products.

    Args:
        batch, length: the size of the batch.
        segments: int32 [B, T], the document of each place; None for one a row.
        causal, window: see above.
        prefix: int64 [B], how many places at the start of each document see each other whatever comes first.
    """
    rows = [[(0, length)]] * batch if segments is None else [_runs(numbers) for numbers in segments.cpu().numpy()]
    heads = [0] * batch if prefix is None else prefix.tolist()
    tiles: list[Tile] = []
    row = 0
    for (spans, head), alike in groupby(zip(rows, heads, strict=True)):
        row_end = row + len(list(alike))
        for first, end in spans:
            known = min(first + head, end) if causal else end
            for query in range(first, known, QUERIES):
                tiles.append(Tile(row, row_end, query, min(query + QUERIES, known), first, known, 0))
            for query in range(known, end, QUERIES):
                key = first if window is None else max(first, query - window + 1)
                last = min(query + QUERIES, end)
                tiles.append(Tile(row, row_end, query, last, key, last, 1))
        row = row_end
    # Two empty tiles keep the number of tiles from being 0 or 1, which torch.compile would treat as special.
    return torch.tensor([*tiles, [0] * 7, [0] * 7], dtype=torch.int64)


def _runs(numbers: np.ndarray) -> list[tuple[int, int]]:
    """The stretches of equal, non-zero numbers, as (first, end)."""
    borders = np.flatnonzero(np.diff(numbers)) + 1
    edges = [0, *borders.tolist(), len(numbers)]
    return [(first, end) for first, end in pairwise(edges) if numbers[first] != 0]


@torch.library.custom_op("danlu::tiled_attention", mutates_args=())
def tiled_attention(
    query: Tensor, key: Tensor, value: Tensor, tiles: Tensor, window: int, keep: int, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of [B, T, heads, head_width] queries over [B, T, kv_heads, head_width] keys and values.

    An opaque operator, so that torch.compile neither unrolls the tiles nor compiles again for others.

    Args:
        query: scaled, so that a score is a plain product with a key.
        tiles: from `make_tiles`, with the same window.
        window: keys a query may look back on, itself included; 0 for no limit.
        keep: how many probabilities to keep for the backward pass, on average a query and head, instead of computing
            them again. It buys a fifth of the time for `keep` numbers a token and head.
        bias: [heads, T, T], added to the scores of every row; None for none.

    Returns: [B, T, heads, head_width], zero at places in no tile; and the kept probabilities, in one line.
    """
    kv_heads = key.shape[2]
    mixed = torch.zeros_like(query)
    kept = query.new_empty(_kept_size(query, keep))
    for tile, room in _with_room(tiles, kept, query.shape[2]):
        queries, keys, values = (_matrices(x, kv_heads) for x in (tile.here(query), tile.there(key), tile.there(value)))
        probability = _probability(queries, keys, tile, window, bias, room)
        _put(tile.here(mixed), probability @ values, kv_heads)
    return mixed, kept


@tiled_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, tiles: Tensor, window: int, keep: int, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(_kept_size(query, keep))


@torch.library.custom_op("danlu::tiled_attention_backward", mutates_args=())
def tiled_attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiles: Tensor,
    kept: Tensor,
    window: int,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `tiled_attention` for query, key, value and bias; sums over tiles and rows are made in fp32.

    Without a bias its gradient is empty.
    """
    kv_heads = key.shape[2]
    to_bias = query.new_zeros(0 if bias is None else bias.shape, dtype=torch.float32)
    to_query = torch.zeros_like(query)
    to_key, to_value = torch.zeros_like(key, dtype=torch.float32), torch.zeros_like(value, dtype=torch.float32)
    for tile, room in _with_room(tiles, kept, query.shape[2]):
        queries, upstream = (_matrices(tile.here(x), kv_heads) for x in (query, gradient))
        keys, values = (_matrices(tile.there(x), kv_heads) for x in (key, value))
        if room is None:
            probability = _probability(queries, keys, tile, window, bias, None)
        else:
            probability = room.view(len(queries), queries.shape[1], keys.shape[1])
        to_probability = upstream @ values.mT
        to_score = torch._softmax_backward_data(to_probability, probability, -1, probability.dtype)
        if bias is not None:
            tile.square(to_bias).add_(_apart(to_score, tile, kv_heads).sum(0, dtype=torch.float32).flatten(0, 1))
        _put(tile.here(to_query), to_score @ keys, kv_heads)
        _add(tile.there(to_key), to_score.mT @ queries, kv_heads)
        _add(tile.there(to_value), probability.mT @ upstream, kv_heads)
    return to_query, to_key.to(key.dtype), to_value.to(value.dtype), to_bias.to(query.dtype)


@tiled_attention_backward.register_fake
def _(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiles: Tensor,
    kept: Tensor,
    window: int,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    to_bias = query.new_empty(0 if bias is None else bias.shape)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), to_bias


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, tiles, window, _, bias = inputs
    _, kept = output
    ctx.save_for_backward(query, key, value, tiles, kept, bias)
    ctx.mark_non_differentiable(kept)
    ctx.window = window


def _backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
    query, key, value, tiles, kept, bias = ctx.saved_tensors
    *gradients, to_bias = tiled_attention_backward(gradient, query, key, value, tiles, kept, ctx.window, bias)
    return *gradients, None, None, None, None if bias is None else to_bias


tiled_attention.register_autograd(_backward, setup_context=_save)


def _kept_size(query: Tensor, keep: int) -> int:
    batch, length, heads, _ = query.shape
    return batch * length * heads * min(length, keep)


def _with_room(tiles: Tensor, kept: Tensor, heads: int) -> Iterator[tuple[Tile, Tensor | None]]:
    """Each tile, with its part of `kept` while there is room for all its probabilities."""
    used = 0
    for tile in map(Tile._make, tiles.tolist()):
        end = used + heads * tile.pairs()
        if used < end <= len(kept):
            yield tile, kept[used:end]
            used = end
        elif used < end:
            yield tile, None


def _by_head(x: Tensor, kv_heads: int) -> Tensor:
    """[rows, places, heads, width] seen as [rows, kv_heads, places, group, width]; a group shares its keys."""
    rows, places, heads, width = x.shape
    return x.view(rows, places, kv_heads, heads // kv_heads, width).transpose(1, 2)


def _matrices(x: Tensor, kv_heads: int) -> Tensor:
    """[rows, places, heads, width] -> contiguous [rows x kv_heads, places x group, width]."""
    return _by_head(x, kv_heads).reshape(len(x) * kv_heads, -1, x.shape[-1])


def _put(x: Tensor, matrices: Tensor, kv_heads: int) -> None:
    """Write what has the form of `_matrices(x)` to x."""
    place = _by_head(x, kv_heads)
    place.copy_(matrices.view(place.shape))


def _add(x: Tensor, matrices: Tensor, kv_heads: int) -> None:
    """Add what has the form of `_matrices(x)` to x."""
    place = _by_head(x, kv_heads)
    place.add_(matrices.view(place.shape))


def _apart(score: Tensor, tile: Tile, kv_heads: int) -> Tensor:
    """Scores [rows x kv_heads, queries x group, keys] seen as [rows, kv_heads, group, queries, keys]."""
    rows, places = tile.row_end - tile.row, tile.query_end - tile.query
    return score.view(rows, kv_heads, places, -1, score.shape[-1]).transpose(2, 3)


def _probability(
    queries: Tensor, keys: Tensor, tile: Tile, window: int, bias: Tensor | None, room: Tensor | None
) -> Tensor:
    """softmax(query key^T) of one tile, [rows x kv_heads, queries x group, keys], in `room` if there is some."""
    count = tile.query_end - tile.query
    group = queries.shape[1] // count
    score = queries @ keys.mT
    if bias is not None:
        kv_heads = len(queries) // (tile.row_end - tile.row)
        _apart(score, tile, kv_heads).add_(tile.square(bias).unflatten(0, (kv_heads, -1)))
    if tile.causal:
        # Only the last `count` keys can lie ahead of a query; only the first can lie behind its window.
        score[..., -count:].add_(_ahead(count, group, score.dtype))
    if tile.causal and window:
        distance = torch.arange(tile.query, tile.query_end)[:, None] - torch.arange(tile.key, tile.key_end)
        score.masked_fill_((distance >= window).repeat_interleave(group, 0), float("-inf"))
    return torch.softmax(score, -1, out=None if room is None else room.view(score.shape))


@cache
def _ahead(count: int, group: int, dtype: torch.dtype) -> Tensor:
    """-inf where one of `count` keys lies ahead of one of as many queries, else 0: [count x group, count]."""
    hidden = torch.full((count, count), float("-inf")).triu(1)
    return hidden.repeat_interleave(group, 0).to(dtype)
