"""What stands on the last hidden states: words, labels, spans, or a vector for a whole row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.model.config import Head, ModelConfig
from danlu.model.feedforward import ACTIVATIONS


class WordHead(nn.Module):
    """Hidden states [..., width] -> logits [..., vocab].

    Attributes:
        weight: [vocab, width], None where the embedding's is used.
        bias: [vocab] or None.
        dense, norm: a layer before it (BERT's), or None.
    """

    def __init__(self, config: ModelConfig, head: Head) -> None:
        super().__init__()
        width, words = config.width, config.vocab_size
        self.dense = nn.Linear(width, width) if head.dense else None
        self.activation = ACTIVATIONS[head.dense] if head.dense else None
        self.norm = nn.LayerNorm(width, config.norm_epsilon) if head.norm else None
        self.weight = None if config.tied else nn.Parameter(torch.empty(words, width))
        if self.weight is not None:
            nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # as nn.Linear starts
        self.bias = nn.Parameter(torch.zeros(words)) if head.bias else None
        self.scale = config.head_scale

    def features(self, hidden: Tensor) -> Tensor:
        """What the words' weight is multiplied by, [..., width]."""
        if self.dense is not None and self.activation is not None:
            hidden = self.activation(self.dense(hidden))
        if self.norm is not None:
            hidden = self.norm(hidden)
        return hidden if self.scale == 1 else hidden * self.scale

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """Args: hidden: [..., width]; embedding: [vocab, width], used where there is no weight of its own."""
        return F.linear(self.features(hidden), embedding if self.weight is None else self.weight, self.bias)


class LabelHead(nn.Module):
    """Hidden states [B, T, width] -> [B, outputs] of a whole row, or [B, T, outputs]."""

    def __init__(self, config: ModelConfig, head: Head) -> None:
        super().__init__()
        self.settings = head
        self.dense = nn.Linear(config.width, config.width) if head.dense else None
        self.activation = ACTIVATIONS[head.dense] if head.dense else None
        self.norm = nn.LayerNorm(config.width, config.norm_epsilon) if head.norm else None
        self.output = nn.Linear(config.width, head.outputs, bias=head.bias) if head.outputs else None
        self.dropout = config.head_dropout

    def forward(self, hidden: Tensor, segments: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        """Args: segments: int32 [B, T], 0 for padding; tokens: int64 [B, T], where the pool is at an `end` token."""
        if self.settings.pool is not None:
            hidden = pool(hidden, self.settings, segments, tokens)
        if self.dense is not None and self.activation is not None:
            hidden = self.activation(self.dense(hidden))
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.output is not None:
            hidden = self.output(F.dropout(hidden, self.dropout, self.training))
        return F.normalize(hidden, dim=-1) if self.settings.normalised else hidden


def pool(hidden: Tensor, head: Head, segments: Tensor | None, tokens: Tensor | None) -> Tensor:
    """One vector a row, [B, T, width] -> [B, width]; padding counts for nothing."""
    real = torch.ones(hidden.shape[:2], device=hidden.device) if segments is None else (segments != 0)
    if head.pool == "mean":
        weight = real.to(hidden.dtype)[..., None]
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
    place = real.int().argmax(1)  # the first
    if head.pool == "last":
        place = real.shape[1] - 1 - real.flip(1).int().argmax(1)
    if head.pool == "end":
        assert tokens is not None and head.end is not None, "to pool at an end token its row of ids is needed"
        place = (tokens if head.end < 0 else (tokens == head.end).int()).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), place]


def make_head(config: ModelConfig) -> WordHead | LabelHead | None:
    """The head that a configuration asks for."""
    if config.head is None:
        return None
    return WordHead(config, config.head) if config.head.task == "words" else LabelHead(config, config.head)
