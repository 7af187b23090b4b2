"""What is possible at all: the largest known model, the longest rows, or the smallest cluster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal, get_args

from danlu.errors import DanluError
from danlu.plan.cluster import Cluster
from danlu.plan.counts import total_weights
from danlu.plan.search import Asked, NoPlan, search
from danlu.plan.shapes import Shape, shapes

Fit = Literal["model", "context", "cluster"]
FITS: tuple[Fit, ...] = get_args(Fit)
SHORTEST = 256  # tokens of a row that are still tried
MOST = 16_384  # accelerators


def works(asked: Asked) -> bool:
    """Whether any plan fits."""
    try:
        search(asked, count=1)
    except NoPlan:
        return False
    return True


def largest_model(cluster: Cluster, length: int, rows: int, precision: str) -> tuple[str, Asked]:
    """Of the shapes in the data file, the one with the most weights that can be trained. Raises DanluError."""
    names = {id(columns): name for name, columns in reversed(shapes().items())}  # the first spelling of each
    known = sorted(names.values(), key=lambda name: -total_weights(shapes()[name]))
    tried = (
        Asked(shapes()[name], cluster, length, rows, precision) for name in known if _reaches(shapes()[name], length)
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
        if _reaches(asked.model, length)
    )
    return _first(tried, f"rows of no length from {SHORTEST} tokens on can be trained on that cluster")


def smallest_cluster(asked: Asked) -> Asked:
    """The fewest accelerators that will do. Raises DanluError where 16,384 will not.

    Only numbers that share the rows out can, so that one may do where a larger one does not.
    """
    device = asked.cluster.accelerator
    tried = (replace(asked, cluster=Cluster(device, size)) for size in _sizes(device.node))
    return _first(tried, f"{MOST:,} {device.name} are too few, or the rows of a step cannot be shared")


def _sizes(node: int) -> Iterator[int]:
    """Parts of a node, then whole nodes: all numbers up to 16, and of more ever coarser ones, some 6 % apart."""
    size = 1
    while size <= MOST:
        yield size
        step = 1 if size < node else node
        size += step * max(size // step // 16, 1)


def _reaches(model: Shape, length: int) -> bool:
    """Whether a model that learns its positions has that many."""
    return not model["positions"] or length <= model["positions"]


def _first(tried: Iterable[Asked], otherwise: str) -> Asked:
    found = next(filter(works, tried), None)
    if found is None:
        raise DanluError(otherwise, where="--fit")
    return found
