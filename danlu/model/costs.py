"""What a model weighs and costs: parameters of each part, operations of a forward pass, numbers in the cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from danlu.model.config import ModelConfig
from danlu.model.head import WordHead
from danlu.model.mixture import Mixture
from danlu.model.transformer import Decoder, Encoder, EncoderDecoder, EncoderPair, Model

TRAINING = 3  # a backward pass makes two products for every one of the forward pass
SHORTEST = 1024  # tokens of the first context that costs are told for; each further one is four times as long
STACKS = ("encoder", "decoder", "text", "image")
# A word in the name of a weight -> the part of the model it belongs to. The first that fits counts.
PARTS = {
    "logit_scale": "logit scale",
    "head": "head",
    "norm": "norms",
    "embedding": "embedding",
    "router": "router",
    "shared_gate": "router",
    "experts": "experts",
    "shared": "shared expert",
    "feedforward": "feed-forward",
    "cross": "cross-attention",
    "attention": "attention",
    "relative": "attention",
}
ORDER = (
    "embedding",
    "attention",
    "cross-attention",
    "feed-forward",
    "router",
    "experts",
    "shared expert",
    "norms",
    "head",
)


@dataclass(frozen=True)
class Part:
    """Parameters of one part of a model: all, and those that each token meets (of experts, the chosen ones)."""

    name: str
    total: int
    active: int


@dataclass(frozen=True)
class Cost:
    """What one unit of the input costs, on average over a row.

    Attributes:
        unit: "token", "token read", "token written", or "image".
        context: places in the row.
        weights: floating-point operations of the products with weights.
        attention: those of attention's scores and mixtures, which grow with the row.
        cache: numbers that writing the whole row keeps as keys and values; 0 where nothing is written.
        needed: those of them that a layer may still look at: with a sliding window, no more than the window.
    """

    unit: str
    context: int
    weights: float
    attention: float
    cache: int = 0
    needed: int = 0

    @property
    def forward(self) -> float:
        """Operations of a forward pass."""
        return self.weights + self.attention

    @property
    def training(self) -> float:
        """Operations of a forward and a backward pass, nothing computed twice."""
        return TRAINING * self.forward


def count_parameters(model: nn.Module) -> list[Part]:
    """The parameters of each part of one of our models, a shared weight once; the embedding counts as met whole."""
    mixtures = {f"{name}.experts.": x.settings for name, x in model.named_modules() if isinstance(x, Mixture)}
    found: dict[str, Part] = {}
    for name, weight in model.named_parameters():
        total = active = weight.numel()
        for prefix, settings in mixtures.items():
            if name.startswith(prefix):
                active = total // settings.count * settings.chosen
        label = _part(name)
        sofar = found.get(label, Part(label, 0, 0))
        found[label] = Part(label, sofar.total + total, sofar.active + active)
    return sorted(found.values(), key=_order)


def _order(part: Part) -> tuple[int, int]:
    """Where a part stands in a list: what both stacks share first, then in the order of the computation."""
    stack, _, rest = part.name.partition(" ")
    both = stack not in STACKS
    name = part.name if both else rest
    return -1 if both else STACKS.index(stack), ORDER.index(name) if name in ORDER else len(ORDER)


def _part(name: str) -> str:
    """The part that a weight belongs to, with its stack's name where there are two."""
    stack = name.partition(".")[0]
    part = next(part for word, part in PARTS.items() if word in name)
    return f"{stack} {part}" if stack in STACKS else part


def costs(model: Model) -> list[Cost]:
    """Operations and cache for rows of 1,024, 4,096, ... tokens and of the model's context.

    A weight costs a multiplication and an addition for every place it is applied to: 2 N operations a token, N being
    the weights that take part in products (no embedding, norm or bias; the head, tied or not; of experts, the chosen
    ones). A score and its share of the mixture cost 4 `heads * head_width` a pair of places that see each other; a
    causal token of a row of T sees (T + 1) / 2 on average, hence 2 N + 2 layers * heads * head_width * (T + 1)
    (arXiv:2001.08361, section 2.1), fewer with a sliding window. Training costs three times as much: 6 N + ... .
    What is no matrix product (softmax, norms, activations, rotary positions) is not counted; experts with a capacity
    count as if they had room for all.

    An encoder with a decoder reads and writes rows of the same length; the keys and values that a decoder makes of
    what was read count as reading. A head that pools is applied once a row.
    """
    if isinstance(model, EncoderPair):
        return _alone(model.text) + _alone(model.image)
    return _both(model) if isinstance(model, EncoderDecoder) else _alone(model)


def training_operations(model: Model, length: int) -> float | None:
    """Operations of a forward and a backward pass a token (an image), for rows of `length`, as `costs` counts them.

    An encoder with a decoder reads and writes as many tokens as rows are long, and either counts as a token. None for
    a pair of encoders, whose rows are of two kinds.
    """
    if isinstance(model, EncoderPair):
        return None
    if isinstance(model, EncoderDecoder):
        reading, writing = _both_at(model, length)
        return (reading.training + writing.training) / 2
    return _alone_at(model, length if model.config.patches is None else model.config.context).training


def costs_by_layer(stack: Decoder | Encoder, length: int) -> tuple[list[float], float]:
    """Operations of a forward pass a token, for rows of `length`: of each layer, and of the head."""
    config, multiplied = stack.config, _multiplied(stack)
    layers = [0.0] * config.layers
    for name, size in multiplied.items():
        if name.startswith("blocks."):
            layers[int(name.split(".")[1])] += 2 * size
    mixing = [_attention(config, _pairs_of(config, layer, length)) / length for layer in range(config.layers)]
    head = sum(2 * size for name, size in multiplied.items() if name.startswith("head"))
    return [product + mixed for product, mixed in zip(layers, mixing, strict=True)], float(head)


def _alone(stack: Decoder | Encoder) -> list[Cost]:
    """The costs of a stack that stands alone."""
    config = stack.config
    return [_alone_at(stack, length) for length in ([config.context] if config.patches else _lengths(config.context))]


def _alone_at(stack: Decoder | Encoder, length: int) -> Cost:
    """Its cost for rows of a length."""
    config = stack.config
    units = 1 if config.patches else length
    products = sum(2 * size * _applied(config, name, length) for name, size in _multiplied(stack).items())
    kept = _cache(stack, length) if isinstance(stack, Decoder) else (0, 0)
    unit = "image" if config.patches else "token"
    return Cost(unit, length, products / units, _attention(config, _pairs(config, length)) / units, *kept)


def _both(model: EncoderDecoder) -> list[Cost]:
    """The costs of an encoder with a decoder."""
    return [cost for length in _lengths(model.config.decoder.context) for cost in _both_at(model, length)]


def _both_at(model: EncoderDecoder, length: int) -> tuple[Cost, Cost]:
    """The costs of reading and of writing rows of a length."""
    multiplied, encoder, decoder = _multiplied(model), model.config.encoder, model.config.decoder
    of_memory = ("cross.key", "cross.value")
    read = sum(size for name, size in multiplied.items() if name.startswith("encoder.") or name.endswith(of_memory))
    written = sum(multiplied.values()) - read
    reading = _attention(encoder, _pairs(encoder, length)) / length
    looking = _attention(decoder, _pairs(decoder, length) + decoder.layers * length**2) / length
    return (
        Cost("token read", length, 2 * read, reading),
        Cost("token written", length, 2 * written, looking, *_cache(model, length)),
    )


def _multiplied(model: nn.Module) -> dict[str, int]:
    """Name of each layer that is a matrix product -> numbers of its weight; of experts, those of the chosen."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            found[name] = module.weight.numel()
        elif isinstance(module, Mixture):
            every = sum(weight.numel() for weight in module.experts.parameters() if weight.dim() == 3)
            found[f"{name}.experts"] = every // module.settings.count * module.settings.chosen
        elif isinstance(module, WordHead):
            found[name] = model.get_parameter("embedding.tokens.weight").numel()  # its own has the same shape
    return found


def _applied(config: ModelConfig, layer: str, length: int) -> int:
    """The places of a row that a layer is applied to."""
    if config.patches is not None and layer.startswith("embedding."):
        return config.patches.grid[0] * config.patches.grid[1]
    pooled = config.head is not None and config.head.pool is not None
    return 1 if pooled and layer.startswith("head") else length


def _pairs(config: ModelConfig, length: int) -> int:
    """Pairs of a query and a key it sees, over a row and all layers."""
    return sum(_pairs_of(config, layer, length) for layer in range(config.layers))


def _pairs_of(config: ModelConfig, layer: int, length: int) -> int:
    """The same of one layer."""
    if not config.causal:
        return length**2
    most = min(config.window(layer) or length, length)
    return most * (most + 1) // 2 + (length - most) * most


def _attention(config: ModelConfig, pairs: int) -> int:
    """Operations of scores and mixtures for so many pairs."""
    return 4 * config.heads * config.head_width * pairs


def _cache(model: Decoder | EncoderDecoder, length: int) -> tuple[int, int]:
    """Numbers of keys and values of a row: all that are kept, and those that are needed."""
    config = model.config.decoder if isinstance(model, EncoderDecoder) else model.config
    layers = [layer.keys.numel() + layer.values.numel() for layer in model.new_cache(1, length).layers]
    needed = (size // length * min(config.window(i) or length, length) for i, size in enumerate(layers))
    times = 2 if config.cross else 1  # as much again for what was read
    return times * sum(layers), times * sum(needed)


def _lengths(context: int) -> list[int]:
    made: list[int] = []
    while SHORTEST * 4 ** len(made) < context:
        made.append(SHORTEST * 4 ** len(made))
    return [*made, context]
