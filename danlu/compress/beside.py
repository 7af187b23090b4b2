"""Two walks side by side: through a model as it is, and through the same model as it is changed layer by layer.

What a layer is to give is what it gives in the original; what it is given is what the changed layers before it make.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from danlu.compress.compensate import AIMED, ROUNDING, Inputs
from danlu.compress.parts import Parts
from danlu.compress.walk import Walk
from danlu.model.config import ModelConfig
from danlu.model.stored import Make
from danlu.train.memory import give_back

DRIFT = 2**26  # numbers at once: all rows of up to 8,192 columns


@dataclass(frozen=True)
class Turn:
    """A block whose turn it is.

    Attributes:
        prefix: of its weights' names in the model.
        layers: names in the model of matrices of linear layers that are given the very same tensor, in the order they
            are computed, and their inputs; None where only zeros came. What they become is `put` before
            the next are asked for.
        others: names in the model of the block's other weights.
    """

    prefix: str
    layers: Iterator[tuple[list[str], Inputs | None]]
    others: list[str]


class Beside:
    """Calibration rows on their way through both. See `Walk`."""

    def __init__(self, config: ModelConfig, makers: Mapping[str, Make], rows: Tensor, dtype: torch.dtype) -> None:
        self.original, self.changed = (Walk(config, makers, rows, dtype, lean=True) for _ in range(2))

    def embed(self) -> dict[str, Tensor]:
        """Look the rows' words up, in the embedding as it is. Returns its weights by their names in the model."""
        weights = self.original.embed()
        self.changed.hidden = Parts(self.original.hidden)
        give_back()
        return weights

    def blocks(self) -> Iterator[Turn]:
        """Block after block; of either model, one after the other, so that only one is in memory."""
        for layer in range(self.original.model.config.layers):
            sharing, before = self._through_original(layer)
            matrices = [f"{name}.weight" for names in sharing for name in names]
            block = self.changed.enter(layer, without=matrices)
            prefix = f"blocks.{layer}."
            others = [prefix + name for name, _ in block.named_parameters() if name not in matrices]
            yield Turn(prefix, self._layers(layer, sharing, before), others)
            self.changed.go_on(layer)
            self.changed.leave(layer)

    def read(self, name: str) -> Tensor:
        """A weight of the original, fp32, by its name in the model."""
        return self.original.read(name)

    def put(self, name: str, values: Tensor) -> None:
        """What stands for a weight in the changed model, fp32, by its name there; of the block whose turn it is."""
        path, _, kind = name.rpartition(".")
        module = self.changed.model.get_submodule(path)
        lean = type(module) is nn.Linear and kind == "weight"
        setattr(module, kind, nn.Parameter(values.to(self.changed.dtype) if lean else values, requires_grad=False))

    def end(self) -> tuple[dict[str, Tensor], Inputs | None]:
        """Weights of the last norm by their names, and what the head is given."""
        self.original.finish()
        weights = self.changed.finish()
        return weights, _inputs(self.original.hidden, self.changed.hidden)

    def _through_original(self, layer: int) -> tuple[list[list[str]], dict[str, Parts]]:
        """The original's stream goes on through a block.

        Returns: names of linear layers in the order they are computed, those that are given the very same tensor
            together; and what the first of each are given.
        """
        block = self.original.enter(layer)
        calls: list[tuple[str, Tensor]] = []

        def note(name: str, _module: nn.Module, given: tuple[Tensor, ...]) -> None:
            calls.append((name, given[0]))

        linear = [(name, inner) for name, inner in block.named_modules() if type(inner) is nn.Linear]
        handles = [inner.register_forward_pre_hook(partial(note, name)) for name, inner in linear]
        self.original.compute(layer, self.original.hidden[0][:1])
        for handle in handles:
            handle.remove()
        together: dict[int, list[str]] = {}
        for name, x in calls:
            if not any(name in names for names in together.values()):
                together.setdefault(id(x), []).append(name)  # `calls` keeps the tensors, so that no id comes twice
        sharing = list(together.values())
        before = self.original.go_on(layer, [names[0] for names in sharing])
        self.original.leave(layer)
        give_back()
        return sharing, before

    def _layers(
        self, layer: int, sharing: Sequence[list[str]], before: dict[str, Parts]
    ) -> Iterator[tuple[list[str], Inputs | None]]:
        for names in sharing:
            matrices = [f"blocks.{layer}.{name}.weight" for name in names]
            # no name here for the inputs, which are of as many numbers as a block: they end with the caller's
            yield matrices, _inputs(before.pop(names[0]), Parts(_given(self.changed, layer, names[0])))


class _Enough(Exception):
    """What was asked for is known; the rest of a block need not be computed."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def _given(walk: Walk, layer: int, name: str) -> Iterator[Tensor]:
    """What a linear layer is given, part of the stream after part."""

    def stop(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
        raise _Enough(given[0])

    handle = walk.model.blocks.get_submodule(f"{layer}.{name}").register_forward_pre_hook(stop)
    try:
        for x in walk.hidden:
            try:
                walk.compute(layer, x)
            except _Enough as found:
                yield found.x.to(walk.dtype)
    finally:
        handle.remove()


def _inputs(before: Parts, after: Parts) -> Inputs | None:
    """Of what a layer is given in the original and in the changed model, each [..., columns]."""
    products = torch.zeros(after[0].shape[-1], after[0].shape[-1])
    for part in after:
        y = _flat(part)
        products.addmm_(y.T, y)
    give_back()  # what blocks computed on the way: solving takes as much again
    return Inputs(products, _drift(before, after), ROUNDING) if products.any() else None


def _drift(before: Parts, after: Parts) -> Iterator[Tensor]:
    """Rows of the sum over tokens of (inputs in the original - inputs) with the inputs, fp32 [rows, columns] each, in
    the place of those before."""
    columns = after[0].shape[-1]
    at_once = min(max(DRIFT // columns // AIMED, 1) * AIMED, columns)
    place = torch.empty(at_once, columns)
    for start in range(0, columns, at_once):
        chosen = slice(start, start + at_once)
        rows = place[: columns - start].zero_()
        for there, here in zip(before, after, strict=True):
            y = _flat(here)
            rows.addmm_((_flat(there[..., chosen]) - y[:, chosen]).T, y)
        yield rows


def _flat(part: Tensor) -> Tensor:
    """fp32 [tokens, columns]."""
    return part.reshape(-1, part.shape[-1]).float()
