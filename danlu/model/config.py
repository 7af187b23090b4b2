"""One configuration for every family: what a family's own configuration file is translated into.

A `ModelConfig` is one stack of blocks with its input and its head. Models of two stacks hold two of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from danlu.errors import DanluError

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "tanh"]


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
class Rotary:
    """Positions that turn pairs of features of every query and key (arXiv:2104.09864).

    Attributes:
        base: of the geometric row of frequencies.
        scaling: how it is stretched, if it is.
        axes: 1 along a text; 2 along the height and the width of an image, half of the features each.
    """

    base: float = 10_000.0
    scaling: RopeScaling | None = None
    axes: Literal[1, 2] = 1


@dataclass(frozen=True)
class Learned:
    """A trained vector for every place, added to the input.

    Attributes:
        first: the row of the first place (RoBERTa's are numbered from 2).
    """

    first: int = 0


@dataclass(frozen=True)
class Relative:
    """A trained bias on every score, by the distance of key and query, shared by all layers (arXiv:1910.10683).

    Attributes:
        buckets: distances told apart; half of them exactly, the rest in logarithmic steps.
        farthest: the distance from which all fall into the last bucket.
    """

    buckets: int = 32
    farthest: int = 128


Positions = Rotary | Learned | Relative


@dataclass(frozen=True)
class Experts:
    """A mixture of feed-forwards, of which each token takes a few (arXiv:1701.06538, arXiv:2101.03961).

    Attributes:
        count: experts in a layer.
        chosen: experts that a token takes, the likeliest ones.
        width: inner features of each.
        normalised: the weights of those chosen are scaled to sum to 1.
        layers: the layers that hold a mixture; None for all. The others have one feed-forward.
        shared_width: inner features of an expert that every token takes, 0 for none.
        shared_gate: that expert's share is decided for each token by a sigmoid.
        capacity: tokens of one row that an expert takes at most; those that come later in the row pass by.
        capacity_factor: the same as a multiple of an even share, tokens * chosen / count, rounded up.
        exact_router: the router computes in fp32 whatever the model's dtype.
        jitter: while training, the router's input is multiplied by random numbers within 1 +- jitter.
        balance, z: weights of the load-balancing loss (arXiv:2101.03961) and of the router's z-loss (arXiv:2202.08906).
    """

    count: int
    chosen: int
    width: int
    normalised: bool = False
    layers: tuple[int, ...] | None = None
    shared_width: int = 0
    shared_gate: bool = False
    capacity: int | None = None
    capacity_factor: float | None = None
    exact_router: bool = False
    jitter: float = 0.0
    balance: float = 0.0
    z: float = 0.0


@dataclass(frozen=True)
class Patches:
    """An image cut into squares, each of them one place of the sequence (arXiv:2010.11929).

    Attributes:
        image: height and width in pixels.
        patch: height and width of a square.
        channels: colours.
        bias: of the projection.
        class_token: a trained vector stands before the squares.
    """

    image: tuple[int, int]
    patch: tuple[int, int]
    channels: int = 3
    bias: bool = True
    class_token: bool = True

    @property
    def grid(self) -> tuple[int, int]:
        """Squares from top to bottom and from left to right."""
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]


@dataclass(frozen=True)
class Head:
    """What stands on the last hidden states: [pool] -> [dense -> activation -> norm] -> [linear].

    Attributes:
        task: "words": one output a word of the vocabulary; "sequence": labels of a whole row; "tokens": labels of
            every token; "span": start and end of an answer; "embedding": a vector for a whole row.
        labels: their names, where the outputs are labels and have some.
        outputs: labels, or features of the embedding; 0 for no linear layer. Words need none.
        pool: for a whole row: its "first" hidden state, its "last", their "mean", or that of the `end` token.
        dense: the activation behind a layer of the stack's width, where there is one.
        norm: LayerNorm after that.
        bias: of the linear layer.
        end: the id of the token to pool at; -1 for the largest id of the row (CLIP's first checkpoints).
        normalised: the output is scaled to length 1.
    """

    task: Literal["words", "sequence", "tokens", "span", "embedding"] = "words"
    outputs: int = 0
    pool: Literal["first", "last", "mean", "end"] | None = None
    dense: Activation | None = None
    norm: bool = False
    bias: bool = False
    end: int | None = None
    normalised: bool = False
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one stack of blocks, with its input and its head.

    Attributes:
        vocab_size: rows of the embedding; 0 where the input is no text.
        width: features of the residual stream.
        layers: blocks.
        heads, kv_heads: query heads, and key/value heads that groups of them share (arXiv:2305.13245).
        head_width: features of one head.
        feedforward_width: inner features of the feed-forward.
        context: the most positions the model was made for.
        causal: a token sees itself and what came before it; otherwise all of its row.
        cross: every block also looks at another stack's output.
        positions: how places are told apart.
        local_positions: those of the layers with a window, where they differ.
        patches: the input is an image.
        types: kinds of token (first and second sentence), with a trained vector each.
        norm: "rms" (arXiv:1910.07467), "layer" (arXiv:1607.06450), or "batch" (arXiv:1502.03167).
        norm_place: "pre": before attention and feed-forward; "post": after the sum; "both": before and after them.
        norm_epsilon: added under the root.
        norm_plus_one: the stored weights of RMSNorm are what is added to 1.
        embedding_norm, final_norm: a norm before the first block, and after the last.
        embedding_scale: what the embedding is multiplied by, rounded to its dtype.
        residual_scale: what the update of each half of a block is multiplied by.
        tied: the head shares the embedding's weight.
        head: what stands on the last hidden states; None for nothing.
        head_scale: what hidden states are multiplied by before a head of words.
        attention_bias, output_bias, feedforward_bias: biases of query/key/value, of the output, of the feed-forward.
        attention_scale: what scores are multiplied by; None for 1 / sqrt(head_width).
        qk_norm: RMSNorm of every query and key head before the rotation.
        sliding_window: a token sees at most this many positions, itself included; None means all before it.
        global_layers: layers that have no window all the same.
        activation: non-linearity of the feed-forward.
        gated: the feed-forward is down(activation(gate(x)) * up(x)) (arXiv:2002.05202), not down(activation(up(x))).
        experts: a mixture instead of the feed-forward.
        dropout: share of features of the embedding and of every update that training hides (arXiv:1207.0580).
        attention_dropout, head_dropout: the same of attention's probabilities, and before the head's linear layer.
        drop_path: share of rows for which training skips the last layer's updates; less in earlier ones, in a straight
            line from 0 (arXiv:1603.09382).
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    feedforward_width: int
    context: int
    causal: bool = True
    cross: bool = False
    positions: Positions | None = Rotary()
    local_positions: Rotary | None = None
    patches: Patches | None = None
    types: int = 0
    norm: Literal["rms", "layer", "batch"] = "rms"
    norm_place: Literal["pre", "post", "both"] = "pre"
    norm_epsilon: float = 1e-5
    norm_plus_one: bool = False
    embedding_norm: bool = False
    final_norm: bool = True
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    tied: bool = False
    head: Head | None = Head()
    head_scale: float = 1.0
    attention_bias: bool = False
    output_bias: bool = False
    feedforward_bias: bool = False
    attention_scale: float | None = None
    qk_norm: bool = False
    sliding_window: int | None = None
    global_layers: tuple[int, ...] = ()
    activation: Activation = "silu"
    gated: bool = True
    experts: Experts | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0
    head_dropout: float = 0.0
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "kv_heads", "head_width", "feedforward_width", "context"):
            if getattr(self, name) < 1:
                raise _wrong(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.heads % self.kv_heads:
            raise _wrong(f"{self.heads} query heads cannot share {self.kv_heads} key/value heads")
        if isinstance(self.positions, Rotary) and self.head_width % (2 * self.positions.axes):
            raise _wrong(f"head_width {self.head_width}: rotary positions turn pairs, {self.positions.axes} at a time")
        if self.vocab_size < 1 and self.patches is None:
            raise _wrong(f"vocab_size is {self.vocab_size}; it must be at least 1")
        if self.sliding_window is not None and not self.causal:
            raise _wrong("a sliding window is for causal attention only")
        if self.experts is not None and not 0 < self.experts.chosen <= self.experts.count:
            raise _wrong(f"{self.experts.chosen} of {self.experts.count} experts cannot be chosen")

    @property
    def score_scale(self) -> float:
        """What scores of attention are multiplied by."""
        return self.head_width**-0.5 if self.attention_scale is None else self.attention_scale

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer, None where it sees everything before."""
        return None if layer in self.global_layers else self.sliding_window

    def layer_positions(self, layer: int) -> Positions | None:
        """How a layer tells places apart."""
        return self.positions if self.local_positions is None or self.window(layer) is None else self.local_positions

    def has_experts(self, layer: int) -> bool:
        """Whether a layer holds a mixture."""
        return self.experts is not None and (self.experts.layers is None or layer in self.experts.layers)


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """A stack that reads and a stack that writes (arXiv:1706.03762); both share one embedding.

    Attributes:
        encoder: what reads; without a head.
        decoder: what writes; its blocks look at the encoder's output.
        start: the id that every answer begins with.
    """

    encoder: ModelConfig
    decoder: ModelConfig
    start: int = 0

    def __post_init__(self) -> None:
        if not self.decoder.cross or not self.decoder.causal or self.encoder.cross or self.encoder.causal:
            raise _wrong("an encoder sees all of its row; a decoder sees what came before, and the encoder's output")
        if (self.encoder.vocab_size, self.encoder.width) != (self.decoder.vocab_size, self.decoder.width):
            raise _wrong("encoder and decoder share one embedding: vocab_size and width must be the same")
        if isinstance(self.decoder.positions, Learned) and self.encoder.context > self.decoder.context:
            raise _wrong("encoder and decoder share the learned positions: the decoder's context must be the longer")


@dataclass(frozen=True)
class PairConfig:
    """Two encoders whose outputs are compared: a text's and an image's (arXiv:2103.00020).

    Attributes:
        text, image: each with a head for an embedding of the same width.
        logit_scale: the logarithm of what similarities are multiplied by, at the start of training.
    """

    text: ModelConfig
    image: ModelConfig
    logit_scale: float = 2.6592

    def __post_init__(self) -> None:
        widths = {None if config.head is None else config.head.outputs for config in (self.text, self.image)}
        if len(widths) != 1 or None in widths or 0 in widths:
            raise _wrong("text and image must be embedded in the same number of features")


AnyConfig = ModelConfig | EncoderDecoderConfig | PairConfig


def _wrong(what: str) -> DanluError:
    return DanluError(what, where="model config")
