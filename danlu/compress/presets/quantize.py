"""GGUF files of llama.cpp's number formats, made by llama.cpp's own quantizer."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import gguf

from danlu.artifact import check_parent
from danlu.compress.presets.settings import FileType
from danlu.console import say
from danlu.device.cores import usable_cores
from danlu.device.engine import last_words, library
from danlu.errors import DanluError, one_of
from danlu.gguf_header import read_header
from danlu.model.checkpoint import Checkpoint
from danlu.model.gguf import write_gguf

TYPES: tuple[str, ...] = get_args(FileType)


@dataclass(frozen=True)
class Stored:
    """How a file's matrices are stored.

    Attributes:
        types: matrices of each number format.
        forced: of these, those whose rows do not fill the blocks of the file's own format, so that llama.cpp had to
            take another: K-types need rows of a multiple of 256.
        block: numbers in a block of the file's own format.
    """

    types: dict[str, int]
    forced: dict[str, int]
    block: int

    @property
    def words(self) -> str:
        """What was forced, in a sentence; empty where nothing was."""
        if not self.forced:
            return ""
        kinds = ", ".join(f"{number} as {name}" for name, number in self.forced.items())
        count, total = sum(self.forced.values()), sum(self.types.values())
        return f"{count} of {total} matrices have rows that are no multiple of {self.block}: stored {kinds}"

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return {"types": self.types, "forced": self.forced, "block": self.block}


def ggml_type(file_type: str) -> gguf.GGMLQuantizationType:
    """The number format most matrices of a file type have: q4_k_m -> Q4_K."""
    name = file_type.upper()
    return gguf.GGMLQuantizationType[name if name in gguf.GGMLQuantizationType.__members__ else name[:-2]]


def quantize(source: Path, file_type: str, out: Path, threads: int | None = None) -> Stored:
    """Write `source` in another number format, aside and renamed.

    Args:
        source: an F32, F16 or BF16 GGUF.
        file_type: one of TYPES.
        out: the file.
        threads: by default every physical core this process may use.

    Returns: how the matrices are stored; what llama.cpp could not store as asked is in it.

    Raises DanluError where the type is not known, the source is quantized already, or llama.cpp fails.
    """
    known = check_type(file_type)
    api = library()
    asked = api.llama_model_quantize_default_params()
    prefix = "ALL" if known == "f32" else "MOSTLY"
    asked.ftype = getattr(api, f"LLAMA_FTYPE_{prefix}_{known.upper()}")
    asked.nthread = threads or usable_cores()
    aside = out.with_name(f".{out.name}.{os.getpid()}.aside")
    last_words()
    try:
        if api.llama_model_quantize(os.fsencode(source), os.fsencode(aside), ctypes.byref(asked)):
            raise DanluError(f"llama.cpp cannot write it as {known}: {last_words()}", where=source)
        stored = stored_types(aside, known)
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)
    return stored


def stored_types(path: Path, file_type: str) -> Stored:
    """Count a file's matrices by number format."""
    block, _ = gguf.GGML_QUANT_SIZES[ggml_type(file_type)]
    matrices = [tensor for tensor in read_header(path).tensors if len(tensor.shape) > 1]
    names = {tensor.name: gguf.GGMLQuantizationType(tensor.type).name for tensor in matrices}
    forced = [tensor for tensor in matrices if tensor.shape[-1] % block]
    return Stored(
        dict(Counter(names.values()).most_common()),
        dict(Counter(names[tensor.name] for tensor in forced).most_common()),
        block,
    )


def check_type(file_type: str) -> str:
    """The type in llama.cpp's lower-case spelling; DanluError where it is not known."""
    known = file_type.lower()
    if known not in TYPES:
        raise DanluError(f"{file_type} is no type that can be written", fix=one_of(known, TYPES))
    return known


def export(checkpoint: Checkpoint, file_type: str, out: Path) -> Stored:
    """Write a checkpoint as one GGUF file of any type, through an F32 file beside it.

    Args:
        checkpoint: what `Checkpoint.open` gives.
        file_type: one of TYPES, in any case.
        out: the file.

    Raises DanluError where the type is not known, or the model has no form in GGUF.
    """
    known = check_type(file_type)
    check_parent(out)
    with tempfile.TemporaryDirectory(prefix=".danlu-export-", dir=out.parent) as work:
        source = Path(work) / "f32.gguf"
        write_gguf(checkpoint.load(), checkpoint.tokenizer, source, "f32")
        stored = quantize(source, known, out)
    if stored.words:
        say(f"{known}: {stored.words}")
    return stored
