"""A smaller model of the same family: fewer layers, heads, feed-forward channels and features of the stream.

What a calibration text shows to matter least goes: layers by how little they turn the stream (ShortGPT,
arXiv:2403.03853), heads, channels and features as `danlu.compress.pruning.fitted` says.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from danlu.artifact import Figures, figure
from danlu.compress.product import Making, Product, Shelf, Source, start_walk, workplace
from danlu.compress.pruning.fitted import drop_features, drop_inner
from danlu.compress.quantizing.quantizer import calibration_rows
from danlu.console import progress
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint
from danlu.model.config import ModelConfig
from danlu.model.families.known import family_for


@dataclass(frozen=True)
class Shape:
    """What a model is to have; None where it stays.

    Attributes:
        layers: blocks.
        heads: query heads of every layer. Whole groups go, with the key/value head that they share.
        channels: inner features of every feed-forward.
        width: features of the stream.
    """

    layers: int | None = None
    heads: int | None = None
    channels: int | None = None
    width: int | None = None


def shrink(
    checkpoint: Checkpoint,
    shape: Shape,
    calibration: str,
    out: Path,
    tokens: int = 16_384,
    dtype: torch.dtype = torch.float32,
) -> Product:
    """Make a decoder smaller and write a Hugging Face directory.

    Layers go first, then heads and channels, then features: each is judged on what the steps before left.

    Args:
        checkpoint: any decoder; of a mixture of experts only layers and heads can go.
        shape: what it is to have.
        calibration: a text like what the model is for.
        out: the directory.
        tokens: of the text, at most.
        dtype: of the stored weights.

    Raises DanluError where the shape cannot be had, naming the nearest that can, or the text is too short.
    """
    before = Source.of(checkpoint)
    smaller = check_shape(before.config, shape)
    making = Making("shrink", "compress/pruning/structured", asdict(shape) | {"tokens": tokens}, checkpoint)
    rows = calibration_rows(checkpoint, calibration, tokens)
    figures: Figures = {"parameters_before": figure(before.parameters, "parameters")}
    with workplace(out) as folder, torch.inference_mode():
        source = before
        if shape.layers is not None:
            source, influence = drop_layers(source, rows, shape.layers)
            figures["layers"] = influence
        if shape.heads is not None or shape.channels is not None:
            source = drop_inner(source, rows, smaller, Shelf.at(folder / "inner"))
        if shape.width is not None:
            source = drop_features(source, rows, shape.width, Shelf.at(folder / "width"))
        shelf = Shelf.at(folder / "all")
        shelf.keep_others(source)
        making.write(source.config, shelf, checkpoint.tokenizer, out, dtype)
    return making.sign(out, figures | {"parameters": figure(source.parameters, "parameters")})


def check_shape(config: ModelConfig, shape: Shape) -> ModelConfig:
    """The configuration without its layers gone yet. Raises DanluError where a shape cannot be had."""
    asked = {name: (count, has) for name, count, has in _asked(config, shape) if count is not None}
    if not asked:
        raise DanluError("nothing is to be made smaller", fix="name --layers, --heads, --channels or --width")
    for name, (count, has) in asked.items():
        if not 0 < count <= has:
            raise DanluError(f"{count:,} cannot be had of {has:,}", where=f"--{name}", fix=f"name 1 to {has:,}")
    if config.experts is not None and not {"channels", "width"}.isdisjoint(asked):
        what = "channels and features of a mixture of experts cannot go: each expert sees other tokens"
        raise DanluError(what, fix="drop layers or heads")
    if shape.width is not None and ((config.norm, config.norm_place) != ("rms", "pre") or config.embedding_norm):
        what = "features can go where RMSNorm stands before what reads them, here norms are other ones"
        raise DanluError(what, where="--width", fix="drop layers, heads or channels")
    group = config.heads // config.kv_heads
    heads, width = shape.heads or config.heads, shape.width or config.width
    if heads % group:
        what = f"{heads} heads cannot be had: {group} at a time share a key/value head"
        raise DanluError(what, where="--heads", fix=_multiples(heads, group))
    if width % heads:
        what = f"{width} features and {heads} heads: transformers wants a multiple of the heads"
        raise DanluError(what, where="--width", fix=_multiples(width, heads))
    channels = shape.channels or config.feedforward_width
    smaller = replace(config, heads=heads, kv_heads=heads // group, feedforward_width=channels)
    family_for(replace(smaller, width=width))
    return smaller


def _multiples(count: int, of: int) -> str:
    """The nearest that can be had."""
    near = (count // of * of, -(-count // of) * of)
    return "name " + " or ".join(str(one) for one in near if one)


def _asked(config: ModelConfig, shape: Shape) -> list[tuple[str, int | None, int]]:
    return [
        ("layers", shape.layers, config.layers),
        ("heads", shape.heads, config.heads),
        ("channels", shape.channels, config.feedforward_width),
        ("width", shape.width, config.width),
    ]


# --- Layers ---------------------------------------------------------------------------------------------------------


def drop_layers(source: Source, rows: Tensor, keep: int) -> tuple[Source, Figures]:
    """The layers that turn the stream least are gone; and how much each turned it."""
    walk, before = start_walk(source, rows), list[Tensor]()
    influence: list[float] = []
    walk.embed()
    with progress("layers", source.config.layers, "blocks") as tick:
        for _ in walk.blocks():
            if before:
                influence.append(_turned(before, walk.hidden))
            before = list(walk.hidden)
            tick.advance(1)
    influence.append(_turned(before, walk.hidden))
    ranked = sorted(range(len(influence)), key=lambda layer: influence[layer])
    kept = sorted(ranked[len(influence) - keep :])
    makers = {name: make for name, make in source.makers.items() if not name.startswith("blocks.")}
    for new, old in enumerate(kept):
        own = f"blocks.{old}."
        makers |= {
            f"blocks.{new}.{name.removeprefix(own)}": make
            for name, make in source.makers.items()
            if name.startswith(own)
        }
    figures = {
        str(layer): figure(value, "1 - cosine", by="block influence, arXiv:2403.03853") | {"kept": layer in kept}
        for layer, value in enumerate(influence)
    }
    return Source(_of_layers(source.config, kept), makers), figures


def _turned(before: Iterable[Tensor], after: Iterable[Tensor]) -> float:
    """1 - the mean cosine of the stream before and after a block."""
    cosines = [nn.functional.cosine_similarity(x, y, dim=-1).flatten() for x, y in zip(before, after, strict=True)]
    return 1 - float(torch.cat(cosines).mean())


def _of_layers(config: ModelConfig, kept: list[int]) -> ModelConfig:
    """The configuration of these layers alone."""
    new = {old: number for number, old in enumerate(kept)}
    everywhere = tuple(new[old] for old in config.global_layers if old in new)
    experts = config.experts
    if experts is not None and experts.layers is not None:
        experts = replace(experts, layers=tuple(new[old] for old in experts.layers if old in new))
    return replace(config, layers=len(kept), global_layers=everywhere, experts=experts)
