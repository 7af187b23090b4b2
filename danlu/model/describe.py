"""`danlu model`: what a checkpoint weighs and costs, and what a family is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from danlu.artifact import figure
from danlu.console import result, say, table
from danlu.errors import DanluError, nearest
from danlu.model.checkpoint import INSTALLED, WAYS, StoredModel
from danlu.model.config import AnyConfig, EncoderDecoderConfig, ModelConfig, PairConfig
from danlu.model.costs import Cost, Part, costs, count_parameters
from danlu.model.families.family import Family
from danlu.model.families.known import FAMILIES
from danlu.model.names import Place
from danlu.model.transformer import make_model

BYTES = {"bf16": 2, "fp32": 4}
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
        say(f"the path {ref} is meant; for the family:  danlu model {named[0].architecture}")
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
