"""A model as one function of tensors that can be traced: what ONNX, OpenVINO and ExecuTorch are given.

Attention goes by a mask here, as lists of tiles cannot be traced; a decoder's cache comes in and goes out as tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from danlu.errors import DanluError
from danlu.model.attention import Cache, LayerCache
from danlu.model.config import Head, ModelConfig, Relative
from danlu.model.head import pool
from danlu.model.sight import Batch, self_sight
from danlu.model.transformer import Decoder, Encoder, Model

ROWS, TOKENS, PAST = 2, 5, 7  # of the example that is traced; no two alike, and none 0 or 1, which are special


@dataclass(frozen=True)
class Graph:
    """What is traced, and how.

    Attributes:
        module: of fixed weights, in fp32.
        example: its arguments.
        shapes: of each argument, which dimensions are free, and what they are called.
        inputs, outputs: names.
    """

    module: nn.Module
    example: tuple[Tensor | list[Tensor], ...]
    shapes: tuple[object, ...]
    inputs: list[str]
    outputs: list[str]


def graph_of(model: Model, head: Head | None, where: object) -> Graph:
    """The graph of a decoder with its cache, or of an encoder of text with its vectors.

    Args:
        model: in fp32.
        head: how an encoder's hidden states become one vector; None for what its own head makes of them.
        where: the model's name in messages.

    Raises DanluError where the model has another body.
    """
    batch, time, past = Dim("batch"), Dim("time"), Dim("past")
    if isinstance(model, Decoder) and not isinstance(model.config.positions, Relative):
        config = model.config
        names = [f"{layer}.{kind}" for layer in range(config.layers) for kind in ("key", "value")]
        shape = (ROWS, config.kv_heads, PAST, config.head_width)
        return Graph(
            DecoderGraph(model),
            (torch.ones(ROWS, TOKENS, dtype=torch.int64), [torch.zeros(shape) for _ in names]),
            ({0: batch, 1: time}, [{0: batch, 2: past} for _ in names]),
            ["input_ids", *(f"past_key_values.{name}" for name in names)],
            ["logits", *(f"present.{name}" for name in names)],
        )
    if isinstance(model, Encoder) and model.config.patches is None:
        ids = torch.ones(ROWS, TOKENS, dtype=torch.int64)
        free = {0: batch, 1: time}
        inputs, outputs = ["input_ids", "attention_mask"], ["last_hidden_state", _output(model.config, head)]
        return Graph(EncoderGraph(model, head), (ids, torch.ones_like(ids)), (free, free), inputs, outputs)
    raise DanluError(
        "is neither a decoder nor an encoder of text", where=where, fix="export it as GGUF, or use it with Danlu"
    )


def _output(config: ModelConfig, head: Head | None) -> str:
    if head is not None:
        return "sentence_embedding"
    return "pooler_output" if config.head is not None and config.head.task == "embedding" else "logits"


class DecoderGraph(nn.Module):
    """Ids and the cache so far -> logits and the cache with what is new."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        """Args: input_ids: int64 [B, T]; past: keys and values of each layer by turns, [B, kv_heads, P, head_width].

        Returns: [B, T, vocab], and the cache as it came, of P + T places.
        """
        before, (rows, length) = past[0].shape[2], input_ids.shape
        places = (torch.arange(length, device=input_ids.device) + before).expand(rows, length)
        cache = _Growing(past)
        x = self.model.embedding(input_ids, places)
        hidden = self.model.run(x, Batch(places, keys=before + length), cache=cache)
        return self.model.logits(hidden), *cache.present()


class _Growing(Cache):
    """A cache whose tensors are put together anew at every step."""

    def __init__(self, past: Sequence[Tensor]) -> None:
        pairs = zip(past[::2], past[1::2], strict=True)
        self.layers = [_GrowingLayer(key.transpose(1, 2), value.transpose(1, 2)) for key, value in pairs]
        self.lengths = torch.zeros(1, dtype=torch.int64)

    def present(self) -> list[Tensor]:
        return [each.transpose(1, 2) for layer in self.layers for each in (layer.keys, layer.values)]


class _GrowingLayer(LayerCache):
    def put(self, positions: Tensor, key: Tensor, value: Tensor, seen: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = torch.cat((self.keys, key), 1), torch.cat((self.values, value), 1)
        return self.keys, self.values


class EncoderGraph(nn.Module):
    """Ids and which of them are real -> hidden states, and what is made of a whole row."""

    def __init__(self, model: Encoder, head: Head | None) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Args: both int64 [B, T]; the mask is 0 for padding. Returns: [B, T, width], and e.g. [B, width]."""
        model, config = self.model, self.model.config
        places = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
        x = model.embedding(input_ids, places)
        batch = Batch(places, attention_mask.int(), masked=True)
        see = (self_sight(config, 0, batch, model.relative),)
        for block in model.blocks.children():
            x = block(x, see)
        hidden = x if model.norm is None else model.norm(x)
        return hidden, self._vector(hidden, attention_mask, input_ids)

    def _vector(self, hidden: Tensor, mask: Tensor, ids: Tensor) -> Tensor:
        if self.head is None:
            return self.model.logits(hidden, mask, ids)
        vector = pool(hidden, self.head, mask, ids)
        return F.normalize(vector, dim=-1) if self.head.normalised else vector
