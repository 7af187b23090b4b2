"""`danlu model`: what a checkpoint weighs and costs, and what a family is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from danlu.artifact import figure
from danlu.console import result, say, table
from danlu.errors import DanluError, nearest
from danlu.model.checkpoint import INSTALLED, WAYS, StoredModel
from danlu.model.config import AnyConfig, EncoderDecoderConfig, ModelConfig, PairConfig
from danlu.model.families.family import Family
from danlu.model.families.known import FAMILIES
from danlu.model.head import WordHead
from danlu.model.mixture import Mixture
from danlu.model.names import Place
from danlu.model.transformer import Decoder, Encoder, EncoderDecoder, EncoderPair, Model, make_model

BYTES = {"bf16": 2, "fp32": 4}
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
# How Hugging Face ends an architecture's name -> its body and its head.
ENDINGS = {
    "ForCausalLM": ("decoder", "words"),
    "LMHeadModel": ("decoder", "words"),
    "ForConditionalGeneration": ("encoder and decoder", "words"),
    "ForMaskedLM": ("encoder", "masked words"),
    "ForSequenceClassification": ("encoder", "labels of a text"),
    "ForTokenClassification": ("encoder", "labels of every token"),
    "ForQuestionAnswering": ("encoder", "start and end of an answer"),
    "ForImageClassification": ("encoder", "labels of an image"),
    "CLIPModel": ("pair of encoders", "likeness of text and image"),
    "Model": ("encoder", "one vector"),
}


# --- Counting -------------------------------------------------------------------------------------------------------


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
    return sorted(found.values(), key=_place)


def _place(part: Part) -> tuple[int, int]:
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
    What is no matrix product (softmax, norms, activations, rotary positions) is not counted.

    Experts with a capacity count as if they had room for all.

    An encoder with a decoder reads and writes rows of the same length; the keys and values that a decoder makes of
    what was read count as reading. A head that pools is applied once a row.
    """
    if isinstance(model, EncoderPair):
        return _alone(model.text) + _alone(model.image)
    return _both(model) if isinstance(model, EncoderDecoder) else _alone(model)


def _alone(stack: Decoder | Encoder) -> list[Cost]:
    """The costs of a stack that stands alone."""
    config, multiplied = stack.config, _multiplied(stack)
    made = []
    for length in [config.context] if config.patches else _lengths(config.context):
        units = 1 if config.patches else length
        products = sum(2 * size * _places(config, name, length) for name, size in multiplied.items())
        kept = _cache(stack, length) if isinstance(stack, Decoder) else (0, 0)
        unit = "image" if config.patches else "token"
        made.append(Cost(unit, length, products / units, _attention(config, _pairs(config, length)) / units, *kept))
    return made


def _both(model: EncoderDecoder) -> list[Cost]:
    """The costs of an encoder with a decoder."""
    multiplied, encoder, decoder = _multiplied(model), model.config.encoder, model.config.decoder
    of_memory = ("cross.key", "cross.value")
    read = sum(size for name, size in multiplied.items() if name.startswith("encoder.") or name.endswith(of_memory))
    written = sum(multiplied.values()) - read
    made = []
    for length in _lengths(decoder.context):
        reading = _attention(encoder, _pairs(encoder, length)) / length
        looking = _attention(decoder, _pairs(decoder, length) + decoder.layers * length**2) / length
        made.append(Cost("token read", length, 2 * read, reading))
        made.append(Cost("token written", length, 2 * written, looking, *_cache(model, length)))
    return made


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


def _places(config: ModelConfig, layer: str, length: int) -> int:
    """The places of a row that a layer is applied to."""
    if config.patches is not None and layer.startswith("embedding."):
        return config.patches.grid[0] * config.patches.grid[1]
    pooled = config.head is not None and config.head.pool is not None
    return 1 if pooled and layer.startswith("head") else length


def _pairs(config: ModelConfig, length: int) -> int:
    """Pairs of a query and a key it sees, over a row and all layers."""
    if not config.causal:
        return config.layers * length**2
    windows = [min(config.window(layer) or length, length) for layer in range(config.layers)]
    return sum(most * (most + 1) // 2 + (length - most) * most for most in windows)


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


# --- Describing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckpointFacts:
    """A checkpoint: where it lies, what it is, what it weighs and costs."""

    path: Path
    family: Family
    config: AnyConfig
    parts: Sequence[Part]
    costs: Sequence[Cost]

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(part.total for part in self.parts)

    @property
    def active(self) -> int:
        """Parameters that each token meets."""
        return sum(part.active for part in self.parts)

    def plain(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "path": str(self.path),
            "architecture": self.family.architecture,
            "family": self.family.model_type,
            "config": asdict(self.config),
            "parameters": {"total": self.total, "active": self.active, "parts": [asdict(part) for part in self.parts]},
            "weights": {kind: figure(self.total * size, "byte") for kind, size in BYTES.items()},
            "costs": [_plain(cost) for cost in self.costs],
        }


@dataclass(frozen=True)
class FamilyFacts:
    """A family by the name it was asked for: its architectures."""

    name: str
    families: Sequence[Family]

    def plain(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"family": self.name, "architectures": self.architectures(), "weights": self.weights()}

    def architectures(self) -> list[dict[str, Any]]:
        """Name, body, head, and name in GGUF (None where there is none) of each."""
        return [
            {"architecture": label, **_kind(family.architecture), "gguf": family.gguf}
            for label, family in zip(self._labels(), self.families, strict=True)
        ]

    def weights(self) -> list[dict[str, Any]]:
        """Each kind of weight: our name, Hugging Face's and GGUF's, and the architectures that name it so."""
        found: dict[tuple[str, str, str | None], list[str]] = {}
        for label, family in zip(self._labels(), self.families, strict=True):
            for ours, to in family.weights.items():
                there = family.gguf_weights.get(ours)
                names = ours, _name(to), None if there is None else _name(there)
                found.setdefault(names, []).append(label)
        keys = ("ours", "hugging_face", "gguf")
        return [{**dict(zip(keys, names, strict=True)), "in": labels} for names, labels in found.items()]

    def _labels(self) -> list[str]:
        """Architectures; some have a form with gated feed-forwards and one without."""
        stated = [family.architecture for family in self.families]
        gated = [any(ours.endswith("feedforward.gate") for ours in family.weights) for family in self.families]
        return [
            f"{name}, gated" if gates and stated.count(name) > 1 else name
            for name, gates in zip(stated, gated, strict=True)
        ]


def describe(ref: str) -> CheckpointFacts | FamilyFacts:
    """What there is to know about a checkpoint, whose weights are not read, or about a family.

    Args:
        ref: whatever `find_checkpoint` knows, or a family's model_type or architecture.

    Raises DanluError where it is neither; see also `StoredModel.open`.
    """
    named = [family for family in FAMILIES if ref in (family.model_type, family.architecture)]
    here = Path(ref).expanduser().exists()
    if named and not here:
        return FamilyFacts(ref, named)
    if named:
        say(f"the directory {ref} is meant; for the family:  danlu model {named[0].architecture}")
    if not here and "/" not in ref and not ref.startswith(INSTALLED):
        raise _unknown(ref)
    stored = StoredModel.open(ref)
    with torch.device("meta"):
        model = make_model(stored.config)
    return CheckpointFacts(stored.path, stored.family, stored.config, count_parameters(model), costs(model))


def _unknown(ref: str) -> DanluError:
    known = {name.lower(): name for family in FAMILIES for name in (family.model_type, family.architecture)}
    close = nearest(ref.lower(), list(known))
    hint = f"did you mean {known[close]}?  " if close else ""
    families = ", ".join(dict.fromkeys(family.model_type for family in FAMILIES))
    return DanluError("is neither a family nor a model", where=ref, fix=f"{hint}families: {families}\n  models: {WAYS}")


def _plain(cost: Cost) -> dict[str, Any]:
    made = {
        "unit": cost.unit,
        "context": cost.context,
        "forward": figure(cost.forward, f"FLOP/{cost.unit}"),
        "training": figure(cost.training, f"FLOP/{cost.unit}"),
        "of_weights": figure(cost.weights, f"FLOP/{cost.unit}"),
        "of_attention": figure(cost.attention, f"FLOP/{cost.unit}"),
    }
    if cost.cache:
        made["cache"] = {kind: figure(cost.cache * size, "byte") for kind, size in BYTES.items()}
        made["cache_needed"] = {kind: figure(cost.needed * size, "byte") for kind, size in BYTES.items()}
    return made


def _kind(architecture: str) -> dict[str, str]:
    """Body and head, as far as Hugging Face's way of naming tells."""
    body, head = next((kind for end, kind in ENDINGS.items() if architecture.endswith(end)), ("", ""))
    return {"body": body, "head": head}


def _name(to: str | Place) -> str:
    """A weight's name in a format, and what part of the tensor it is."""
    place = Place.of(to)
    return place.name if place.parts == 1 else f"{place.name} ({place.part + 1} of {place.parts})"


# --- Printing -------------------------------------------------------------------------------------------------------


def print_facts(facts: CheckpointFacts | FamilyFacts) -> None:
    """What `describe` found, as tables on standard output."""
    if isinstance(facts, FamilyFacts):
        _print_family(facts)
    else:
        _print_checkpoint(facts)


def _print_family(facts: FamilyFacts) -> None:
    rows = [(x["architecture"], x["body"], x["head"], x["gguf"] or "no") for x in facts.architectures()]
    table(facts.name, ("architecture", "body", "head", "in GGUF"), rows)
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in facts.weights():
        groups.setdefault(", ".join(line["in"]), []).append(line)
    for architectures, lines in groups.items():
        columns = (
            ("ours", "Hugging Face's", "GGUF's") if any(line["gguf"] for line in lines) else ("ours", "Hugging Face's")
        )
        cells = [(line["ours"], line["hugging_face"], line["gguf"] or "")[: len(columns)] for line in lines]
        table(f"weights of {architectures}", columns, cells)
    result("{i} is the layer and {e} the expert; .weight or .bias follows")
    result("name a checkpoint to see its numbers:  danlu model DIRECTORY")


def _print_checkpoint(facts: CheckpointFacts) -> None:
    result(f"{facts.path}: {facts.family.architecture}")
    for name, config in _stacks(facts.config).items():
        result(f"  {name}{_shape(config)}")
    rows = [(part.name, f"{part.total:,}", f"{part.active:,}") for part in facts.parts]
    rows.append(("all", f"{facts.total:,}", f"{facts.active:,}"))
    columns = ("part", "parameters", "of them for each token")
    whole = facts.total == facts.active
    table("parameters", columns[:2] if whole else columns, [row[:2] for row in rows] if whole else rows)
    sizes = (f"{_scaled(facts.total * size, 'B')} in {kind}" for kind, size in BYTES.items())
    result(f"memory of the weights: {', '.join(sizes)}")
    _print_costs(facts.costs)
    if any(config.tied for config in _stacks(facts.config).values()):
        result("the head multiplies by the embedding, and counts among the operations, but not among the parameters")
    windows = {config.sliding_window for config in _stacks(facts.config).values()} - {None}
    last = facts.costs[-1]
    if windows and last.needed < last.cache:
        kept, least = (_scaled(number * BYTES["bf16"], "B") for number in (last.cache, last.needed))
        result(
            f"layers with a window need only its {windows.pop():,} tokens in the cache, "
            f"{least} in all for {last.context:,}; Danlu keeps all, {kept}"
        )


def _print_costs(costs: Sequence[Cost]) -> None:
    rows = []
    for cost in costs:
        operations = (cost.weights, cost.attention, cost.forward, cost.training)
        caches = [_scaled(cost.cache * size, "B") if cost.cache else "" for size in BYTES.values()]
        rows.append([f"{cost.context:,}", cost.unit, *(_scaled(number, "FLOP") for number in operations), *caches])
    columns = ["places in a row", "each", "by weights", "by attention", "forward", "training"]
    written = any(cost.cache for cost in costs)
    columns += [f"cache of a row, {kind}" for kind in BYTES] if written else []
    table("operations and cache", columns, rows if written else [row[:6] for row in rows])


def _stacks(config: AnyConfig) -> dict[str, ModelConfig]:
    """Each stack by what stands before its shape."""
    if isinstance(config, EncoderDecoderConfig):
        return {"encoder: ": config.encoder, "decoder: ": config.decoder}
    if isinstance(config, PairConfig):
        return {"text: ": config.text, "image: ": config.image}
    return {"": config}


def _shape(config: ModelConfig) -> str:
    shared = "" if config.kv_heads == config.heads else f" and {config.kv_heads} key/value heads"
    facts = [
        f"{config.layers} layers",
        f"width {config.width:,}",
        f"{config.heads} heads{shared} of {config.head_width}",
    ]
    experts = config.experts
    if experts is None or not all(map(config.has_experts, range(config.layers))):
        facts.append(f"feed-forward {config.feedforward_width:,}")
    if experts is not None:
        facts.append(f"{experts.chosen} of {experts.count} experts of {experts.width:,}")
    if config.patches is not None:
        facts.append(f"{' x '.join(map(str, config.patches.image))} pixels")
    else:
        facts.append(f"vocabulary {config.vocab_size:,}")
    if config.sliding_window is not None:
        facts.append(f"window {config.sliding_window:,}")
    return ", ".join([*facts, f"context {config.context:,}"])


def _scaled(value: float, unit: str) -> str:
    """Four digits and a decimal prefix: 1.617 GFLOP, 269.0 MB."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            number = value / size
            return f"{number:.{3 if number < 10 else 2 if number < 100 else 1}f} {prefix}{unit}"
    return f"{value:,.0f} {unit}"
