"""What is possible at all: the largest known model, the longest rows, the largest batch, or the smallest cluster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal, get_args

from danlu.errors import DanluError
from danlu.plan.adapters import Lora, can_adapt
from danlu.plan.cluster import Cluster
from danlu.plan.counts import total_weights
from danlu.plan.offload import Offload
from danlu.plan.search import Asked, NoPlan, search
from danlu.plan.shapes import reaches, shapes

Fit = Literal["model", "context", "batch", "cluster"]
FITS: tuple[Fit, ...] = get_args(Fit)
SHORTEST = 256  # tokens of a row that are still tried
MOST = 16_384  # accelerators, or rows at once


def works(asked: Asked) -> bool:
    """Whether any plan fits."""
    try:
        search(asked, count=1)
    except NoPlan:
        return False
    return True


def largest_model(
    cluster: Cluster, length: int, rows: int, precision: str, lora: Lora | None = None, offload: Offload = "none"
) -> tuple[str, Asked]:
    """Of the shapes in the data file, the one with the most weights that can be trained. Raises DanluError."""
    names = {id(columns): name for name, columns in reversed(shapes().items())}  # the first spelling of each
    known = sorted(names.values(), key=lambda name: -total_weights(shapes()[name]))
    tried = (
        Asked(shapes()[name], cluster, length, rows, precision, lora=lora, offload=offload)
        for name in known
        if reaches(shapes()[name], length) and (lora is None or can_adapt(shapes()[name]))
    )
    asked = _first(tried, f"no known model can be trained on {cluster.count} {cluster.accelerator.name} like that")
    return names[id(asked.model)], asked


def longest_context(asked: Asked) -> Asked:
    """Rows of the most tokens, a power of two, with as many tokens a step. Raises DanluError where none can be."""
    tokens = asked.rows * asked.length
    lengths = [SHORTEST * 2**power for power in range(tokens.bit_length()) if tokens % (SHORTEST * 2**power) == 0]
    tried = (
        replace(asked, length=length, rows=tokens // length)
        for length in reversed(lengths)
        if reaches(asked.model, length)
    )
    return _first(tried, f"rows of no length from {SHORTEST} tokens on can be trained on that cluster")


def largest_batch(asked: Asked) -> Asked:
    """The most rows that each process can compute at once, and as many a step. Raises NoPlan where one is too many."""

    def of(rows: int) -> Asked:
        return replace(asked, rows=rows * asked.cluster.count, micro_rows=rows)

    search(of(1), count=1)
    most = 1
    while most < MOST and works(of(2 * most)):
        most *= 2
    step = most // 2
    while step:
        most += step if works(of(most + step)) else 0
        step //= 2
    return of(most)


def smallest_cluster(asked: Asked) -> Asked:
    """The fewest accelerators that will do. Raises DanluError where 16,384 will not.

    Only numbers that share the rows out can, so that one may do where a larger one does not.
    """
    device = asked.cluster.accelerator
    most = device.node if device.processor or asked.cluster.taught else MOST
    tried = (replace(asked, cluster=replace(asked.cluster, count=size)) for size in _sizes(device.node, most))
    return _first(tried, f"{most:,} {device.name} are too few, or the rows of a step cannot be shared")


def _sizes(node: int, most: int) -> Iterator[int]:
    """Parts of a node, then whole nodes: all numbers up to 16, and of more ever coarser ones, some 6 % apart."""
    size = 1
    while size <= most:
        yield size
        step = 1 if size < node else node
        size += step * max(size // step // 16, 1)


def _first(tried: Iterable[Asked], otherwise: str) -> Asked:
    found = next(filter(works, tried), None)
    if found is None:
        raise DanluError(otherwise, where="--fit")
    return found
