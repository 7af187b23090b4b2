"""Which rows of which data sets make up a step, and how long they are: pure functions of the step, nothing to save."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from danlu.data.batch import Batches
from danlu.data.permutation import shuffled
from danlu.data.stream import Batch, Rows, make_batch, share_of
from danlu.errors import DanluError

LOOKED_AT = 4096  # rows whose lengths are found at a time

Ids = npt.NDArray[np.int64]


class RowSource(Protocol):
    """Rows of one data set, drawn without end: epoch after epoch, each row once an epoch."""

    @property
    def window(self) -> int:
        """Tokens a row."""
        ...

    def __len__(self) -> int:
        """Rows an epoch."""
        ...

    def batch(self, draws: Ids) -> Batch:
        """The rows of these draws, counted from 0 over all epochs; a function of nothing else."""
        ...


class Packed:
    """Packed rows as a source, such as those of a data artifact.

    Args:
        rows: what to draw from.
        seed: decides the order, together with the number of the epoch, as it does in `Stream`.
        first: the order of the first epoch, int64 [rows], say `shortest_first(rows)`; later ones are shuffled.

    Raises DanluError where there are no rows, or `first` does not hold each once.
    """

    def __init__(self, rows: Rows, seed: int, first: Ids | None = None) -> None:
        if not len(rows):
            raise DanluError("there are no rows to draw from")
        if first is not None and not np.array_equal(np.sort(first), np.arange(len(rows))):
            raise DanluError(f"the order of the first epoch does not hold each of {len(rows):,} rows once")
        self.rows, self.seed, self.first, self.window = rows, seed, first, rows.window

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, draws: Ids) -> Batch:
        """The rows of these draws: [B, window]."""
        epochs, chosen = shuffled(draws, len(self.rows), self.seed)
        if self.first is not None:
            chosen = np.where(epochs == 0, self.first[draws % len(self.rows)], chosen)
        return make_batch(self.rows, chosen)


def shortest_first(rows: Rows) -> Ids:
    """The numbers of packed rows by the length of their longest document, shortest first; int64 [rows].

    Rows of equal length stay as they stand.
    """
    lengths = [_longest(rows.segments[at : at + LOOKED_AT]) for at in range(0, len(rows), LOOKED_AT)]
    return np.argsort(np.concatenate(lengths), kind="stable")


class MixtureStream:
    """Batches of rows from one or several data sets, mixed by weight.

    A row of the global batch is a draw, counted over all steps. Which data set it comes from follows from its number,
    and each data set goes through its own rows epoch by epoch. So a run is resumed at any step at once, with the same
    rows on any number of ranks.

    Args:
        sources: the data sets by name; their rows are equally long.
        batch_rows: rows a step, over all ranks together. Rank r of w gets the r-th of w equal parts of the batch.
        weights: share of the rows by name, to any sum; by default the sizes of the data sets, so that all are gone
            through equally often.
        rank, world: this process among how many.

    Raises DanluError where names or weights do not fit the sources, rows differ in length, a batch cannot be shared
    out evenly, or a data set has fewer rows than its part of one batch.
    """

    def __init__(
        self,
        sources: Mapping[str, RowSource],
        batch_rows: int,
        weights: Mapping[str, float] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._mine = share_of(batch_rows, rank, world)
        given = {name: len(source) for name, source in sources.items()} if weights is None else dict(weights)
        _check(sources, given)
        self.sources, self.batch_rows = dict(sources), batch_rows
        self.turns = Turns([given[name] for name in self.sources])
        _check_sizes(self.sources, self.turns.shares, batch_rows)

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0: [batch_rows / world, window]."""
        first = step * self.batch_rows
        turns = [self.turns.of(first + place) for place in self._mine]
        chosen, numbers = np.array(turns, dtype=np.int64).T
        places = [np.flatnonzero(chosen == number) for number in range(len(self.sources))]
        pairs = zip(self.sources.values(), places, strict=True)
        parts = [source.batch(numbers[place]) for source, place in pairs if len(place)]
        if len(parts) == 1:  # in order as it is, and a batch of whatever kind the data set makes
            return parts[0]
        return _joined(parts, torch.from_numpy(np.argsort(np.concatenate(places))))

    def epochs(self, steps: int) -> dict[str, float]:
        """How often the first `steps` steps go through each data set."""
        drawn = self.turns.before(steps * self.batch_rows)
        return {name: count / len(self.sources[name]) for name, count in zip(self.sources, drawn, strict=True)}


@dataclass(frozen=True)
class Fork:
    """Shares draws out between two sides, each a data set's number or another fork.

    Of the first n draws that come here, `share` of n goes to the left, rounded to the nearest whole number.
    """

    left: Fork | int
    right: Fork | int
    share: Fraction

    def left_of(self, draws: int) -> int:
        """How many of the first draws go to the left."""
        above, below = self.share.numerator, self.share.denominator
        return (2 * draws * above + below) // (2 * below)


class Turns:
    """Which data set each draw is taken from, evenly: the data sets are the leaves of a tree of forks.

    Of any first n draws each data set has its share of n to within one row where there are up to three, and to within
    two however many there are: in a tree with the heaviest on top (Huffman, 1952) at most two thirds of what comes to a
    fork go on to another, so a rounding counts for less from fork to fork.

    Args:
        weights: of each data set, positive, to any sum.

    Attributes:
        shares: the weights over their sum, exactly.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(weight) for weight in weights]
        self.shares = [weight / sum(exact) for weight in exact]
        waiting: list[tuple[Fraction, int, Fork | int]] = [(share, n, n) for n, share in enumerate(self.shares)]
        heapq.heapify(waiting)
        for number in range(len(weights), 2 * len(weights) - 1):
            light, _, right = heapq.heappop(waiting)
            heavy, _, left = heapq.heappop(waiting)
            heapq.heappush(waiting, (light + heavy, number, Fork(left, right, heavy / (light + heavy))))
        self._root = waiting[0][2]

    def of(self, draw: int) -> tuple[int, int]:
        """The data set that a draw is taken from, and how many of the draws before it were."""
        node = self._root
        while isinstance(node, Fork):
            left = node.left_of(draw)
            goes_left = node.left_of(draw + 1) > left
            node, draw = (node.left, left) if goes_left else (node.right, draw - left)
        return node, draw

    def before(self, draw: int) -> list[int]:
        """How many of the draws before this one each data set has."""
        found = [0] * len(self.shares)
        waiting = [(self._root, draw)]
        while waiting:
            node, draws = waiting.pop()
            if isinstance(node, Fork):
                left = node.left_of(draws)
                waiting += [(node.left, left), (node.right, draws - left)]
            else:
                found[node] = draws
        return found


class Curriculum:
    """Streams one after the other: each from its step on, until the next begins.

    Each stream counts its own steps from 0, so what it gives is a pure function of the step here too.

    Args:
        phases: (first step, stream), the first at step 0.

    Raises DanluError where the steps do not rise from 0.
    """

    def __init__(self, phases: Sequence[tuple[int, Batches[Batch]]]) -> None:
        self._first = [step for step, _ in phases]
        self._streams = [stream for _, stream in phases]
        if self._first[:1] != [0] or any(
            one >= other for one, other in zip(self._first, self._first[1:], strict=False)
        ):
            raise DanluError(f"the phases of a curriculum begin at steps {self._first}", fix="let them rise from 0")

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0; its shape changes with the phase."""
        phase = int(np.searchsorted(self._first, step, side="right")) - 1
        return self._streams[phase].batch(step - self._first[phase])


def growing(windows: Sequence[tuple[int, int]], tokens: int, make: Callable[[int, int], Batches[Batch]]) -> Curriculum:
    """A curriculum by length (arXiv:2108.06084): windows grow, and rows become fewer, so a step stays equally large.

    Each phase begins an epoch of its own.

    Args:
        windows: (first step, tokens a row), as in [(0, 64), (1000, 256)].
        tokens: a step, over all ranks together.
        make: window, rows a step -> stream.

    Raises DanluError where a window does not divide `tokens`.
    """
    for _, window in windows:
        if window < 1 or tokens % window:
            what = f"{tokens:,} tokens a step cannot be cut into windows of {window:,}"
            raise DanluError(what, fix="use windows that divide the tokens of a step")
    return Curriculum([(step, make(window, tokens // window)) for step, window in windows])


def _longest(segments: npt.NDArray[np.int32]) -> Ids:
    """The tokens of the longest document in each packed row, int64 [rows]."""
    numbers = range(1, int(segments.max(initial=0)) + 1)
    found = np.zeros(len(segments), dtype=np.int64)
    for number in numbers:
        np.maximum(found, (segments == number).sum(axis=1), out=found)
    return found


def _joined(parts: Sequence[Batch], order: torch.Tensor) -> Batch:
    """One batch of the rows of several, in this order; those without weights count 1 where others have some."""
    plain = [(part.tokens, part.targets, part.segments, part.positions) for part in parts]
    weights: torch.Tensor | None = None
    if any(part.weights is not None for part in parts):
        ones = (torch.ones(part.tokens.shape) if part.weights is None else part.weights for part in parts)
        weights = torch.cat(list(ones))[order]
    tokens, targets, segments, positions = (torch.cat(column)[order] for column in zip(*plain, strict=True))
    return Batch(tokens, targets, segments, positions, weights)


def _check(sources: Mapping[str, RowSource], weights: Mapping[str, float]) -> None:
    if not sources:
        raise DanluError("there are no data sets to draw from")
    if set(weights) != set(sources):
        what = f"there are weights for {', '.join(weights)}, and data sets {', '.join(sources)}"
        raise DanluError(what, fix="give each data set one weight")
    for name, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise DanluError(
                f"the weight {weight} is no share", where=name, fix="use a number above 0, or leave it out"
            )
    windows = {name: source.window for name, source in sources.items()}
    if len(set(windows.values())) > 1:
        shown = ", ".join(f"{name} {window}" for name, window in windows.items())
        raise DanluError(f"rows of different lengths cannot be mixed: {shown}", fix="use one window for all")


def _check_sizes(sources: Mapping[str, RowSource], shares: Sequence[Fraction], batch_rows: int) -> None:
    for (name, source), share in zip(sources.items(), shares, strict=True):
        if len(source) < share * batch_rows:
            wanted = float(share * batch_rows)
            what = f"{len(source):,} rows are fewer than the {wanted:,.6g} that a batch of {batch_rows} takes of them"
            raise DanluError(what, where=name, fix="add data, shorten the window, or lower the rows a step")
