"""A stack walked block by block: weights are read when it is their block's turn and dropped after it, so that memory
does not grow with the number of layers; nor does it with the text's length (parts.py)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from danlu.compress.parts import Parts
from danlu.model.config import ModelConfig
from danlu.model.sight import Batch, Sight, self_sight
from danlu.model.stored import Make, without_memory
from danlu.model.transformer import Decoder, Encoder

ROWS = 4  # computed at once, at most
NUMBERS = 2**23  # between the two halves of a feed-forward at once, where a row alone has no more
NOTHING: Mapping[str, Tensor] = MappingProxyType({})


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
        config: of a decoder, or of an encoder of text.
        makers: read its weights, by name, in fp32.
        rows: int64 [rows, T], token ids.
        dtype: that blocks multiply in; the stream between them stays fp32.
        lean: weights of linear layers are held in that dtype, which changes no product; nobody else may read them.

    Attributes:
        model: on the meta device, but for the part whose turn it is.
        dtype: see above.
        hidden: the stream between blocks, fp32 [rows computed at once, T, width] each.
    """

    def __init__(
        self,
        config: ModelConfig,
        makers: Mapping[str, Make],
        rows: Tensor,
        dtype: torch.dtype = torch.float32,
        lean: bool = False,
    ) -> None:
        made = without_memory(config)
        assert isinstance(made, Decoder | Encoder)
        self.model, self._makers, self.dtype, self._lean = made.eval(), makers, dtype, lean
        at_once = min(max(NUMBERS // (rows.shape[1] * config.feedforward_width), 1), ROWS)
        self._places = torch.arange(rows.shape[1]).expand(at_once, -1)
        self._rows = rows.split(at_once)
        self._sights: dict[tuple[bool, int], tuple[Sight]] = {}
        self.hidden = Parts()

    def embed(self, other: Mapping[str, Tensor] = NOTHING) -> dict[str, Tensor]:
        """Look the rows' words up. Returns the embedding's weights by their names in the model.

        Args: other: weights by their names in the embedding that are taken instead of those on disk.
        """
        weights = self._fill(self.model.embedding, "embedding.", other)
        self.hidden = Parts(self.model.embedding(part, self._places[: len(part)]) for part in self._rows)
        self._drop(self.model.embedding)
        return weights

    def blocks(self) -> Iterator[tuple[str, nn.Module, Products]]:
        """Each block with its weights, its name, and what its linear layers are given.

        Weights that are changed before the next one is asked for are those that the rows go on through.
        """
        for layer in range(self.model.config.layers):
            block, products = self.enter(layer), Products()
            handles = products.watch(block)
            for x in self.hidden:
                self.compute(layer, x)
            for handle in handles:
                handle.remove()
            yield f"blocks.{layer}.", block, products
            self.go_on(layer)
            self.leave(layer)

    def enter(self, layer: int, without: Collection[str] = ()) -> nn.Module:
        """A block, its weights read, but for those of these names in it."""
        block = self.model.blocks.get_submodule(str(layer))
        self._fill(block, f"blocks.{layer}.", dict.fromkeys(without))
        return block

    def read(self, name: str) -> Tensor:
        """A weight as it is on disk, fp32, by its name in the model."""
        return self._makers[name]()

    def compute(self, layer: int, x: Tensor) -> Tensor:
        """What the block makes of a part of the stream, fp32 [B, T, width] both."""
        key = (self.model.config.window(layer) is not None, len(x))
        if key not in self._sights:
            batch = Batch(self._places[: len(x)], None, None, None)
            self._sights[key] = (self_sight(self.model.config, layer, batch, None),)
        with torch.autocast("cpu", self.dtype, self.dtype != torch.float32):
            made: Tensor = self.model.blocks.get_submodule(str(layer))(x, self._sights[key])
        return made.float()

    def go_on(self, layer: int, names: Sequence[str] = ()) -> dict[str, Parts]:
        """The stream goes on through the block as it now is.

        Returns: what linear layers of these names were given, part of the stream after part, in the dtype that they
            multiply in.
        """
        block = self.model.blocks.get_submodule(str(layer))
        given = {name: Parts() for name in names}

        def note(name: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            given[name].append(inputs[0].to(self.dtype))

        handles = [block.get_submodule(name).register_forward_pre_hook(partial(note, name)) for name in names]
        for number, x in enumerate(self.hidden):
            self.hidden[number] = self.compute(layer, x)
        for handle in handles:
            handle.remove()
        return given

    def leave(self, layer: int) -> None:
        """A block's weights are dropped."""
        self._drop(self.model.blocks.get_submodule(str(layer)))

    def end(self) -> tuple[dict[str, Tensor], Tensor]:
        """Weights of the last norm and the head by their names, and the products of what the head is given."""
        weights = self.finish() | dict(self.heads())
        given = torch.zeros(self.model.config.width, self.model.config.width)
        for x in self.hidden:
            flat = x.reshape(-1, x.shape[-1])
            given.addmm_(flat.T, flat)
        return weights, given

    def finish(self) -> dict[str, Tensor]:
        """The stream goes through the last norm. Its weights by their names."""
        weights: dict[str, Tensor] = {}
        if self.model.norm is not None:
            weights = self._fill(self.model.norm, "norm.")
            for number, x in enumerate(self.hidden):
                self.hidden[number] = self.model.norm(x)
        return weights

    def heads(self) -> Iterator[tuple[str, Tensor]]:
        """Weights of the head as they are on disk, fp32, by their names in the model; none where it is tied."""
        return ((name, make()) for name, make in self._makers.items() if name.startswith("head."))

    def _fill(self, module: nn.Module, prefix: str, other: Mapping[str, Tensor | None] = NOTHING) -> dict[str, Tensor]:
        """Weights, by their names in the model, from disk, or others; where that is None they are not filled in."""
        linear = {f"{name}.weight" for name, inner in module.named_modules() if type(inner) is nn.Linear}
        lean = linear if self._lean else set()
        weights: dict[str, Tensor] = {}
        for name in module.state_dict():
            weight = other[name] if name in other else self._makers[prefix + name]()
            if weight is not None:
                weights[name] = weight.to(self.dtype) if name in lean else weight
        module.load_state_dict(weights, strict=False, assign=True)
        return {prefix + name: weight for name, weight in weights.items()}

    @staticmethod
    def _drop(module: nn.Module) -> None:
        module.to("meta")
