"""The decoder: an embedding, a stack of pre-norm blocks, a norm, and a head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.errors import DanluError
from danlu.model.attention import Attention, Cache, LayerCache, Sight, sight
from danlu.model.config import ModelConfig
from danlu.model.feedforward import FeedForward
from danlu.model.norm import RMSNorm


class Block(nn.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_epsilon)
        self.attention = Attention(config)
        self.feedforward_norm = RMSNorm(config.width, config.norm_epsilon)
        self.feedforward = FeedForward(config)

    def forward(self, x: Tensor, see: Sight, cache: LayerCache | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), see, cache)
        return x + self.feedforward(self.feedforward_norm(x))


class Decoder(nn.Module):
    """A causal language model of the Llama kind.

    `forward` ends at the last norm; `logits` applies the head. They are apart because training never needs all
    logits at once (see `danlu.model.loss`).

    Attributes:
        keep_probabilities: on a CPU, attention probabilities kept for the backward pass, on average a query and head;
            the others are computed again. 0 needs the least memory, more takes less time.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.keep_probabilities = 0
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """[vocab, width]."""
        return self.embedding.weight if self.head is None else self.head.weight

    def new_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` rows of at most `length` tokens."""
        self._check_context(length)
        weight = self.embedding.weight
        return Cache(self.config, batch, length, weight.dtype, weight.device)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, [B, T, width].

        Args:
            tokens: int64 [B, T].
            positions: int64 [B, T]; by default 0, 1, ... or, with a cache, each row's next places.
            segments: int32 [B, T], the document of each token of a packed row; documents never see each other.
            cache: filled with the new tokens and looked at.

        Raises DanluError where the tokens would outgrow the model's context or the cache.
        """
        batch, length = tokens.shape
        if cache is not None:
            keys = int(cache.lengths.max()) + length
            if keys > cache.length:
                raise DanluError(f"{keys} tokens do not fit in a cache of {cache.length}")
            positions = cache.lengths[:, None] + torch.arange(length, device=tokens.device)
        elif positions is None:
            self._check_context(length)
            positions = torch.arange(length, device=tokens.device).expand(batch, length)
        see = sight(self.config, positions, segments, None if cache is None else cache.length, self.keep_probabilities)
        x = self.embedding(tokens)
        for number, block in enumerate(self.blocks):
            x = block(x, see, None if cache is None else cache.layers[number])
        if cache is not None:
            cache.lengths = cache.lengths + length
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., width] -> [..., vocab]."""
        return F.linear(hidden, self.head_weight)

    def _check_context(self, length: int) -> None:
        if length > self.config.context:
            raise DanluError(f"{length} tokens are more than the model's context of {self.config.context}")
