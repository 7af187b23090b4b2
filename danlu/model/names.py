"""Weights' names: ours, and those of a format, by one table that is read both ways.

A table has a line for every kind of weight, {"blocks.{i}.attention.query": "model.layers.{i}.self_attn.q_proj"};
`.weight` or `.bias` follows on both sides. Where a format keeps a weight in another form, a `Place` says how.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

NUMBER = re.compile(r"\d+")
KINDS = ("weight", "bias")


@dataclass(frozen=True)
class Place:
    """How a weight of ours lies in a format.

    Attributes:
        name: its name there; {i} stands for the layer, {e} for the expert where each has a tensor of its own.
        part, parts: it is one of several that are stored as one tensor, side by side along the outputs.
        transposed: matrices are stored as [in, out].
        bare: no `.weight` or `.bias` follows the name.
        ones: dimensions of size 1 before its own.
        plus: what is added to every number there.
    """

    name: str
    part: int = 0
    parts: int = 1
    transposed: bool = False
    bare: bool = False
    ones: int = 0
    plus: float = 0.0

    @staticmethod
    def of(to: str | Place) -> Place:
        """The line of a table as a place."""
        return Place(to) if isinstance(to, str) else to

    @property
    def split(self) -> bool:
        """Each expert has a tensor of its own."""
        return "{e}" in self.name

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of our weight (of one expert's) in a tensor of this shape; None where it cannot be cut so."""
        shape = stored[self.ones :]
        if stored[: self.ones] != (1,) * self.ones:
            return None
        if self.transposed:
            shape = shape[::-1]
        if self.parts == 1:
            return shape
        return (shape[0] // self.parts, *shape[1:]) if shape and shape[0] % self.parts == 0 else None

    def put(self, parts: list[Tensor]) -> Tensor:
        """The tensor that is stored, of all its parts in their order."""
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.plus:
            whole = whole.float() + self.plus
        if self.transposed and whole.dim() == 2:
            whole = whole.T
        return whole.reshape((1,) * self.ones + whole.shape)


Table = Mapping[str, str | Place]


@dataclass(frozen=True)
class Found:
    """What a stored tensor is: `ours`, the weight; `place`, how it lies there; `expert`, whose it is, if one's."""

    ours: str
    place: Place
    expert: int | None


@dataclass(frozen=True)
class Names:
    """A table, read both ways."""

    table: Table

    @cached_property
    def _places(self) -> dict[str, Place]:
        return {ours: Place.of(to) for ours, to in self.table.items()}

    @cached_property
    def _patterns(self) -> dict[str, list[tuple[re.Pattern[str], str, Place]]]:
        """By the name with every number replaced, so that few have to be tried."""
        found: dict[str, list[tuple[re.Pattern[str], str, Place]]] = {}
        for ours, place in self._places.items():
            pattern = re.escape(place.name).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{e\}", r"(?P<e>\d+)")
            key = NUMBER.sub("#", place.name.replace("{i}", "#").replace("{e}", "#"))
            found.setdefault(key, []).append((re.compile(pattern), ours, place))
        return found

    def place(self, ours: str) -> Place | None:
        """How a weight of ours lies in the format, the layer's number filled in; None where the table lacks it."""
        stem, _, kind = ours.rpartition(".")
        number = NUMBER.search(ours)
        layer = number.group() if number else ""
        for name, end in ((stem, f".{kind}"), (ours, "")):
            place = self._places.get(NUMBER.sub("{i}", name, count=1) if number else name)
            if place is not None and (place.bare or kind in KINDS) and bool(end) != place.bare:
                return replace(place, name=place.name.replace("{i}", layer) + end)
        return None

    def theirs(self, ours: str) -> str | None:
        """The name of the tensor that holds a weight of ours; {e} where each expert has one."""
        place = self.place(ours)
        return None if place is None else place.name

    def ours(self, theirs: str) -> list[Found]:
        """The weights of ours that a stored tensor holds; none where the table does not know it."""
        stem, _, kind = theirs.rpartition(".")
        candidates = [(theirs, "", True)]
        if kind in KINDS:
            candidates.append((stem, f".{kind}", False))
        found = []
        for name, end, bare in candidates:
            for pattern, ours, place in self._patterns.get(NUMBER.sub("#", name), []):
                match = pattern.fullmatch(name)
                if match is None or place.bare != bare:
                    continue
                numbers = match.groupdict()
                expert = None if numbers.get("e") is None else int(numbers["e"])
                found.append(Found(ours.replace("{i}", numbers.get("i") or "") + end, place, expert))
        return found

    def outward(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Place, list[Tensor]]]:
        """The tensors to store: name, form, and the parts to join with `Place.put`. Nothing is copied here.

        Raises KeyError with the name of a weight that the table lacks.
        """
        waiting: dict[str, list[Tensor | None]] = {}
        for name, weight in weights.items():
            place = self.place(name)
            if place is None:
                raise KeyError(name)
            pieces = enumerate(weight) if place.split else [(0, weight)]
            for expert, piece in pieces:
                theirs = place.name.replace("{e}", str(expert))
                parts = waiting.setdefault(theirs, [None] * place.parts)
                parts[place.part] = piece
                if all(part is not None for part in parts):
                    yield theirs, place, [part for part in waiting.pop(theirs) if part is not None]


def prefixed(prefix: str, table: Table) -> dict[str, str | Place]:
    """A table whose names in the format all have something before them."""
    return {
        ours: prefix + to if isinstance(to, str) else replace(to, name=prefix + to.name) for ours, to in table.items()
    }


def under(ours: str, table: Table) -> dict[str, str | Place]:
    """A table whose names of ours all have something before them."""
    return {ours + name: to for name, to in table.items()}
