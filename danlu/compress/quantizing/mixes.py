"""Which number format each matrix of a model gets."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import gguf
import torch
from torch import Tensor

from danlu.compress.quantizing.formats.known import FORMATS, Format, fitting, format_of
from danlu.errors import DanluError, nearest
from danlu.gguf_header import read_header
from danlu.model.checkpoint import Checkpoint
from danlu.model.config import ModelConfig
from danlu.model.families.known import family_for
from danlu.model.gguf import EXACT, Packed, told_bytes
from danlu.model.stored import without_memory

END = "q6_k"  # of the head, where one type is asked for: its errors reach the probabilities directly
PLAIN = "f32"


def matrices(checkpoint: Checkpoint) -> Mapping[str, tuple[int, ...]]:
    """Names in the model and shapes of all that can be rounded: vectors, routers, learned positions stay fp32."""
    return matrices_of(checkpoint.config)


@lru_cache(maxsize=16)  # a search asks several times of each shape
def matrices_of(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """The same of a model that need not be there."""
    names = family_for(config).gguf_names
    shapes = {name: tuple(weight.shape) for name, weight in without_memory(config).state_dict().items()}
    return {
        name: shape
        for name, shape in shapes.items()
        if len(shape) > 1 and not name.endswith("bias") and not (names.theirs(name) or "").endswith(EXACT)
    }


def head_of(names: Collection[str]) -> str:
    """The matrix that logits are made with: the embedding's own, where the head has none."""
    return "head.weight" if "head.weight" in names else "embedding.tokens.weight"


def one_type(names: Collection[str], type: str) -> dict[str, str]:
    """Every matrix in one type, but for the head, which gets Q6_K."""
    return {name: END if name == head_of(names) else type for name in names}


def types_of(path: Path, checkpoint: Checkpoint) -> dict[str, str]:
    """The types that a GGUF file of the same model gives to its matrices.

    Raises DanluError where the file holds a type that weights cannot be rounded to here, or another model's matrices.
    """
    names = family_for(checkpoint.config).gguf_names
    found = {
        ours.ours: gguf.GGMLQuantizationType(tensor.type).name.lower()
        for tensor in read_header(path).tensors
        for ours in names.ours(tensor.name) or ()
    }
    wanted = matrices(checkpoint)
    missing = [name for name in wanted if name not in found]
    if missing:
        what = f"holds no {names.theirs(missing[0]) or missing[0]}, which this model has"
        raise DanluError(what, where=path, fix="take a GGUF file of the same model")
    return {name: found[name] for name in wanted}


def formats_for(config: ModelConfig, types: str | Mapping[str, str]) -> Iterator[tuple[str, str, Format | None]]:
    """Each matrix of a model, the type it was asked for, and the format it gets; None for fp32.

    Args:
        types: one type for all (see `one_type`), or one for each matrix by its name in the model; f32 is one too.

    A format whose blocks the rows do not fill is replaced as llama.cpp does (formats/known.py), or by fp32.
    Raises DanluError for a type or a matrix that is not known, and where a matrix is left out.
    """
    shapes = matrices_of(config)
    asked = one_type(shapes, types) if isinstance(types, str) else types
    for name in asked:
        if name not in shapes:
            close = nearest(name, list(shapes))
            raise DanluError(
                f"{name} is no matrix of this model that can be rounded",
                where="types",
                fix=f"did you mean {close}?" if close else f"its matrices are {', '.join(list(shapes)[:8])}, ...",
            )
    for name, shape in shapes.items():
        if name not in asked:
            raise DanluError(f"no type is given for {name}", where="types", fix=f"one of {PLAIN}, {', '.join(FORMATS)}")
        type = asked[name].lower()
        yield name, type, None if type == PLAIN else fitting(format_of(type), shape[-1])


def file_bytes(config: ModelConfig, types: str | Mapping[str, str], keys: int) -> int:
    """The size of the GGUF file that a model is rounded into, told before it is made.

    Args:
        types: as of `formats_for`.
        keys: what the file's keys take, the words among them; see `danlu.model.gguf.keys_bytes`.

    Raises DanluError as `formats_for`, and where GGUF has no name for a weight.
    """
    forms = {name: form for name, _, form in formats_for(config, types)}
    weights = without_memory(config).state_dict()
    return told_bytes(config, {name: _rounded(weight, forms.get(name)) for name, weight in weights.items()}, keys)


def _rounded(weight: Tensor, form: Format | None) -> Tensor | Packed:
    """A weight without memory in a format."""
    if form is None:
        return weight
    block, size = gguf.GGML_QUANT_SIZES[form.kind]
    bytes_of = (*weight.shape[:-1], weight.shape[-1] // block * size)
    return Packed(form.kind, torch.empty(bytes_of, dtype=torch.uint8, device="meta"))
