"""One configuration for every decoder: what a family's own configuration file is translated into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from danlu.errors import DanluError


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched past the context a model was first trained on.

    Attributes:
        kind: "linear" divides every angle by `factor`; "llama3" divides only slow frequencies (Llama 3.1 model card);
            "yarn" interpolates by parts and tempers attention (arXiv:2309.00071).
        factor: how many times longer the context becomes.
        original_context: tokens of the context before stretching (llama3, yarn).
        low_frequency, high_frequency: wavelength bounds of the llama3 blend, in turns per original context.
        beta_fast, beta_slow: turns between which yarn blends.
        attention_factor: yarn's scale on cos and sin; None means 0.1 ln(factor) + 1.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_context: int = 0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder.

    Attributes:
        vocab_size: rows of the embedding.
        width: features of the residual stream.
        layers: blocks.
        heads, kv_heads: query heads, and key/value heads that groups of them share (arXiv:2305.13245).
        head_width: features of one head.
        feedforward_width: inner features of the gated feed-forward (arXiv:2002.05202).
        context: the most positions the model was made for.
        rope_base, rope_scaling: rotary position frequencies (arXiv:2104.09864).
        norm_epsilon: added under the root of RMSNorm (arXiv:1910.07467).
        tied: the head shares the embedding's weight.
        attention_bias, output_bias, feedforward_bias: biases of query/key/value, of the output, of the feed-forward.
        qk_norm: RMSNorm of every query and key head before the rotation (Qwen3).
        sliding_window: a token sees at most this many positions, itself included; None means all before it.
        activation: non-linearity of the gate.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    feedforward_width: int
    context: int
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-5
    tied: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    feedforward_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "width",
            "layers",
            "heads",
            "kv_heads",
            "head_width",
            "feedforward_width",
            "context",
        ):
            if getattr(self, name) < 1:
                raise DanluError(f"{name} is {getattr(self, name)}; it must be at least 1", where="model config")
        if self.heads % self.kv_heads:
            raise DanluError(
                f"{self.heads} query heads cannot share {self.kv_heads} key/value heads", where="model config"
            )
        if self.head_width % 2:
            raise DanluError(f"head_width {self.head_width} is odd; rotary positions turn pairs", where="model config")
