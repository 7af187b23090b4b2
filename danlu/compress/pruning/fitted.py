"""Heads, channels and features that go, and what reads them fitted anew to what is left, by least squares.

Heads and channels go by what the outputs lose once the others have made up for them (the second-order cost of
arXiv:2208.11580), features by their share in what is read from the stream (after Minitron, arXiv:2407.14679).
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from danlu.compress.product import Shelf, Source, start_walk
from danlu.console import progress
from danlu.model.attention import Attention
from danlu.model.config import ModelConfig
from danlu.model.feedforward import FeedForward

DAMPING = 0.01  # of the mean square of an input, added to every one: inputs never seen still count a little
ROUNDS = 4  # in which columns go: what each costs changes as others go
READERS = ("attention.query", "attention.key", "attention.value", "feedforward.gate", "feedforward.up")  # of the stream
WRITERS = ("attention.output", "feedforward.down")
NORMS = {"attention_norm": "attention.query", "feedforward_norm": "feedforward.up"}  # and one that reads what they give


# --- Heads and channels ---------------------------------------------------------------------------------------------


def drop_inner(source: Source, rows: Tensor, smaller: ModelConfig, shelf: Shelf) -> Source:
    """Heads and channels that can be made up for best are gone, in each layer its own.

    Args: smaller: with the `heads`, `kv_heads` and `feedforward_width` that are to be left.
    """
    config = source.config
    walk = start_walk(source, rows)
    walk.embed()
    with progress("heads, channels", config.layers, "blocks") as tick:
        for prefix, block, products in walk.blocks():
            if smaller.kv_heads < config.kv_heads:
                _drop_heads(cast(Attention, block.attention), products.found["attention.output"], smaller.kv_heads)
            if smaller.feedforward_width < config.feedforward_width:
                inner = cast(FeedForward, block.feedforward)
                _drop_channels(inner, products.found["feedforward.down"], smaller.feedforward_width)
            for name, weight in block.named_parameters():
                shelf.keep(prefix + name, weight.data)
            tick.advance(1, prefix.rstrip("."))
    shelf.keep_others(source)
    changed = {name: getattr(smaller, name) for name in ("heads", "kv_heads", "feedforward_width")}
    return shelf.source(replace(config, **changed))


def _drop_heads(attention: Attention, products: Tensor, keep: int) -> None:
    """So many key/value heads stay, with the query heads that share them."""
    width, group = attention.head_width, attention.heads // attention.kv_heads
    kept, fitted = drop_columns(attention.output.weight.data, products, group * width, keep)
    attention.output.weight.data = fitted
    _keep_rows(attention.query, _columns(kept, group * width))
    for layer in (attention.key, attention.value):
        _keep_rows(layer, _columns(kept, width))
    attention.heads, attention.kv_heads = keep * group, keep


def _drop_channels(inner: FeedForward, products: Tensor, keep: int) -> None:
    kept, inner.down.weight.data = drop_columns(inner.down.weight.data, products, 1, keep)
    for layer in (inner.gate, inner.up):
        if layer is not None:
            _keep_rows(layer, kept)


def _keep_rows(layer: nn.Linear, rows: Tensor) -> None:
    layer.weight.data = layer.weight.data[rows]
    if layer.bias is not None:
        layer.bias.data = layer.bias.data[rows]


def _columns(groups: Tensor, width: int) -> Tensor:
    """The columns of groups of so many."""
    return (groups[:, None] * width + torch.arange(width)).flatten()


def drop_columns(weight: Tensor, products: Tensor, width: int, keep: int) -> tuple[Tensor, Tensor]:
    """Groups of inputs that are missed least are gone, and the others make up for them.

    The groups go in rounds, each time those whose going costs the squared outputs least once the rest is fitted:
    trace(W_g (H^-1)_gg^-1 W_g^T), with H the inputs' products.

    Args:
        weight: fp32 [rows, groups * width].
        products: fp32 [groups * width] squared, of inputs.
        width: columns of a group, neighbours.
        keep: groups that stay.

    Returns: the groups that stay, int64 [keep], ascending; the matrix fitted to them, fp32 [rows, keep * width].
    """
    kept = torch.arange(weight.shape[1] // width)
    gone = len(kept) - keep
    for left in range(ROUNDS, 0, -1):
        columns = _columns(kept, width)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(_damped(products)[columns][:, columns]))
        groups = len(kept)
        own = inverse.view(groups, width, groups, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        parts = refitted(weight, products, columns).view(-1, groups, width).permute(1, 2, 0)  # [groups, width, rows]
        cost = (parts * torch.linalg.solve(own, parts)).sum((1, 2))
        now = -(-gone // left)
        kept = kept[cost.argsort()[now:].sort().values]
        gone -= now
    return kept, refitted(weight, products, _columns(kept, width))


def refitted(weight: Tensor, products: Tensor, columns: Tensor) -> Tensor:
    """The least-squares answer of what a matrix puts out from some of its inputs, fp32 [rows, kept].

    Args: weight: fp32 [rows, inputs]; products: fp32 [inputs, inputs]; columns: int64 [kept].
    """
    damped = _damped(products)
    factor = torch.linalg.cholesky(damped[columns][:, columns])
    return torch.cholesky_solve(damped[columns] @ weight.T, factor).T


def _damped(products: Tensor) -> Tensor:
    return products + DAMPING * products.diagonal().mean().clamp(min=1e-12) * torch.eye(len(products))


# --- Features of the stream -----------------------------------------------------------------------------------------


def drop_features(source: Source, rows: Tensor, keep: int, shelf: Shelf) -> Source:
    """Features of which least is read are gone from every layer. What reads the others is fitted to the whole stream as
    it was; norms are scaled, as their mean is now over fewer."""
    config, count = source.config, rows.numel()
    kept = _most_read(source, rows).argsort(descending=True)[:keep].sort().values
    walk = start_walk(source, rows)
    for name, weight in walk.embed().items():
        shelf.keep(name, weight[..., kept])
    with progress("features, second pass", config.layers, "blocks") as tick:
        for prefix, block, products in walk.blocks():
            for name, weight in block.named_parameters():
                stem, _, kind = name.rpartition(".")
                shelf.keep(prefix + name, _narrowed(weight.data, stem, kind, products.found, kept, config, count))
            tick.advance(1, prefix.rstrip("."))
    ends, given = walk.end()
    for name, weight in ends.items():
        if name.startswith("norm."):
            shelf.keep(name, _scaled(weight, given, kept, config, count))
        else:
            shelf.keep(name, refitted(weight, given, kept) if weight.dim() > 1 else weight)
    return shelf.source(replace(config, width=keep))


def _most_read(source: Source, rows: Tensor) -> Tensor:
    """How much of what all matrices read comes from each feature, fp32 [width]: the mean of their shares."""
    walk, read = start_walk(source, rows), torch.zeros(source.config.width)
    head = walk.embed()["embedding.tokens.weight"]
    with progress("features, first pass", source.config.layers, "blocks") as tick:
        for _, block, products in walk.blocks():
            for name in READERS:
                if name in products.found:
                    read += _shares(block.get_parameter(f"{name}.weight").data, products.found[name])
            tick.advance(1)
    ends, given = walk.end()
    return read + _shares(ends.get("head.weight", head), given)


def _shares(weight: Tensor, products: Tensor) -> Tensor:
    """Of a matrix's squared outputs, what each input brings in by itself; they sum to 1."""
    alone = weight.square().sum(0) * products.diagonal()
    return alone / alone.sum().clamp(min=1e-30)


def _narrowed(
    weight: Tensor, stem: str, kind: str, found: dict[str, Tensor], kept: Tensor, config: ModelConfig, count: int
) -> Tensor:
    """A block's weight in a narrower stream."""
    if stem in READERS and kind == "weight":
        return refitted(weight, found[stem], kept)
    if stem in WRITERS:
        return weight[kept]
    if stem in NORMS:
        return _scaled(weight, found[NORMS[stem]], kept, config, count)
    return weight


def _scaled(weight: Tensor, products: Tensor, kept: Tensor, config: ModelConfig, count: int) -> Tensor:
    """A norm's weight for some of the features: what it puts out for them stays of the same size.

    Args: products: of what the norm puts out, over `count` tokens.
    """
    full = weight + 1 if config.norm_plus_one else weight
    normal = products.diagonal() / full.square().clamp(min=1e-12) / count  # squares of the stream over their mean
    made = full[kept] * normal[kept].mean().sqrt()
    return made - 1 if config.norm_plus_one else made
