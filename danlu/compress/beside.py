"""Two walks side by side: through a model as it is, and through the same model as it is changed layer by layer.

What a layer is to give is what it gives in the original; what it is given is what the changed layers before it make.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from danlu.compress.compensate import ROUNDING, Inputs
from danlu.compress.walk import Walk
from danlu.model.config import ModelConfig
from danlu.model.stored import Make

HELD = 2**28  # bytes, at most, of what a block's layers are given in the original


@dataclass(frozen=True)
class Turn:
    """A block whose turn it is.

    Attributes:
        prefix: of its weights' names in the model.
        block: the one that is changed.
        layers: names of its linear layers that are given the very same tensor, in the order they are computed, and
            their inputs, found through all that was changed before they are asked for; None where only zeros came.
    """

    prefix: str
    block: nn.Module
    layers: Iterator[tuple[list[str], Inputs | None]]


class Beside:
    """Calibration rows on their way through both. See `Walk`."""

    def __init__(self, config: ModelConfig, makers: Mapping[str, Make], rows: Tensor, dtype: torch.dtype) -> None:
        self.original, self.changed = (Walk(config, makers, rows, dtype, lean) for lean in (True, False))

    def embed(self) -> dict[str, Tensor]:
        """Look the rows' words up, in the embedding as it is. Returns its weights by their names in the model."""
        weights = self.original.embed()
        self.changed.hidden = self.original.hidden
        return weights

    def blocks(self) -> Iterator[Turn]:
        """Block after block."""
        for layer in range(self.original.model.config.layers):
            self.original.enter(layer)
            block = self.changed.enter(layer)
            sharing = self._sharing(layer, block)
            known = self._known(layer, [names[0] for names in sharing])
            yield Turn(f"blocks.{layer}.", block, self._layers(layer, sharing, known))
            for walk in (self.original, self.changed) if known is None else (self.changed,):
                walk.go_on(layer)
            self.original.leave(layer)
            self.changed.leave(layer)

    def end(self) -> tuple[dict[str, Tensor], Inputs | None]:
        """Weights of the last norm and the head by their names, and what the head is given."""
        self.original.finish()
        weights = self.changed.finish()
        return weights, _inputs(zip(self.original.hidden, self.changed.hidden, strict=True))

    def _known(self, layer: int, names: Sequence[str]) -> dict[str, list[Tensor]] | None:
        """What layers are given in the original, which goes on through the block once for all of them.

        None where that would take too much memory: it is then computed again for each layer, when it is asked for.
        """
        block = self.original.model.blocks.get_submodule(str(layer))
        columns = sum(block.get_parameter(f"{name}.weight").shape[1] for name in names)
        tokens = sum(x.shape[0] * x.shape[1] for x in self.original.hidden)
        held = tokens * columns * self.original.dtype.itemsize
        return self.original.go_on(layer, names) if held <= HELD else None

    def _layers(
        self, layer: int, sharing: Sequence[list[str]], known: dict[str, list[Tensor]] | None
    ) -> Iterator[tuple[list[str], Inputs | None]]:
        for names in sharing:
            name = names[0]
            before = _given(self.original, layer, name) if known is None else known.pop(name)
            yield names, _inputs(zip(before, _given(self.changed, layer, name), strict=True))

    def _sharing(self, layer: int, block: nn.Module) -> list[list[str]]:
        """Names of linear layers in the order they are computed, those that are given the very same tensor together."""
        calls: list[tuple[str, Tensor]] = []

        def note(name: str, _module: nn.Module, given: tuple[Tensor, ...]) -> None:
            calls.append((name, given[0]))

        linear = [(name, inner) for name, inner in block.named_modules() if type(inner) is nn.Linear]
        handles = [inner.register_forward_pre_hook(partial(note, name)) for name, inner in linear]
        self.changed.compute(layer, self.changed.hidden[0][:1])
        for handle in handles:
            handle.remove()
        together: dict[int, list[str]] = {}
        for name, x in calls:
            if not any(name in names for names in together.values()):
                together.setdefault(id(x), []).append(name)  # `calls` keeps the tensors, so that no id comes twice
        return list(together.values())


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


def _inputs(pairs: Iterable[tuple[Tensor, Tensor]]) -> Inputs | None:
    """Of what a layer is given in the original and in the changed model, each [..., columns]."""
    products = drift = torch.zeros(0)
    for before, after in pairs:
        x, y = (each.reshape(-1, each.shape[-1]).float() for each in (before, after))
        if not len(products):
            products, drift = (torch.zeros(x.shape[1], x.shape[1]) for _ in range(2))
        products.addmm_(y.T, y)
        drift.addmm_((x - y).T, y)
    return Inputs(products, drift, ROUNDING) if products.any() else None
