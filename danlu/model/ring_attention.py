"""Exact attention of rows that are cut over several processes: keys and values go round in a ring.

Each process holds some places of every row. It attends from them to the keys of one process after another, while the
next keys are on their way, and merges what it found by the softmax's own denominators (Ring Attention,
arXiv:2310.01889). No process ever holds more than two processes' keys, and documents of packed rows stay apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TILE = 512  # queries and keys computed at once


@dataclass(frozen=True)
class Ring:
    """Processes that share rows out.

    Attributes:
        group: of them.
        size, rank: how many they are, and which of them this is.
    """

    group: dist.ProcessGroup
    size: int
    rank: int

    def places(self, length: int, rank: int | None = None) -> Tensor:
        """Which places of a row of `length` a process holds, int64 [length / size], ascending.

        A row is cut into twice as many pieces as there are processes; each holds one from the front and one from the
        back, so that under a causal mask all have the same work (arXiv:2407.21783, section 3.3.2).
        """
        rank = self.rank if rank is None else rank
        piece = length // (2 * self.size)
        front, back = rank, 2 * self.size - 1 - rank
        here = torch.arange(piece)
        return torch.cat((here + front * piece, here + back * piece))

    def gather(self, x: Tensor) -> list[Tensor]:
        """The same tensor of all processes, in the order of their ranks."""
        found = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(found, x.contiguous(), group=self.group)
        return found


@dataclass(frozen=True)
class RingSight:
    """Who sees whom in rows that are cut.

    Attributes:
        ring: the processes.
        segments: int32 [B, T / size] of every process, the documents of its places; 0 for padding.
        places: int64 [T / size] of every process, its places in the row.
        causal: a place sees itself and what came before.
        window: keys a place may look back on, itself included; 0 for no limit.
    """

    ring: Ring
    segments: list[Tensor]
    places: list[Tensor]
    causal: bool
    window: int

    def mask(self, queries: slice, keys: slice, other: int) -> Tensor | None:
        """bool [B, 1, queries, keys], True where a query of this process may see a key of another; None for nowhere."""
        own = self.ring.rank
        query, key = self.places[own][queries], self.places[other][keys]
        if self.causal and int(key[0]) > int(query[-1]):
            return None
        first, second = self.segments[own][:, queries, None], self.segments[other][:, None, keys]
        seen = (first == second) & (second != 0)
        distance = (query[:, None] - key[None, :]).to(seen.device)
        if self.causal:
            seen &= distance >= 0
        if self.window:
            seen &= distance < self.window
        return seen[:, None] if bool(seen.any()) else None


def ring_sight(ring: Ring, segments: Tensor, causal: bool, window: int) -> RingSight:
    """How the places of this process see all others.

    Args:
        segments: int32 [B, T / size], the documents of this process's places.
        causal, window: see `RingSight`.
    """
    length = segments.shape[1] * ring.size
    places = [ring.places(length, rank) for rank in range(ring.size)]
    return RingSight(ring, ring.gather(segments), places, causal, window)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, see: RingSight) -> Tensor:
        queries = _grouped(query, key.shape[2])
        mixed = torch.zeros(queries.shape, dtype=torch.float32, device=query.device)
        weight = torch.full(queries.shape[:-1], float("-inf"), device=query.device)  # log of the sums so far
        for other, keys, values in _round(see.ring, key, value):
            for here, there, mask in _tiles(see, other):
                score = _scores(queries[:, :, :, here], keys[:, :, there], mask)
                _merge(mixed[:, :, :, here], weight[:, :, :, here], score, values[:, :, there])
        ctx.save_for_backward(query, key, value, mixed.to(query.dtype), weight)
        ctx.see = see
        return _apart(mixed.to(query.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mixed, weight = ctx.saved_tensors
        see: RingSight = ctx.see
        queries, upstream = _grouped(query, key.shape[2]), _grouped(gradient, key.shape[2])
        along = (upstream.float() * mixed.float()).sum(-1)
        to_query = torch.zeros(queries.shape, dtype=torch.float32, device=query.device)
        to_pair = torch.zeros((2, *_by_head(key).shape), dtype=torch.float32, device=query.device)
        for other, keys, values in _round(see.ring, key, value):
            for here, there, mask in _tiles(see, other):
                own, upper = queries[:, :, :, here], upstream[:, :, :, here]
                score = _scores(own, keys[:, :, there], mask)
                known = weight[:, :, :, here, None]
                probability = torch.exp(score - known.masked_fill(known.isinf(), 0.0))
                to_probability = (upper @ values[:, :, None, there].mT).float()
                to_score = (probability * (to_probability - along[:, :, :, here, None])).to(query.dtype)
                to_query[:, :, :, here] += to_score @ keys[:, :, None, there]
                to_pair[0][:, :, there] += (to_score.mT @ own).sum(2)
                to_pair[1][:, :, there] += (probability.to(query.dtype).mT @ upper).sum(2)
            # The gradients go on with their keys, and are home again after a whole round.
            to_pair = _pass_on(see.ring, to_pair)()
        to_key, to_value = (part.transpose(1, 2).to(key.dtype) for part in to_pair)
        return _apart(to_query.to(query.dtype)), to_key, to_value, None


def ring_attention(query: Tensor, key: Tensor, value: Tensor, see: RingSight) -> Tensor:
    """Attention of [B, T / size, heads, head_width] scaled queries over the keys of all processes of a ring.

    Args:
        key, value: [B, T / size, kv_heads, head_width], this process's.
        see: from `ring_sight`.

    Returns: [B, T / size, heads, head_width], zero where a query sees nothing.
    """
    return _RingAttention.apply(query, key, value, see)


def _round(ring: Ring, key: Tensor, value: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The rank, keys and values [B, kv_heads, T / size, head_width] of every process, this one first."""
    pair = torch.stack((_by_head(key), _by_head(value)))
    for step in range(ring.size):
        coming = _pass_on(ring, pair) if step + 1 < ring.size else None
        yield (ring.rank - step) % ring.size, pair[0], pair[1]
        if coming is not None:
            pair = coming()


def _pass_on(ring: Ring, x: Tensor) -> Any:
    """Send a tensor to the next process; returns what waits for the one that comes from the process before."""
    sent, coming = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    after, before = (dist.get_global_rank(ring.group, (ring.rank + step) % ring.size) for step in (1, -1))
    moves = [
        dist.P2POp(dist.isend, sent, after, ring.group),
        dist.P2POp(dist.irecv, coming, before, ring.group),
    ]
    waiting = dist.batch_isend_irecv(moves)

    def arrived() -> Tensor:
        for move in waiting:
            move.wait()
        return coming

    return arrived


def _tiles(see: RingSight, other: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Pieces of this process's queries and of another's keys that see each other, with their mask."""
    for here in _pieces(see.places[see.ring.rank]):
        for there in _pieces(see.places[other]):
            mask = see.mask(here, there, other)
            if mask is not None:
                yield here, there, mask[:, None]  # [B, 1, 1, queries, keys]


def _pieces(places: Tensor) -> list[slice]:
    """Both pieces of a row that a process holds, in tiles."""
    half = len(places) // 2
    return [
        slice(first, min(first + TILE, end))
        for begin, end in ((0, half), (half, len(places)))
        for first in range(begin, end, TILE)
    ]


def _by_head(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[B, T, heads, width] -> [B, kv_heads, group, T, width]: a group shares its keys."""
    return x.transpose(1, 2).unflatten(1, (kv_heads, -1)).contiguous()


def _apart(x: Tensor) -> Tensor:
    """The way back from `_grouped`."""
    return x.flatten(1, 2).transpose(1, 2).contiguous()


def _scores(queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """fp32 [B, kv_heads, group, queries, keys], -inf where a query may not see."""
    return (queries @ keys[:, :, None].mT).float().masked_fill(~mask, float("-inf"))


def _merge(mixed: Tensor, weight: Tensor, score: Tensor, values: Tensor) -> None:
    """Take a tile's keys into what was found so far, in place: both are views of the whole."""
    found = score.logsumexp(-1)
    total = torch.logaddexp(weight, found)
    safe = total.masked_fill(total.isinf(), 0.0)  # a query that sees nothing yet
    share = torch.exp(score - safe[..., None]).to(values.dtype)
    mixed.mul_(torch.exp(weight - safe)[..., None]).add_(share @ values[:, :, None])
    weight.copy_(total)
