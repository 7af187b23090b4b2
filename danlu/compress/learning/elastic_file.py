"""A model as a GGUF file whose blocks do not know of each other, and what a part of the model is of that file."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch

from danlu.compress.learning.supernet import sizes
from danlu.compress.quantizing.formats.known import FORMATS, Format, format_of
from danlu.compress.quantizing.rounding import round_plainly
from danlu.console import progress
from danlu.device.cut import ANY_BLOCK, Cut
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint
from danlu.model.config import ModelConfig
from danlu.model.families.known import family_for
from danlu.model.families.metadata import write_metadata
from danlu.model.gguf import Packed, write_weights
from danlu.model.stored import without_memory
from danlu.train.objectives.elastic import kept_layers

HEAD = "q8_0"  # of embedding and head, whose errors reach the probabilities directly
FORMS = {name: form for name, form in FORMATS.items() if form.block == 32}  # narrow blocks: parts end at their borders


def name_of(part: ModelConfig) -> str:
    """What a setting is called: l4-h8-c512-w256."""
    return "-".join(f"{letter}{size}" for letter, size in zip("lhcw", sizes(part), strict=True))


def check_form(type: str) -> Format:
    """A number format by its name. Raises DanluError where files of it cannot be cut between any 32 columns."""
    form = format_of(type)
    if type.lower() not in FORMS:
        what = f"{type} has blocks of {form.block} columns, between which most parts do not end"
        raise DanluError(what, where="--type", fix=f"take one of {', '.join(FORMS)}")
    return form


def cut_of(config: ModelConfig, part: ModelConfig, form: Format) -> Cut | None:
    """What a part is of the whole's file; None for the whole itself.

    Raises DanluError where its rows do not end between blocks, or llama.cpp would compute it otherwise.
    """
    family, known = family_for(part), write_metadata(config)
    said = write_metadata(part)
    columns = {"width": part.width, "heads": part.heads * part.head_width, "channels": part.feedforward_width}
    for name, count in columns.items():
        if count % form.block:
            per_head = f" of {part.head_width} each, {count} columns," if name == "heads" else ""
            size = part.heads if name == "heads" else count
            shared = f"{form.kind.name} shares a step over {form.block} columns"
            what = f"{size:,} {name}{per_head} cannot be cut off: {shared}"
            raise DanluError(what, where=f"--{name}", fix=f"take sizes whose columns are a multiple of {form.block}")
    shapes: dict[str, tuple[int, ...]] = {}
    for name, weight in without_memory(part).named_parameters():
        place = family.gguf_names.place(name)
        if place is None or place.parts > 1 or place.transposed or place.ones:
            what = f"GGUF has no tensor for {name} alone, as rows of outputs"
            raise DanluError(what, where="elastic", fix="take another base, say a Llama")
        shapes[place.name.replace(f"blk.{name.split('.')[1]}.", ANY_BLOCK)] = tuple(weight.shape)
    if part == config:
        return None
    return Cut(
        layers=tuple(kept_layers(config.layers, part.layers)),
        shapes=shapes,
        metadata={key: value for key, value in said.items() if known.get(key) != value},
        absent=tuple(key for key in known if key not in said),
    )


def write_whole(whole: Checkpoint, form: Format, out: Path) -> None:
    """Write a model as GGUF, each block of a matrix rounded by itself, so that what is cut off takes nothing along."""
    weights: dict[str, torch.Tensor | Packed] = {}
    with progress("round", len(whole.model.makers()), "weights") as tick, torch.inference_mode():
        for name, make in whole.model.makers(torch.float32).items():
            weight, kind = make(), form if name.startswith("blocks.") else FORMS[HEAD]
            rounded = weight.dim() > 1
            weights[name] = Packed(kind.kind, round_plainly(weight, kind).packed) if rounded else weight
            tick.advance(1)
    file_type = gguf.LlamaFileType[f"MOSTLY_{form.kind.name}"]
    write_weights(whole.config, weights, whole.tokenizer, out, file_type=file_type)
