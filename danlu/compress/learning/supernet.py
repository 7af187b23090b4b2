"""A model in order, its first heads, channels and features being those that matter most, and what is cut out of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from danlu.compress.pruning.fitted import READERS, WRITERS
from danlu.compress.quantizing.mixes import PLAIN, formats_for, head_of, matrices_of
from danlu.device.workload import Matrix, Workload
from danlu.model.checkpoint import Checkpoint, save_checkpoint
from danlu.model.config import ModelConfig
from danlu.model.stored import without_memory
from danlu.model.transformer import Decoder
from danlu.train.objectives.elastic import part_weights

NORMS = ("attention_norm", "feedforward_norm", "attention_norm_after", "feedforward_norm_after", "norm")


def put_in_order(model: Decoder) -> None:
    """Reorder heads, channels and features of a model in place, those with the largest weights first.

    A channel counts by the product of the norms of what it reads and of what it writes, a group of heads by the same of
    values and output, a feature of the stream by what all matrices read of it, each over its whole. What the model says
    stays the same but for rounding. Only models with RMSNorm, which does not know the order of features.
    """
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for layer in range(model.config.layers):
            _order_inner(weights, f"blocks.{layer}.", model.config)
        _order_features(weights)


def in_order(model: Checkpoint, out: Path) -> Checkpoint:
    """A model with what matters most in front, as a directory that is written once."""
    if not (out / "config.json").is_file():
        net = model.load()
        put_in_order(net)
        save_checkpoint(net, model.tokenizer, out)
    return Checkpoint.open(out)


def _order_inner(weights: Mapping[str, Tensor], prefix: str, config: ModelConfig) -> None:
    down = weights[f"{prefix}feedforward.down.weight"]
    channels = (down.norm(dim=0) * weights[f"{prefix}feedforward.up.weight"].norm(dim=1)).argsort(descending=True)
    down.copy_(down[:, channels])
    for name in ("feedforward.gate", "feedforward.up"):
        _take(weights, prefix + name, channels)
    group, width = config.heads // config.kv_heads, config.head_width
    output = weights[f"{prefix}attention.output.weight"]
    written = output.view(len(output), config.kv_heads, -1).norm(dim=(0, 2))
    read = weights[f"{prefix}attention.value.weight"].view(config.kv_heads, -1).norm(dim=1)
    order = (written * read).argsort(descending=True)
    queries, keys = _places(order, group * width), _places(order, width)
    output.copy_(output[:, queries])
    _take(weights, f"{prefix}attention.query", queries)
    for name in ("attention.key", "attention.value"):
        _take(weights, prefix + name, keys)


def _order_features(weights: Mapping[str, Tensor]) -> None:
    read = [weight for name, weight in weights.items() if name.endswith(tuple(f"{one}.weight" for one in READERS))]
    ends = [weights[name] for name in ("embedding.tokens.weight", "head.weight") if name in weights]
    shares = torch.stack([weight.norm(dim=0) / weight.norm() for weight in [*read, *ends]]).sum(0)
    order = shares.argsort(descending=True)
    for name, weight in weights.items():
        stem, _, kind = name.rpartition(".")
        if stem.endswith(WRITERS) or stem.rpartition(".")[2] in NORMS:
            weight.copy_(weight[order])
        elif weight.dim() == 2 and kind == "weight":
            weight.copy_(weight[:, order])


def _take(weights: Mapping[str, Tensor], name: str, rows: Tensor) -> None:
    """Reorder the rows of a layer's weight and bias, where it has them."""
    for kind in ("weight", "bias"):
        if f"{name}.{kind}" in weights:
            weights[f"{name}.{kind}"].copy_(weights[f"{name}.{kind}"][rows])


def _places(order: Tensor, width: int) -> Tensor:
    """The rows of groups of so many, in this order."""
    return (order[:, None] * width + torch.arange(width)).flatten()


def part_model(model: Decoder, part: ModelConfig) -> Decoder:
    """A part of a model, as a model of its own that shares its memory."""
    made = without_memory(part)
    assert isinstance(made, Decoder)
    made.load_state_dict(part_weights(dict(model.named_parameters()), model.config, part), assign=True)
    return made.eval().requires_grad_(False)


def save_part(whole: Checkpoint, part: ModelConfig, out: Path) -> Checkpoint:
    """Write a part of a model as an ordinary Hugging Face directory."""
    save_checkpoint(part_model(whole.load(), part), whole.tokenizer, out)
    return Checkpoint.open(out)


def sizes(part: ModelConfig) -> tuple[int, int, int, int]:
    """Layers, query heads, channels and width: what parts differ in."""
    return part.layers, part.heads, part.feedforward_width, part.width


def workload(part: ModelConfig, form: str) -> Workload:
    """What a decoder asks of a device for a token, its matrices stored as `danlu compress quantize --type` does."""
    shapes = matrices_of(part)
    types = {name: PLAIN if kind is None else kind.kind.name.lower() for name, _, kind in formats_for(part, form)}
    used = [name for name in shapes if name.startswith("blocks.") or name == head_of(shapes)]
    matrices = tuple(Matrix(types[name], *shapes[name]) for name in used)
    return Workload(matrices, part.layers, part.heads * part.head_width, part.vocab_size)
