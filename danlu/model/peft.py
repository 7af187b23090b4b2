"""Adapters in the layout of Hugging Face's PEFT library: what other tools load, and what they have trained.

Source: the files that PEFT 0.21 writes. A layer's tensors are lora_A.weight [rank, in], lora_B.weight
[out, rank] and, with DoRA, lora_magnitude_vector [out]. Where transformers keeps the matrices of all experts in one
parameter, they are [experts * rank, in], expert by expert, and [out, rank * experts], rank by rank.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from danlu.artifact import write_json
from danlu.errors import DanluError, nearest
from danlu.model.config import AnyConfig, ModelConfig
from danlu.model.families.fields import Fields
from danlu.model.families.known import family_for
from danlu.model.lora import Adapter, adaptable, adapters, attach
from danlu.model.mixture import Bank
from danlu.model.names import Found, Names, Place, Table, prefixed
from danlu.model.transformer import Decoder, EncoderDecoder, Model
from danlu.tokenizer import read_json

WEIGHTS, SETTINGS, PICKLED = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
DOWN, UP, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
TENSOR = re.compile(rf"base_model\.model\.(?P<layer>.+)\.(?P<part>{DOWN}|{UP}|{MAGNITUDE})")
# What adapter_config.json may say: what is read, and what the tensors tell or only training asks for.
READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora"),
    *("rank_pattern", "alpha_pattern", "target_parameters"),
}
NEEDLESS = {
    *("base_model_name_or_path", "revision", "task_type", "auto_mapping", "inference_mode", "peft_version"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("megatron_core", "megatron_config", "loftq_config", "eva_config", "runtime_config", "qalora_group_size"),
}
# Values that ask for nothing. Of the other ways to start an adapter, some change the base's weights too.
PLAIN = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva")}
MERGE = "merge it into its model with PEFT, and name the merged model"

# transformers 5 keeps all experts of a layer in two parameters, and published files each expert's matrices apart.
STACKED = ("gate_up_proj", "down_proj")
EXPERTS: Table = {
    "blocks.{i}.feedforward.router": "model.layers.{i}.mlp.gate",
    "blocks.{i}.feedforward.experts.gate.weight": Place("model.layers.{i}.mlp.experts.gate_up_proj", 0, 2, bare=True),
    "blocks.{i}.feedforward.experts.up.weight": Place("model.layers.{i}.mlp.experts.gate_up_proj", 1, 2, bare=True),
    "blocks.{i}.feedforward.experts.down.weight": Place("model.layers.{i}.mlp.experts.down_proj", bare=True),
}
# Model type -> our layers that are modules of other names in transformers 5 than their weights in published files.
MODULES: dict[str, Table] = {
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "vit": {
        "blocks.{i}.attention.query": "layers.{i}.attention.q_proj",
        "blocks.{i}.attention.key": "layers.{i}.attention.k_proj",
        "blocks.{i}.attention.value": "layers.{i}.attention.v_proj",
        "blocks.{i}.attention.output": "layers.{i}.attention.o_proj",
        "blocks.{i}.feedforward.up": "layers.{i}.mlp.fc1",
        "blocks.{i}.feedforward.down": "layers.{i}.mlp.fc2",
    },
}


def save_adapter(model: Model, out: Path, *, base: str) -> None:
    """Write adapter_model.safetensors (fp32) and adapter_config.json into `out`, for transformers 5.

    Where Hugging Face has several of our layers as one (GPT-2's query, key and value; experts' gate and up), theirs
    gets one adapter whose rank is the sum of ours; it computes the same. PEFT knows neither dropout nor DoRA beside
    stacked experts: with them the dropout, which is for training alone, is written as 0, and PEFT refuses DoRA.

    Args:
        model: a model with adapters, not merged.
        base: the name of the checkpoint they belong to, for whoever loads them.

    Raises DanluError where there are no adapters, or Hugging Face has no name for an adapted layer.
    """
    targets = _outward(model)
    tensors: dict[str, Tensor] = {}
    for target, thin in targets.items():
        for part, tensor in _flat(thin).items():
            name = f"base_model.model.{_keeper(target, targets)}.{part}"
            tensors[name] = tensor.detach().float().clone(memory_format=torch.contiguous_format)
    out.mkdir(parents=True, exist_ok=True)
    aside = out / ".adapter_model.aside"
    save_file(tensors, aside, metadata={"format": "pt"})
    aside.replace(out / WEIGHTS)
    write_json(out / SETTINGS, _settings(model, targets, base))


def load_adapter(model: Model, path: Path) -> list[str]:
    """Freeze `model` and put the adapters of a PEFT directory beside its layers: LoRA, and DoRA.

    The model must be what they were trained for; its dtype may be another. Layers' names may be those of transformers
    5 or of published files.

    Args:
        model: without adapters.
        path: a directory with adapter_config.json and adapter_model.safetensors.

    Returns the names of the adapted layers. Raises DanluError, before anything is changed, where the directory holds
    another kind of adapter, a tensor is missing, not known or of another shape, or there are only pickled weights.
    """
    settings = _Settings.read(path)
    layers = _inward(model, _read(path, settings.dora), settings, path / WEIGHTS)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)  # every start is overwritten
    for name, thin in layers.items():
        adapter = attach(
            model,
            name,
            rank=thin.rank,
            alpha=thin.scale * thin.rank,
            dropout=settings.dropout,
            generator=generator,
            dora=settings.dora,
        )
        with torch.no_grad():
            adapter.lora_down.copy_(thin.down)
            adapter.lora_up.copy_(thin.up)
            if adapter.lora_magnitude is not None and thin.magnitude is not None:
                adapter.lora_magnitude.copy_(thin.magnitude)
    return list(layers)


@dataclass(frozen=True)
class _Thin:
    """One adapter's tensors.

    Attributes:
        down, up: [rank, in] and [out, rank], or those of every expert, [experts, rank, in] and [experts, out, rank].
        magnitude: DoRA's, [out] or [experts, out].
        scale: what the change is multiplied by.
    """

    down: Tensor
    up: Tensor
    magnitude: Tensor | None
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[-2]


def _modules(config: AnyConfig) -> Names:
    """What transformers 5 calls our layers' weights."""
    family = family_for(config)
    renamed = MODULES.get(family.model_type, {})
    inside = any(Place.of(to).name.startswith(family.prefix) for ours, to in family.weights.items() if ours in renamed)
    same = {ours: to for ours, to in family.weights.items() if f"{ours}.weight" not in renamed}
    return Names({**same, **prefixed(family.prefix if inside else "", renamed)})


def _layer(part: Found) -> str:
    return part.ours.removesuffix(".weight")


def _outward(model: Model) -> dict[str, _Thin]:
    """The adapters by the names of Hugging Face's weights."""
    names = _modules(model.config)
    dora = any(adapter.lora_magnitude is not None for _, adapter in adapters(model))
    found: dict[str, _Thin] = {}
    for name, adapter in adapters(model):
        place = names.place(f"{name}.weight")
        if place is None:
            raise DanluError(f"Hugging Face has no name for the layer {name}", where="saving adapters")
        for expert in range(len(adapter.lora_down)) if place.split else (0,):
            target = place.name.replace("{e}", str(expert))
            if target not in found:
                parts = sorted(names.ours(target), key=lambda part: part.place.part)
                found[target] = _joined(
                    [_taken(model.get_submodule(_layer(part)), part.expert, dora) for part in parts]
                )
    if not found:
        raise DanluError("the model has no adapters", where="saving adapters", fix="save them before they are merged")
    return found


def _taken(module: nn.Module, expert: int | None, dora: bool) -> _Thin:
    """A layer's adapter, or one expert's of it; of rank 0 where the layer has none."""
    if not isinstance(module, Adapter):
        weight = module.weight
        assert isinstance(weight, Tensor)
        *experts, outputs, inputs = weight.shape
        length = torch.linalg.vector_norm(weight.float(), dim=-1) if dora else None
        return _Thin(weight.new_empty(*experts, 0, inputs), weight.new_empty(*experts, outputs, 0), length, 1.0)
    magnitude: Tensor | None = module.lora_magnitude
    if dora and magnitude is None:  # plain LoRA is DoRA whose magnitude is the length that a row has anyway
        magnitude = module.lengths()
    if expert is None:
        return _Thin(module.lora_down, module.lora_up, magnitude, module.scale)
    own = None if magnitude is None else magnitude[expert]
    return _Thin(module.lora_down[expert], module.lora_up[expert], own, module.scale)


def _joined(parts: Sequence[_Thin]) -> _Thin:
    """One adapter for layers that are one, side by side along the outputs: their changes, each by itself."""
    if len(parts) == 1:
        return parts[0]
    scale = next(part.scale for part in parts if part.rank)
    *experts, _, _ = parts[0].up.shape
    up = torch.zeros(*experts, sum(part.up.shape[-2] for part in parts), sum(part.rank for part in parts))
    row = column = 0
    for part in parts:
        below, right = row + part.up.shape[-2], column + part.rank
        up[..., row:below, column:right] = part.up.detach() * (part.scale / scale)
        row, column = below, right
    lengths = [part.magnitude for part in parts if part.magnitude is not None]
    down = torch.cat([part.down for part in parts], -2)
    return _Thin(down, up, torch.cat(lengths, -1) if lengths else None, scale)


def _flat(thin: _Thin) -> dict[str, Tensor]:
    """The tensors as PEFT keeps them."""
    down, up = thin.down, thin.up
    if down.dim() == 3:
        down, up = down.flatten(0, 1), up.permute(1, 2, 0).flatten(1)
    return {DOWN: down, UP: up} | ({} if thin.magnitude is None else {MAGNITUDE: thin.magnitude})


def _keeper(target: str, targets: Mapping[str, Any]) -> str:
    """The module under whose name PEFT saves the adapter of a weight."""
    module, _, kind = target.rpartition(".")
    # Two parameters of one module have two wrappers, one in the other; the first parameter's is inside.
    return f"{module}.base_layer" if kind == STACKED[0] and f"{module}.{STACKED[1]}" in targets else module


def _settings(model: Model, targets: Mapping[str, _Thin], base: str) -> dict[str, Any]:
    """adapter_config.json. Rank and alpha are the commonest; what has others is listed."""
    config = model.config
    # In mixtures of transformers 5 routers and experts are no linear layers, and PEFT takes any gate_proj for theirs.
    stacked = [name for name in targets if ".mlp." in name] if getattr(config, "experts", None) else []
    modules = [name.removesuffix(".weight") for name in targets if name not in stacked]
    kinds = {
        name if name in stacked else name.removesuffix(".weight"): (thin.rank, thin.scale * thin.rank)
        for name, thin in targets.items()
    }
    (rank, alpha), _ = Counter(kinds.values()).most_common(1)[0]
    odd = {name: kind for name, kind in kinds.items() if kind != (rank, alpha)}
    names = _modules(config)
    places = [names.place(f"{name}.weight") for name, _ in adapters(model)]
    return {
        "peft_type": "LORA",
        "task_type": _task(model),
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: rank for name, (rank, _) in odd.items()},
        "alpha_pattern": {name: alpha for name, (_, alpha) in odd.items()},
        "lora_dropout": 0.0 if stacked else max(adapter.dropout for _, adapter in adapters(model)),
        "target_modules": sorted(modules),
        "target_parameters": sorted(stacked) or None,
        "use_dora": any(thin.magnitude is not None for thin in targets.values()),
        "bias": "none",
        "fan_in_fan_out": any(place is not None and place.transposed for place in places),
        "inference_mode": True,
    }


def _task(model: Model) -> str | None:
    """The wrapper that PEFT loads an adapter in; the plain one for all but models that write text."""
    if isinstance(model, EncoderDecoder):
        return "SEQ_2_SEQ_LM"
    head = model.config.head if isinstance(model.config, ModelConfig) else None
    return "CAUSAL_LM" if isinstance(model, Decoder) and head is not None and head.task == "words" else None


@dataclass(frozen=True)
class _Settings:
    """What adapter_config.json says about the computation.

    Attributes:
        file: for messages.
        rank, alpha: of the layers that have no others.
        ranks, alphas: patterns of names, and what those layers have.
        parameters: the weights that are adapted by their own names, or ends of them, not by their modules'.
        dropout: of the adapters' inputs, in training.
        dora: each layer has a magnitude.
        stabilised: the change is scaled by alpha / sqrt(rank) (arXiv:2312.03732).
    """

    file: Path
    rank: int
    alpha: float
    ranks: Mapping[str, Any]
    alphas: Mapping[str, Any]
    parameters: tuple[str, ...]
    dropout: float
    dora: bool
    stabilised: bool

    @classmethod
    def read(cls, path: Path) -> _Settings:
        file = path / SETTINGS
        if not file.is_file():
            raise DanluError(f"is no adapter: it has no {SETTINGS}", where=path)
        said = read_json(file)
        if said.get("peft_type") != "LORA":
            what = f"is an adapter of type {said.get('peft_type')!r}; only LORA is read"
            raise DanluError(what, where=file, fix=MERGE)
        for key, value in said.items():
            if value and key not in READ | NEEDLESS and value not in PLAIN.get(key, ()):
                raise DanluError(f"{key} is {value!r}, a form of LoRA that is not read", where=file, fix=MERGE)
        fields = Fields(said, file)
        made = cls(
            file,
            rank=fields.integer("r"),
            alpha=fields.number("lora_alpha"),
            ranks=fields.part("rank_pattern").hf,
            alphas=fields.part("alpha_pattern").hf,
            parameters=tuple(map(str, fields.get("target_parameters", []))),
            dropout=fields.number("lora_dropout", 0.0),
            dora=fields.flag("use_dora"),
            stabilised=fields.flag("use_rslora"),
        )
        if not 0 <= made.dropout < 1:
            raise DanluError(f"lora_dropout is {made.dropout}; it must lie in [0, 1)", where=file)
        return made

    def adapts(self, weight: str) -> bool:
        """Whether a weight is adapted by its own name."""
        return any(weight == name or weight.endswith(f".{name}") for name in self.parameters)

    def rank_of(self, name: str) -> int:
        """The rank of an adapter."""
        rank = self._listed(self.ranks, name, self.rank)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise DanluError(f"{name} has rank {rank!r}; it must be a whole number from 1", where=self.file)
        return rank

    def scale_of(self, name: str) -> float:
        """What an adapter's change is multiplied by."""
        alpha, rank = self._listed(self.alphas, name, self.alpha), self.rank_of(name)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise DanluError(f"{name} has alpha {alpha!r}; it must be a number", where=self.file)
        return alpha / (math.sqrt(rank) if self.stabilised else rank)

    def _listed(self, patterns: Mapping[str, Any], name: str, default: Any) -> Any:
        """The first pattern decides that matches a name, or its end from a dot on."""
        for pattern, value in patterns.items():
            try:
                if re.fullmatch(rf"(.*\.)?({pattern})", name):
                    return value
            except re.error as error:
                raise DanluError(f"{pattern} is no regular expression: {error}", where=self.file) from None
        return default


def _read(path: Path, dora: bool) -> dict[str, dict[str, Tensor]]:
    """The tensors of every adapter in a file, fp32, by the module's name and the part; none is missing."""
    file = path / WEIGHTS
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _tensors(path).items():
        match = TENSOR.fullmatch(name)
        if match is None or (match["part"] == MAGNITUDE and not dora):
            kind = "DoRA" if dora else "LoRA"
            raise DanluError(f"the tensor {name} is no part of a {kind} adapter of linear layers", where=file)
        found.setdefault(match["layer"], {})[match["part"]] = tensor.float()
    for layer, parts in found.items():
        for part in (DOWN, UP, MAGNITUDE) if dora else (DOWN, UP):
            if part not in parts:
                raise DanluError(f"{layer}.{part} is missing", where=file, fix="the file is incomplete")
    return found


def _tensors(path: Path) -> dict[str, Tensor]:
    file = path / WEIGHTS
    if not file.is_file():
        if (path / PICKLED).is_file():
            what = f"has only {PICKLED}, a pickle; unpickling can run any program, so Danlu never does"
            raise DanluError(what, where=path, fix="where you trust it, save it again with a current PEFT")
        raise DanluError(f"has no {WEIGHTS}", where=path, fix="download the weights too")
    try:
        found = load_file(file)
    except (SafetensorError, OSError) as error:
        raise DanluError(f"is damaged or cut short: {error}", where=file, fix="download or save it again") from None
    if not found:
        raise DanluError("holds no tensors", where=file)
    return found


def _inward(
    model: Model, stored: Mapping[str, Mapping[str, Tensor]], settings: _Settings, file: Path
) -> dict[str, _Thin]:
    """The adapters by the names of our layers, experts' together, their shapes those of the layers."""
    layers = adaptable(model)
    found: dict[str, dict[int | None, _Thin]] = {}
    for module, tensors in stored.items():
        name, parts = _meant(model.config, module, settings)
        if not parts or any(_layer(part) not in layers for part in parts):
            raise _unknown(module, [_modules(model.config).theirs(f"{layer}.weight") for layer in layers], file)
        weights = {_layer(part): layers[_layer(part)].weight for part in parts}
        thin = _fitted(tensors, name, weights, parts[0], settings, file)
        for part in parts:
            found.setdefault(_layer(part), {})[part.expert] = _part(thin, part.place)
    return {name: _banked(name, thins, layers[name], file) for name, thins in found.items()}


def _meant(config: AnyConfig, module: str, settings: _Settings) -> tuple[str, list[Found]]:
    """What an adapter is listed as, and the layers of ours that it changes."""
    new, published = _modules(config), family_for(config).names
    outer = module.removesuffix(".base_layer")
    stacked = [f"{outer}.{kind}" for kind in STACKED if settings.adapts(f"{outer}.{kind}")]
    if stacked:
        name = stacked[0] if outer != module else stacked[-1]
        return name, new.ours(name)
    weight = f"{module}.weight"
    return weight if settings.adapts(weight) else module, new.ours(weight) or published.ours(weight)


def _unknown(module: str, known: Sequence[str | None], file: Path) -> DanluError:
    close = nearest(module, [name.removesuffix(".weight") for name in known if name is not None])
    hint = f"the nearest is {close}; " if close else ""
    what = f"{module} is no linear layer of the model"
    return DanluError(what, where=file, fix=f"{hint}the adapter and the model do not belong together")


def _fitted(
    tensors: Mapping[str, Tensor],
    name: str,
    weights: Mapping[str, Tensor],
    part: Found,
    settings: _Settings,
    file: Path,
) -> _Thin:
    """An adapter as ours are kept, of the shapes that the layers' weights ask for."""
    first = next(iter(weights.values()))
    rank, scale = settings.rank_of(name), settings.scale_of(name)
    outputs, inputs = sum(weight.shape[-2] for weight in weights.values()), first.shape[-1]
    experts = first.shape[0] if first.dim() == 3 and part.expert is None else None
    count = experts or 1
    length = [outputs] if experts is None else [experts, outputs]
    shapes = {DOWN: [count * rank, inputs], UP: [outputs, rank * count], MAGNITUDE: length}
    for kind, tensor in tensors.items():
        if list(tensor.shape) != shapes[kind]:
            what = f"{name}: {kind} has shape {list(tensor.shape)}; with rank {rank} it must be {shapes[kind]}"
            raise DanluError(what, where=file, fix="the adapter and the model do not belong together")
    down, up = tensors[DOWN], tensors[UP]
    if experts is not None:
        down, up = down.unflatten(0, (experts, rank)), up.unflatten(1, (rank, experts)).permute(2, 0, 1)
    return _Thin(down, up, tensors.get(MAGNITUDE), scale)


def _part(thin: _Thin, place: Place) -> _Thin:
    """What an adapter does to one of the layers that are stored together."""
    up = thin.up.chunk(place.parts, -2)[place.part]
    magnitude = None if thin.magnitude is None else thin.magnitude.chunk(place.parts, -1)[place.part]
    return _Thin(thin.down, up, magnitude, thin.scale)


def _banked(name: str, thins: Mapping[int | None, _Thin], layer: nn.Linear | Bank, file: Path) -> _Thin:
    """The adapters of a layer's experts as one."""
    if None in thins:
        return thins[None]
    parts = [thins[expert] for expert in range(len(layer.weight)) if expert in thins]
    if len(parts) < len(layer.weight):
        raise DanluError(f"{name}: only {len(parts)} of {len(layer.weight)} experts have an adapter", where=file)
    if len({(part.rank, part.scale) for part in parts}) > 1:
        raise DanluError(f"{name}: the adapters of its experts differ in rank or scale", where=file)
    magnitudes = [part.magnitude for part in parts if part.magnitude is not None]
    return _Thin(
        torch.stack([part.down for part in parts]),
        torch.stack([part.up for part in parts]),
        torch.stack(magnitudes) if magnitudes else None,
        parts[0].scale,
    )
