"""A model as an ExecuTorch program, which runs on phones: products by XNNPACK, in fp32.

Memory is planned when it is written: a program computes one row of at most so many tokens at once, and a decoder keeps
its cache itself, `CONTEXT` places at most.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from danlu.artifact import Figures
from danlu.compress.exports.graph import EncoderGraph
from danlu.compress.exports.running import compare_rows
from danlu.errors import DanluError, need_extra
from danlu.model.attention import Cache, LayerCache
from danlu.model.config import Head
from danlu.model.sight import Batch
from danlu.model.transformer import Decoder, Encoder

FILE = "model.pte"
AT_ONCE = 128  # tokens
CONTEXT = 1024


def require() -> None:
    """Raise DanluError where the package is missing."""
    if find_spec("executorch") is None:
        raise need_extra("executorch", "executorch")


def write(model: Decoder | Encoder, head: Head | None, folder: Path, where: object) -> Figures:
    """Write a model as FILE in a folder, run it there, and compare.

    Raises DanluError where the model cannot be traced, or ExecuTorch cannot hold it.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    time = Dim("time", min=1, max=min(AT_ONCE, model.config.context))
    ids = torch.ones(1, 5, dtype=torch.int64)
    if isinstance(model, Decoder):
        module: nn.Module = StepGraph(model, min(CONTEXT, model.config.context))
        example, shapes = (ids, torch.arange(5)[None]), ({1: time}, {1: time})
    else:
        module, example, shapes = EncoderGraph(model, head), (ids, torch.ones_like(ids)), ({1: time}, {1: time})
    try:
        with torch.no_grad():
            traced = torch.export.export(module, example, dynamic_shapes=shapes)
            program = to_edge_transform_and_lower(traced, partitioner=[XnnpackPartitioner()]).to_executorch()
    except Exception as error:  # each of its passes has its own errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DanluError(f"ExecuTorch cannot hold this model: {reason}", where=where, fix="export it as ONNX") from None
    with (folder / FILE).open("wb") as file:
        program.write_to_file(file)
    return compare_rows(model, head, runner(folder / FILE))


def runner(file: Path) -> Callable[..., list[Tensor]]:
    """ExecuTorch's runtime on this machine's processor."""
    from executorch.runtime import Runtime

    method: Any = Runtime.get().load_program(file).load_method("forward")
    return lambda *given: list(method.execute(given))


class StepGraph(nn.Module):
    """Ids of one row and their places -> logits; the cache stays inside."""

    def __init__(self, model: Decoder, length: int) -> None:
        super().__init__()
        self.model = model
        cache = Cache(model.config, 1, length, torch.float32, torch.device("cpu"))
        for number, layer in enumerate(cache.layers):
            self.register_buffer(f"keys_{number}", layer.keys)
            self.register_buffer(f"values_{number}", layer.values)
        self.length = length

    def forward(self, input_ids: Tensor, places: Tensor) -> Tensor:
        """Args: both int64 [1, T]. Returns: [1, T, vocab]."""
        x = self.model.embedding(input_ids, places)
        cache = _Kept(self)
        return self.model.logits(self.model.run(x, Batch(places, keys=self.length), cache=cache))


class _Kept(Cache):
    """The cache that lies in a module's buffers."""

    def __init__(self, module: StepGraph) -> None:
        self.layers = [
            LayerCache(getattr(module, f"keys_{layer}"), getattr(module, f"values_{layer}"))
            for layer in range(module.model.config.layers)
        ]
        self.lengths = torch.zeros(1, dtype=torch.int64)
