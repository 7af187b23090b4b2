"""A model whose parts are models: fewer layers, heads, channels and features of the same weights, all trained at once.

Each step trains the whole, the smallest part and one part by chance (the sandwich rule, arXiv:1903.05134); parts learn
what the whole says (arXiv:1908.09791). A part is the first rows and columns of each weight, so what matters most should
stand first (`danlu.compress.learning.supernet`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from danlu.errors import DanluError
from danlu.model.config import AnyConfig, ModelConfig
from danlu.model.loss import Taught, linear_distillation
from danlu.model.mixture import Routing
from danlu.model.stored import without_memory
from danlu.train.objective import Loss, StackObjective, Words, routing_penalty, word_head, word_weights
from danlu.train.recipe import ElasticSettings


@dataclass(frozen=True)
class Elastic(StackObjective):
    """Words, of the whole and of its parts. The whole's loss alone is reported.

    Attributes:
        hard: the objective of the whole.
        asked: which parts there are.
    """

    hard: Words
    asked: ElasticSettings

    def hidden(self, model: Any, batch: Any, x: Tensor | None = None, routes: list[Routing] | None = None) -> Tensor:
        """As the hard objective's."""
        return self.hard.hidden(model, batch, x, routes)

    def score(self, model: Any, hidden: Tensor, batch: Any) -> Tensor:
        """Of the whole, in nat."""
        return self.hard.score(model, hidden, batch)

    def __call__(self, model: Any, batch: Any) -> Loss:
        """Raises DanluError where the model cannot have such parts. Chance is torch's, seeded by the step's number."""
        parts = parts_of(model.config, self.asked)
        routes: list[Routing] = []
        hidden = self.hard.hidden(model, batch, routes=routes)
        penalty = routing_penalty(model, routes, batch)
        if model.training:
            head, weight = word_head(model)
            bias = None if head.bias is None else head.bias.detach()
            taught = Taught(head.features(hidden).detach().flatten(0, 1), weight.detach(), bias)
            drawn = parts[int(torch.randint(len(parts) - 1, ()))]
            for part in (parts[0], drawn):
                penalty = penalty + self._part(model, part, batch, taught)
        return Loss(self.score(model, hidden, batch), batch.count, penalty)

    def _part(self, model: Any, part: ModelConfig, batch: Any, taught: Taught) -> Tensor:
        weights = part_weights(dict(model.named_parameters()), model.config, part)
        called = {f"model.{name}": weight for name, weight in weights.items()}
        features, weight = functional_call(_reader(part, self.hard), called, (batch,))
        targets, bias = batch.targets.flatten(), weights.get("head.bias")
        return linear_distillation(
            features, weight, targets, bias, taught, temperature=1.0, alpha=1.0, weights=word_weights(batch)
        )


class _Reader(nn.Module):
    """A part without weights of its own: what its head multiplies, [B * T, width], and by what."""

    def __init__(self, part: ModelConfig, hard: Words) -> None:
        super().__init__()
        self.model = without_memory(part)
        self.hard = hard

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        hidden = self.hard.hidden(self.model, batch)
        head, weight = word_head(self.model)
        return head.features(hidden).flatten(0, 1), weight


@cache
def _reader(part: ModelConfig, hard: Words) -> _Reader:
    return _Reader(part, hard)


@cache
def parts_of(config: AnyConfig, asked: ElasticSettings) -> tuple[ModelConfig, ...]:
    """All shapes that are asked for, the whole among them, from the fewest weights in blocks to the most.

    Raises DanluError where one cannot be had, or there is none but the whole.
    """
    if not isinstance(config, ModelConfig) or config.experts is not None or config.norm != "rms":
        what = "parts are had of a stack with RMSNorm and without experts"
        raise DanluError(what, where="elastic", fix="take another base, say a Llama")
    choices = product(
        {*asked.layers, config.layers},
        {*asked.heads, config.heads},
        {*asked.channels, config.feedforward_width},
        {*asked.width, config.width},
    )
    parts = [part_config(config, *choice) for choice in choices]
    if len(parts) == 1:
        what = "every size named is the model's own"
        raise DanluError(what, where="elastic", fix="name smaller layers, heads, channels or width")
    return tuple(sorted(parts, key=lambda part: (block_weights(part), part.layers, part.width, part.heads)))


def part_config(config: ModelConfig, layers: int, heads: int, channels: int, width: int) -> ModelConfig:
    """The shape of a part. Raises DanluError where it cannot be had."""
    group = config.heads // config.kv_heads
    sizes = {
        "layers": (layers, config.layers, 1),
        "heads": (heads, config.heads, group),
        "channels": (channels, config.feedforward_width, 1),
        "width": (width, config.width, heads),
    }
    for name, (size, whole, multiple) in sizes.items():
        if not 0 < size <= whole or size % multiple:
            multiples = f" and a multiple of {multiple}" if multiple > 1 else ""
            what = f"{name} {size:,} cannot be had: the model has {whole:,}"
            raise DanluError(what, where="elastic", fix=f"name a number from 1 to {whole:,}{multiples}")
    kept = kept_layers(config.layers, layers)
    everywhere = tuple(new for new, old in enumerate(kept) if old in config.global_layers)
    return replace(
        config,
        layers=layers,
        heads=heads,
        kv_heads=heads // group,
        feedforward_width=channels,
        width=width,
        global_layers=everywhere,
    )


def kept_layers(whole: int, part: int) -> list[int]:
    """The layers of a part: evenly spread, the first and the last among them."""
    return [round(layer * (whole - 1) / max(part - 1, 1)) for layer in range(part)]


def part_weights(weights: Mapping[str, Tensor], config: ModelConfig, part: ModelConfig) -> dict[str, Tensor]:
    """The weights of a part, by their names in it: views of the whole's, through which gradients go."""
    kept, made = kept_layers(config.layers, part.layers), {}
    for name, weight in without_memory(part).named_parameters():
        stem, _, rest = name.partition(".")
        number, _, inner = rest.partition(".")
        whole = weights[f"blocks.{kept[int(number)]}.{inner}" if stem == "blocks" else name]
        made[name] = whole[tuple(slice(size) for size in weight.shape)]
    return made


def block_weights(part: ModelConfig) -> int:
    """Numbers in the matrices of all blocks."""
    attention = 2 * (part.heads + part.kv_heads) * part.head_width
    return part.layers * part.width * (attention + (3 if part.gated else 2) * part.feedforward_width)
