"""Who sees whom: worked out once for a batch and shared by all layers that see alike."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from danlu.errors import DanluError
from danlu.model.config import ModelConfig, Rotary
from danlu.model.position import RelativeBias, rotation
from danlu.model.ring_attention import Ring, RingSight, ring_sight
from danlu.model.tiled_attention import make_tiles


@dataclass(frozen=True)
class Sight:
    """Where the queries of a batch stand and which keys each may see.

    One of `tiles`, `blocks`, `ring`, `mask` and `causal` says who is seen; none of them means everyone.

    Attributes:
        positions: int64 [B, T], places within each document (or within each cached row).
        rotation: cos and sin of each position, None where positions do not turn features.
        window: keys a token may look back on, itself included; 0 for no limit.
        tiles: the work list of `tiled_attention`.
        keep: the probabilities it keeps, a query.
        bias: what it adds to the scores, [heads, T, T], or None.
        blocks: the block mask of FlexAttention.
        ring: how rows that are cut over processes see each other.
        mask: bool [B, 1, T, keys], True where a query may look, or what is added to the scores, [B, heads, T, keys].
        causal: each query sees the keys up to its own place.
    """

    positions: Tensor
    rotation: tuple[Tensor, Tensor] | None = None
    window: int = 0
    tiles: Tensor | None = None
    keep: int = 0
    bias: Tensor | None = None
    blocks: Any = None
    ring: RingSight | None = None
    mask: Tensor | None = None
    causal: bool = False


@dataclass(frozen=True)
class Batch:
    """What decides who sees whom.

    Attributes:
        positions: int64 [B, T]; with two axes [B, T, 2].
        segments: int32 [B, T], the document of each place, 0 for padding; None for one a row.
        prefix: int64 [B], how many places at the start of each document of a row see each other whatever comes first.
        keys: with a cache, how many of its places are looked at; place j holds position j of its row.
        keep: see `Sight`.
        masked: everything by one mask, for what the faster ways cannot do: attention dropout.
        ring: the processes that the rows are cut over; None where they are whole.
    """

    positions: Tensor
    segments: Tensor | None = None
    prefix: Tensor | None = None
    keys: int | None = None
    keep: int = 0
    masked: bool = False
    ring: Ring | None = None

    def halves(self) -> tuple[Batch, Batch]:
        """The rows as `torch.chunk` cuts them in two."""
        middle = -(-len(self.positions) // 2)

        def rows(here: slice) -> Batch:
            segments = None if self.segments is None else self.segments[here]
            prefix = None if self.prefix is None else self.prefix[here]
            return replace(self, positions=self.positions[here], segments=segments, prefix=prefix)

        return rows(slice(middle)), rows(slice(middle, None))


def self_sight(config: ModelConfig, layer: int, batch: Batch, bias: RelativeBias | None) -> Sight:
    """How a stack's own places see each other in one layer.

    Raises DanluError for a prefix within a sliding window.
    """
    window = config.window(layer)
    if batch.prefix is not None and window is not None:
        raise DanluError("a prefix that all see and a sliding window cannot be had together", where="attention")
    rotary = config.layer_positions(layer)
    turned = rotation(rotary, config.head_width, batch.positions) if isinstance(rotary, Rotary) else None
    places = batch.positions[..., 0] if batch.positions.dim() == 3 else batch.positions
    seen = Sight(places, turned, window or 0, keep=batch.keep)
    if batch.keys is not None:
        return _cached(seen, batch.keys, bias)
    if batch.ring is not None:
        segments = torch.ones_like(places, dtype=torch.int32) if batch.segments is None else batch.segments
        return _with(seen, ring=ring_sight(batch.ring, segments, config.causal, window or 0))
    if batch.masked or (bias is not None and places.device.type != "cpu"):
        return _biased(config, seen, batch, bias)
    if places.device.type == "cpu":
        rows, length = places.shape
        tiles = make_tiles(rows, length, batch.segments, causal=config.causal, window=window, prefix=batch.prefix)
        torch._dynamo.mark_dynamic(tiles, 0)  # every packing has its own number of tiles: compile once for all
        return _with(seen, tiles=tiles, bias=None if bias is None else bias.square(length))
    if batch.segments is None and batch.prefix is None and window is None:
        return _with(seen, causal=config.causal)
    return _with(seen, blocks=_blocks(config.causal, seen, batch))


def cross_sight(queries: Tensor, segments: Tensor | None, memory_segments: Tensor | None) -> Sight:
    """How a decoder's places see an encoder's.

    Args:
        queries: int64 [B, T], the decoder's positions.
        segments: int32 [B, T], the documents of packed rows; None where a row is one.
        memory_segments: int32 [B, S], the encoder's; 0 for padding; None where everything is seen.
    """
    if memory_segments is None:
        return Sight(queries)
    if segments is None:
        return Sight(queries, mask=(memory_segments != 0)[:, None, None])
    alike = segments[:, None, :, None] == memory_segments[:, None, None, :]
    return Sight(queries, mask=alike & (memory_segments != 0)[:, None, None])


def visible(causal: bool, window: int, batch: Batch) -> Tensor:
    """bool [B or 1, 1, T, T], True where a query may see a key: the definition that the faster ways are tested with."""
    place = torch.arange(batch.positions.shape[1], device=batch.positions.device)
    distance = (place[:, None] - place[None, :])[None, None]
    mask = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window:
        mask = mask & (distance < window)
    if batch.prefix is not None:
        known = batch.positions < batch.prefix[:, None]
        mask = mask | (known[:, None, :, None] & known[:, None, None, :])
    if batch.segments is not None:
        alike = batch.segments[:, None, :, None] == batch.segments[:, None, None, :]
        mask = mask & alike & (batch.segments != 0)[:, None, None]
    return mask


def _with(seen: Sight, **changes: Any) -> Sight:
    return Sight(seen.positions, seen.rotation, seen.window, keep=seen.keep, **changes)


def _cached(seen: Sight, keys: int, bias: RelativeBias | None) -> Sight:
    place = torch.arange(keys, device=seen.positions.device)
    mask = place <= seen.positions[:, :, None]
    if seen.window:
        mask &= place > seen.positions[:, :, None] - seen.window
    mask = mask[:, None]
    if bias is not None:
        mask = _added(bias(seen.positions, place.expand(len(seen.positions), -1)), mask)
    return _with(seen, mask=mask)


def _biased(config: ModelConfig, seen: Sight, batch: Batch, bias: RelativeBias | None) -> Sight:
    mask = visible(config.causal, seen.window, batch)
    if batch.segments is not None:
        # A query that may see nothing is padding; it sees everything instead: a softmax over nothing is no number.
        mask = mask | ~mask.any(-1, keepdim=True)
    if bias is None:
        return _with(seen, mask=mask)
    added = bias.square(seen.positions.shape[1])[None]
    alike = batch.segments is None and batch.prefix is None and not config.causal and not seen.window
    return _with(seen, mask=added if alike else _added(added, mask))


def _added(bias: Tensor, mask: Tensor) -> Tensor:
    return bias.masked_fill(~mask, torch.finfo(bias.dtype).min)


def _blocks(causal: bool, seen: Sight, batch: Batch) -> Any:
    segments, prefix, window, positions = batch.segments, batch.prefix, seen.window, seen.positions

    def may(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        mask = query >= key if causal else query == query
        if window:
            mask = mask & (query - key < window)
        if prefix is not None:
            mask = mask | ((positions[row, query] < prefix[row]) & (positions[row, key] < prefix[row]))
        if segments is not None:
            mask = mask & (segments[row, query] == segments[row, key]) & (segments[row, key] != 0)
        return mask

    rows, length = seen.positions.shape
    return create_block_mask(may, rows, None, length, length, device=seen.positions.device)
