"""What a stack begins with: tokens or patches of an image, made into vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.errors import DanluError
from danlu.model.config import Learned, ModelConfig, Patches
from danlu.model.norm import make_norm


class TextEmbedding(nn.Module):
    """Token ids [B, T] -> [B, T, width]: the words' vectors, plus those of places and of kinds of token, normed."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.scale = config.embedding_scale
        self.first = config.positions.first if isinstance(config.positions, Learned) else 0
        self.positions = _places(config, config.context)
        self.types = nn.Embedding(config.types, config.width) if config.types else None
        self.norm = make_norm(config) if config.embedding_norm else None
        self.dropout = config.dropout

    def forward(self, tokens: Tensor, positions: Tensor, types: Tensor | None = None) -> Tensor:
        """Args: tokens, positions: int64 [B, T]; types: int64 [B, T], all 0 by default."""
        x = self.tokens(tokens)
        if self.scale != 1:
            x = x * torch.tensor(self.scale, dtype=x.dtype)  # rounded first, as Gemma was trained
        if self.types is not None:
            x = x + (self.types.weight[0] if types is None else self.types(types))
        if self.positions is not None:
            x = x + self.positions(positions + self.first)
        if self.norm is not None:
            x = self.norm(x)
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Received(nn.Module):
    """In the place of an embedding where hidden states come from an earlier stage of a pipeline: they pass through.

    Args:
        tokens: the words' vectors, where this stage's head shares them; else None, and there are none to ask for.
    """

    tokens: nn.Embedding

    def __init__(self, tokens: nn.Embedding | None) -> None:
        super().__init__()
        if tokens is not None:
            self.tokens = tokens

    def forward(self, x: Tensor, positions: Tensor, types: Tensor | None = None) -> Tensor:
        return x


class PatchEmbedding(nn.Module):
    """Pixels [B, channels, height, width] -> [B, 1 + patches, width]; the class token comes first."""

    def __init__(self, config: ModelConfig, patches: Patches) -> None:
        super().__init__()
        self.settings = patches
        self.patches = nn.Conv2d(patches.channels, config.width, patches.patch, stride=patches.patch, bias=patches.bias)
        self.class_token = nn.Parameter(torch.randn(config.width) * 0.02) if patches.class_token else None
        self.positions = _places(config, config.context)
        self.norm = make_norm(config) if config.embedding_norm else None
        self.dropout = config.dropout

    def forward(self, pixels: Tensor) -> Tensor:
        if tuple(pixels.shape[1:]) != (self.settings.channels, *self.settings.image):
            expected = [self.settings.channels, *self.settings.image]
            raise DanluError(f"images of shape {list(pixels.shape[1:])}; the model takes {expected}")
        x = self._squares(pixels)
        if self.class_token is not None:
            x = torch.cat((self.class_token.expand(len(x), 1, -1), x), dim=1)
        if self.positions is not None:
            x = x + self.positions.weight
        if self.norm is not None:
            x = self.norm(x)
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def _squares(self, pixels: Tensor) -> Tensor:
        """The projection of each square. They do not overlap, so it is one matrix product instead of a convolution."""
        high, wide = self.settings.patch
        rows, columns = self.settings.grid
        cut = pixels[:, :, : rows * high, : columns * wide].unflatten(3, (columns, wide)).unflatten(2, (rows, high))
        flat = cut.permute(0, 2, 4, 1, 3, 5).reshape(len(pixels), rows * columns, -1)
        return F.linear(flat, self.patches.weight.flatten(1), self.patches.bias)

    def places(self, batch: int, device: torch.device) -> Tensor:
        """Row and column of every square, int64 [B, patches, 2], for rotary positions of two axes."""
        rows, columns = self.settings.grid
        grid = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))
        return grid.expand(batch, -1, 2)


def _places(config: ModelConfig, count: int) -> nn.Embedding | None:
    if not isinstance(config.positions, Learned):
        return None
    return nn.Embedding(count + config.positions.first, config.width)
