"""What a model asks of a device for each token, as far as time goes: its matrices, its layers, its words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf

from danlu.device.stack import MATRICES, Stack
from danlu.gguf_header import Header, read_header

EMBEDDINGS = ("token_embd.weight", "position_embd.weight", "token_types.weight")  # of which a token reads one row
HEAD = "output.weight"


@dataclass(frozen=True)
class Matrix:
    """A matrix that every token is multiplied with.

    Attributes:
        type: its number format, as GGML calls it in lower case.
        rows, columns: of it; rows of a bank of experts are those that one token uses.
    """

    type: str
    rows: float
    columns: int


@dataclass(frozen=True)
class Workload:
    """One token's worth of a model.

    Attributes:
        matrices: all of them, the head included.
        layers: blocks.
        attention: features of all heads of queries together.
        words: of the vocabulary, one of which is chosen.
    """

    matrices: tuple[Matrix, ...]
    layers: int
    attention: int
    words: int

    @classmethod
    def of_file(cls, path: Path) -> Workload:
        """What a GGUF file asks. Raises DanluError where it is damaged or says too little of itself."""
        header = read_header(path)
        arch = header.need("general.architecture", str)
        layers = header.need(f"{arch}.block_count", int)
        width = header.need(f"{arch}.embedding_length", int)
        heads = header.metadata.get(f"{arch}.attention.head_count")
        head = header.find(f"{arch}.attention.key_length", int)
        attention = width if head is None or not isinstance(heads, int) else heads * head
        matrices = tuple(_matrices(header, arch))
        words = next((tensor.shape[0] for tensor in header.tensors if tensor.name == EMBEDDINGS[0]), 0)
        return cls(matrices, layers, attention, words)

    @classmethod
    def of_stack(cls, stack: Stack) -> Workload:
        """What a stack asks."""
        square = Matrix(stack.type, stack.width, stack.width)
        head = Matrix(stack.type, stack.words, stack.width)
        return cls((head,) + (square,) * (len(MATRICES) * stack.layers), stack.layers, stack.width, stack.words)


def _matrices(header: Header, arch: str) -> Iterator[Matrix]:
    names = {tensor.name for tensor in header.tensors}
    experts = header.find(f"{arch}.expert_count", int)
    share = 1.0 if not experts else (header.find(f"{arch}.expert_used_count", int) or experts) / experts
    for tensor in header.tensors:
        if len(tensor.shape) < 2 or (tensor.name in EMBEDDINGS and not _is_head(tensor.name, names)):
            continue
        rows = 1.0
        for size in tensor.shape[:-1]:
            rows *= size
        used = share if len(tensor.shape) > 2 else 1.0
        yield Matrix(gguf.GGMLQuantizationType(tensor.type).name.lower(), rows * used, tensor.shape[-1])


def _is_head(name: str, names: set[str]) -> bool:
    """Whether the embedding of words is the head too."""
    return name == EMBEDDINGS[0] and HEAD not in names
