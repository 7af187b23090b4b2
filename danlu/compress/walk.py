"""A decoder walked block by block: weights are read when it is their block's turn and dropped after it, so that memory
does not grow with the number of layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from danlu.model.config import ModelConfig
from danlu.model.sight import Batch, Sight, self_sight
from danlu.model.stored import Make, without_memory
from danlu.model.transformer import Decoder

ROWS = 4  # computed at once


@dataclass
class Products:
    """How the inputs of linear layers go together: the sum over tokens of their products, fp32 [inputs, inputs].

    Layers that are given the very same tensor share one.
    """

    found: dict[str, Tensor] = field(default_factory=dict)
    _last: tuple[Tensor, str] | None = None

    def watch(self, module: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        """Add up what every linear layer of a module is given from now on, until the handles are removed."""
        linear = ((name, inner) for name, inner in module.named_modules() if type(inner) is nn.Linear)
        return [inner.register_forward_pre_hook(partial(self._add, name)) for name, inner in linear]

    def _add(self, name: str, _module: nn.Module, given: tuple[Tensor, ...]) -> None:
        x = given[0]
        if self._last is not None and self._last[0] is x:
            self.found[name] = self.found[self._last[1]]
            return
        self._last = (x, name)
        flat = x.reshape(-1, x.shape[-1]).float()
        if name not in self.found:
            self.found[name] = torch.zeros(flat.shape[1], flat.shape[1])
        self.found[name].addmm_(flat.T, flat)


class Walk:
    """Calibration rows on their way through a model that is on disk.

    Args:
        config: of the decoder.
        makers: read its weights, by name, in fp32.
        rows: int64 [rows, T], token ids.

    Attributes:
        model: on the meta device, but for the part whose turn it is.
        hidden: the stream between blocks, fp32 [ROWS, T, width] each.
    """

    def __init__(self, config: ModelConfig, makers: Mapping[str, Make], rows: Tensor) -> None:
        made = without_memory(config)
        assert isinstance(made, Decoder)
        self.model, self._makers = made.eval(), makers
        self._places = torch.arange(rows.shape[1]).expand(ROWS, -1)
        self._rows = rows.split(ROWS)
        self.hidden: list[Tensor] = []

    def embed(self) -> dict[str, Tensor]:
        """Look the rows' words up. Returns the embedding's weights by their names in the model."""
        weights = self._fill(self.model.embedding, "embedding.")
        self.hidden = [self.model.embedding(part, self._places[: len(part)]) for part in self._rows]
        self._drop(self.model.embedding)
        return weights

    def blocks(self) -> Iterator[tuple[str, nn.Module, Products]]:
        """Each block with its weights, its name, and what its linear layers are given.

        Weights that are changed before the next one is asked for are those that the rows go on through.
        """
        sights: dict[tuple[bool, int], tuple[Sight]] = {}
        for layer, block in enumerate(self.model.blocks.children()):
            self._fill(block, f"blocks.{layer}.")
            products = Products()
            handles = products.watch(block)
            self._through(layer, block, sights)
            for handle in handles:
                handle.remove()
            yield f"blocks.{layer}.", block, products
            self.hidden = self._through(layer, block, sights)
            self._drop(block)

    def end(self) -> tuple[dict[str, Tensor], Tensor]:
        """Weights of the last norm and the head by their names, and the products of what the head is given."""
        weights = {}
        if self.model.norm is not None:
            weights = self._fill(self.model.norm, "norm.")
            self.hidden = [self.model.norm(x) for x in self.hidden]
        given = torch.zeros(self.model.config.width, self.model.config.width)
        for x in self.hidden:
            flat = x.reshape(-1, x.shape[-1])
            given.addmm_(flat.T, flat)
        head = {name: make() for name, make in self._makers.items() if name.startswith("head.")}
        return weights | head, given

    def _through(self, layer: int, block: nn.Module, sights: dict[tuple[bool, int], tuple[Sight]]) -> list[Tensor]:
        made = []
        for x in self.hidden:
            key = (self.model.config.window(layer) is not None, len(x))
            if key not in sights:
                batch = Batch(self._places[: len(x)], None, None, None)
                sights[key] = (self_sight(self.model.config, layer, batch, None),)
            made.append(block(x, sights[key]))
        return made

    def _fill(self, module: nn.Module, prefix: str) -> dict[str, Tensor]:
        weights = {name: self._makers[prefix + name]() for name in module.state_dict()}
        module.load_state_dict(weights, assign=True)
        return {prefix + name: weight for name, weight in weights.items()}

    @staticmethod
    def _drop(module: nn.Module) -> None:
        module.to("meta")
