"""Which number format each matrix of a model gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf

from danlu.compress.quantizing.formats.known import FORMATS, Format, fitting, format_of
from danlu.errors import DanluError, nearest
from danlu.gguf_header import read_header
from danlu.model.checkpoint import Checkpoint
from danlu.model.config import ModelConfig
from danlu.model.families.known import family_for
from danlu.model.gguf import EXACT
from danlu.model.stored import without_memory

END = "q6_k"  # of the head, where one type is asked for: its errors reach the probabilities directly
PLAIN = "f32"


def matrices(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Names in the model and shapes of all that can be rounded: vectors, routers, learned positions stay fp32."""
    return matrices_of(checkpoint.config)


def matrices_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The same of a model that need not be there."""
    names = family_for(config).gguf_names
    shapes = {name: tuple(weight.shape) for name, weight in without_memory(config).state_dict().items()}
    return {
        name: shape
        for name, shape in shapes.items()
        if len(shape) > 1 and not name.endswith("bias") and not (names.theirs(name) or "").endswith(EXACT)
    }


def head_of(names: Mapping[str, object]) -> str:
    """The matrix that logits are made with: the embedding's own, where the head has none."""
    return "head.weight" if "head.weight" in names else "embedding.tokens.weight"


def one_type(checkpoint: Checkpoint, type: str) -> dict[str, str]:
    """Every matrix in one type, but for the head, which gets Q6_K."""
    names = matrices(checkpoint)
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


def formats_for(checkpoint: Checkpoint, types: str | Mapping[str, str]) -> Iterator[tuple[str, str, Format | None]]:
    """Each matrix, the type it was asked for, and the format it gets; None for fp32.

    Args:
        types: one type for all (see `one_type`), or one for each matrix by its name in the model; f32 is one too.

    A format whose blocks the rows do not fill is replaced as llama.cpp does (formats/known.py), or by fp32.
    Raises DanluError for a type or a matrix that is not known, and where a matrix is left out.
    """
    shapes = matrices(checkpoint)
    asked = one_type(checkpoint, types) if isinstance(types, str) else types
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
