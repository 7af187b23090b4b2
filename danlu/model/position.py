"""How places are told apart: rotary angles, and T5's buckets of distances."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from danlu.model.config import Relative, RopeScaling, Rotary


def frequencies(rotary: Rotary, width: int) -> tuple[Tensor, float]:
    """The angle per position of every feature pair, fp32 [width / 2], and the scale on cos and sin.

    Each pair of features turns with the position, at its own frequency (arXiv:2104.09864).

    Args:
        rotary: base and scaling.
        width: features that are turned.
    """
    half = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    plain = 1.0 / (rotary.base**half)
    scaling = rotary.scaling
    if scaling is None:
        return plain, 1.0
    if scaling.kind == "linear":
        return plain / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(plain, scaling), 1.0
    return _yarn(plain, scaling, rotary.base, width)


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    turns = scaling.original_context * plain / (2 * math.pi)
    blend = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
    blend = blend.clamp(0, 1)  # 0: slow, fully stretched; 1: fast, left alone
    return (1 - blend) * plain / scaling.factor + blend * plain


def _yarn(plain: Tensor, scaling: RopeScaling, base: float, width: int) -> tuple[Tensor, float]:
    def pair_at(turns: float) -> float:
        """The (fractional) pair that makes this many turns over the original context."""
        length = scaling.original_context / (turns * 2 * math.pi)
        return width * math.log(length) / (2 * math.log(base))

    low = max(math.floor(pair_at(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_at(scaling.beta_slow)), width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    stretched = ramp.clamp(0, 1)
    turned = plain / scaling.factor * stretched + plain * (1 - stretched)
    attention = scaling.attention_factor
    if attention is None:
        attention = 0.1 * math.log(scaling.factor) + 1.0
    return turned, attention


def rotation(rotary: Rotary, width: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle, fp32 [B, T, 1, width / 2].

    Args:
        rotary: how positions turn features.
        width: of a head.
        positions: int64 [B, T]; with two axes [B, T, 2], the row and the column of each place. The pairs of the first
            half of the features then turn with the row, the others with the column (arXiv:2403.13298, axial).
    """
    frequency, scale = frequencies(rotary, width // rotary.axes)
    places = positions[..., None] if rotary.axes == 1 else positions
    angles = (places[..., None].float() * frequency.to(positions.device)).flatten(-2)
    return (angles.cos() * scale).unsqueeze(-2), (angles.sin() * scale).unsqueeze(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn [B, T, heads, head_width]; feature j is paired with j + head_width / 2, as Hugging Face stores weights."""
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)


class RelativeBias(nn.Module):
    """A trained bias for every head and bucket of distances (arXiv:1910.10683, section 2.1)."""

    def __init__(self, settings: Relative, heads: int, causal: bool) -> None:
        super().__init__()
        self.settings, self.causal = settings, causal
        self.weight = nn.Parameter(torch.randn(settings.buckets, heads) * 0.02)

    def square(self, length: int) -> Tensor:
        """[heads, length, length] for places one after another, by their distance: packed rows have the same."""
        ahead = torch.arange(1 - length, length, device=self.weight.device)
        by_distance = self.weight.T[:, self._buckets(ahead)]
        # Row r of the view begins r places later: it belongs to the query length - 1 - r.
        return by_distance.unfold(1, length, 1).flip(1)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Positions int64 [B, T] and [B, S] -> [B, heads, T, S], to be added to the scores."""
        buckets = self._buckets(keys[:, None, :] - queries[:, :, None])
        # Heads first, so that the scores' own order needs no copy.
        return self.weight.T[:, buckets].transpose(0, 1)

    def _buckets(self, ahead: Tensor) -> Tensor:
        """The bucket of a distance; positive ones are ahead of the query."""
        count = self.settings.buckets
        if self.causal:
            first, distance = torch.zeros_like(ahead), (-ahead).clamp(min=0)
        else:
            count //= 2
            first, distance = (ahead > 0) * count, ahead.abs()
        exact = count // 2
        steps = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.settings.farthest / exact)
        far = (exact + (steps * (count - exact)).long()).clamp(max=count - 1)
        return first + torch.where(distance < exact, distance, far)
