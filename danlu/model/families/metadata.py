"""ModelConfig <-> the metadata of a GGUF file, for every architecture that Danlu and llama.cpp both compute.

Keys: GGUF specification, "LLM" section. What llama.cpp makes of them: its src/models/*.cpp, as of llama-cpp-python
0.3.36, the oldest that Danlu runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from danlu.errors import DanluError
from danlu.gguf_header import Header
from danlu.model.config import Activation, Experts, Learned, ModelConfig, RopeScaling, Rotary
from danlu.model.families.known import family_for
from danlu.model.position import frequencies

REQUIRED = {
    "context": "context_length",
    "width": "embedding_length",
    "layers": "block_count",
    "feedforward_width": "feed_forward_length",
    "heads": "attention.head_count",
}
# A key of Danlu's own for Llama 3's scaling, of which GGUF holds only a tensor of computed factors (rope_freqs):
# the factor, the original context, the low and the high frequency.
LLAMA3_SCALING = "danlu.llama3_scaling"
# Llama 3.1 to 3.3, the only published models with this scaling, differ in the factor alone.
LLAMA3_CONTEXT = 8192
# Of Gemma 3, where a file says nothing else: every sixth layer has no window, and the others' rotary base.
GEMMA_PERIOD, GEMMA_LOCAL_BASE = 6, 10_000.0
# llama.cpp tells Gemma 3 27B by its layers; only there are scores not scaled by the width of a head.
GEMMA_27B_LAYERS = 62

# Keys under an architecture's name that are read here or change nothing.
SHAPE_KEYS = {
    *REQUIRED.values(),
    *("vocab_size", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.causal", "tensor_data_layout"),
}
ROTARY_KEYS = {
    *("attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.dimension_count", "rope.freq_base"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.finetuned", "rope.scale_linear"),
}
EXPERT_KEYS = {"expert_count", "expert_used_count"}
QWEN_EXPERT_KEYS = {*EXPERT_KEYS, "expert_feed_forward_length", "expert_shared_feed_forward_length"}


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp computes under one name, where names differ.

    Attributes:
        keys: what its files may say.
        activation: of the feed-forward.
        output_bias: attention's output may have a bias.
        free_heads: heads may be of another width than width / heads.
        ties: the head may share the embedding's weight.
        scalings: ways to stretch rotary positions.
        normalised: in a mixture, the weights of a token's experts are scaled to sum to 1.
    """

    keys: set[str]
    activation: Activation = "silu"
    output_bias: bool = False
    free_heads: bool = True
    ties: bool = True
    scalings: tuple[str, ...] = ("linear", "yarn")
    normalised: bool = True


ARCHITECTURES = {
    "llama": Architecture(
        SHAPE_KEYS | ROTARY_KEYS | EXPERT_KEYS, output_bias=True, scalings=("linear", "llama3", "yarn")
    ),
    "qwen2": Architecture(SHAPE_KEYS | ROTARY_KEYS, free_heads=False),
    "qwen3": Architecture(SHAPE_KEYS | ROTARY_KEYS),
    "qwen2moe": Architecture(
        SHAPE_KEYS | ROTARY_KEYS | QWEN_EXPERT_KEYS, free_heads=False, ties=False, normalised=False
    ),
    "qwen3moe": Architecture(SHAPE_KEYS | ROTARY_KEYS | QWEN_EXPERT_KEYS),
    "gemma3": Architecture(
        SHAPE_KEYS | ROTARY_KEYS | {"attention.sliding_window_pattern", "rope.freq_base_swa"},
        activation="gelu_tanh",
        scalings=("linear",),
    ),
    "gpt2": Architecture(SHAPE_KEYS | {"attention.layer_norm_epsilon"}, activation="gelu_tanh", output_bias=True),
}


def read_metadata(header: Header, factors: list[float] | None) -> ModelConfig:
    """The configuration of a GGUF model. Biases, extra norms and a separate head show in the names of its tensors.

    Settings that matter only in training (dropout, losses on routers) are not in such files; they are off.

    Args:
        header: of the file.
        factors: the content of the tensor rope_freqs.weight, which Llama 3 has.

    Raises DanluError where the architecture is not known, or a key is missing or asks for what Danlu does not compute.
    """
    arch = header.need("general.architecture", str)
    if arch not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise DanluError(f"the GGUF architecture {arch} is not known", where=header.path, fix=f"known: {known}")
    _refuse_foreign(header, arch)
    facts = _read_shape(header, arch)
    if arch == "gpt2":
        facts |= _read_gpt2(header)
    else:
        facts |= _read_rotary(header, arch, factors, facts["head_width"])
    if arch == "gemma3":
        facts |= _read_gemma(header, facts)
    experts = _read_experts(header, arch, facts["feedforward_width"])
    config = ModelConfig(**facts, activation=ARCHITECTURES[arch].activation, experts=experts)
    _refuse_differences(config, arch, header.path)
    return config


def write_metadata(config: ModelConfig) -> dict[str, Any]:
    """The metadata that says this configuration, architecture included; settings of training are left out.

    Raises DanluError where llama.cpp would compute something else.
    """
    family = family_for(config)
    arch = family.gguf
    if arch is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise DanluError(f"GGUF has no {family.architecture} that llama.cpp would compute", fix=f"it has: {known}")
    _refuse_differences(config, arch, None)
    facts = asdict(config)
    keys: dict[str, Any] = {key: facts[name] for name, key in REQUIRED.items()}
    keys |= {
        "vocab_size": config.vocab_size,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_width,
        "attention.value_length": config.head_width,
    }
    if config.experts is not None:
        keys |= _write_experts(config.experts, arch)
    if arch == "gpt2":
        keys["attention.layer_norm_epsilon"] = float(config.norm_epsilon)
    if arch == "gemma3":
        keys |= _write_gemma(config)
    elif config.sliding_window is not None:
        # llama.cpp sees everything in these architectures; within one window that is the same.
        keys["context_length"] = min(config.context, config.sliding_window)
        keys["attention.sliding_window"] = config.sliding_window
    extra: dict[str, Any] = {}
    if isinstance(config.positions, Rotary):
        keys |= _write_rotary(config, config.positions)
        extra = _write_llama3(config.positions.scaling)
    return {"general.architecture": arch, **{f"{arch}.{key}": value for key, value in keys.items()}, **extra}


def _refuse_foreign(header: Header, arch: str) -> None:
    """Stop at keys that are not read, unless they say 0, false or nothing."""
    if header.find(f"{arch}.attention.causal", bool) is False:
        what = f"{arch}.attention.causal is False, but Danlu computes {arch} as a causal decoder"
        raise DanluError(what, where=header.path, fix="use the model's Hugging Face directory")
    known = ARCHITECTURES[arch].keys
    for key, value in header.metadata.items():
        own = key.removeprefix(f"{arch}.")
        if own != key and own not in known and value not in (0, 0.0, False, "", "none"):
            what = f"{key} is {value!r}, which may change the computation and is not known to Danlu"
            raise DanluError(what, where=header.path, fix="use the model's Hugging Face directory")


def _refuse_differences(config: ModelConfig, arch: str, where: Path | None) -> None:
    for difference in _differences(config, arch):
        raise DanluError(difference, where=where, fix="use the model's Hugging Face directory")


def _differences(config: ModelConfig, arch: str) -> Iterator[str]:
    """What llama.cpp would compute otherwise."""
    theirs = ARCHITECTURES[arch]
    if config.activation != theirs.activation:
        yield f"llama.cpp computes {arch} with the activation {theirs.activation}, not {config.activation}"
    if config.output_bias and not theirs.output_bias:
        yield f"llama.cpp's {arch} has no attention biases at the output"
    if config.heads * config.head_width != config.width and not theirs.free_heads:
        what = f"{config.heads} heads of {config.head_width} features for a width of {config.width}"
        yield f"llama.cpp's {arch} divides the width among the heads; here are {what}"
    if config.tied and not theirs.ties:
        yield f"llama.cpp's {arch} has a head of its own; here it shares the embedding's weight"
    if isinstance(config.positions, Rotary) and config.positions.scaling is not None:
        yield from _differing_scaling(config.positions.scaling, arch)
    if config.local_positions is not None and config.local_positions.scaling is not None:
        yield f"llama.cpp has no rope scaling for {arch}'s layers with a window"
    if config.experts is not None:
        yield from _differing_experts(config.experts, arch)
    if arch == "gemma3":
        scale = _gemma_scale(config.width, config.layers, config.heads, config.head_width)
        if not math.isclose(config.score_scale, scale, rel_tol=1e-6):
            yield f"llama.cpp scales gemma3's scores by {scale:.6g} at this shape, not by {config.score_scale:.6g}"


def _differing_scaling(scaling: RopeScaling, arch: str) -> Iterator[str]:
    if scaling.kind not in ARCHITECTURES[arch].scalings:
        yield f"llama.cpp has no {scaling.kind} rope scaling for {arch}"
    if (scaling.beta_fast, scaling.beta_slow) != (32.0, 1.0):
        yield "llama.cpp computes yarn with beta_fast 32 and beta_slow 1 only"


def _differing_experts(experts: Experts, arch: str) -> Iterator[str]:
    if experts.layers is not None:
        yield f"llama.cpp's {arch} has a mixture in every layer; here only layers {list(experts.layers)} have one"
    if experts.normalised != ARCHITECTURES[arch].normalised:
        does = "does not scale" if experts.normalised else "scales"
        yield f"llama.cpp's {arch} {does} the weights of a token's experts to sum to 1"
    if experts.shared_gate and not experts.shared_width:
        yield f"llama.cpp's {arch} has an expert that every token takes; here is none"


def _read_shape(header: Header, arch: str) -> dict[str, Any]:
    """What every architecture says, as fields of ModelConfig."""
    facts: dict[str, Any] = {name: header.need(f"{arch}.{key}", int) for name, key in REQUIRED.items()}
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    if "token_embd.weight" not in shapes:
        raise DanluError("has no token_embd.weight, so it is no whole model", where=header.path)
    if facts["layers"] > len(shapes):
        what = f"{arch}.block_count is {facts['layers']:,}, but the file has only {len(shapes):,} tensors"
        raise DanluError(what, where=header.path, fix="the file is incomplete; convert the model to GGUF again")
    head_width = _whole(header, f"{arch}.attention.key_length", facts["width"] // max(facts["heads"], 1))
    kinds = ("attention.value_length", "rope.dimension_count")
    widths = {head_width, *(_whole(header, f"{arch}.{kind}", head_width) for kind in kinds)}
    if len(widths) != 1:
        what = f"keys, values and rotary positions of different widths ({sorted(widths)}) are not supported"
        raise DanluError(what, where=header.path)
    return facts | {
        "vocab_size": shapes["token_embd.weight"][0],
        "kv_heads": _whole(header, f"{arch}.attention.head_count_kv", facts["heads"]),
        "head_width": head_width,
        "tied": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "output_bias": "blk.0.attn_output.bias" in shapes,
        "feedforward_bias": "blk.0.ffn_up.bias" in shapes,
        "qk_norm": "blk.0.attn_q_norm.weight" in shapes,
    }


def _read_gpt2(header: Header) -> dict[str, Any]:
    return {
        "positions": Learned(),
        "norm": "layer",
        "norm_epsilon": _short(header.need("gpt2.attention.layer_norm_epsilon", float)),
        "attention_bias": True,
        "gated": False,
    }


def _read_rotary(header: Header, arch: str, factors: list[float] | None, head_width: int) -> dict[str, Any]:
    """What Llama and its kin say."""
    base = _short(header.find(f"{arch}.rope.freq_base", float) or 10_000.0)
    scaling = _read_scaling(header, arch)
    if factors is not None and scaling is None:
        scaling = _llama3_scaling(header, factors, base, head_width)
    return {
        "positions": Rotary(base, scaling),
        "norm_epsilon": _short(header.need(f"{arch}.attention.layer_norm_rms_epsilon", float)),
        "sliding_window": header.find(f"{arch}.attention.sliding_window", int) or None,
    }


def _write_rotary(config: ModelConfig, positions: Rotary) -> dict[str, Any]:
    return {
        "attention.layer_norm_rms_epsilon": float(config.norm_epsilon),
        "rope.dimension_count": config.head_width,
        "rope.freq_base": float(positions.base),
        **_write_scaling(positions.scaling),
    }


def _read_gemma(header: Header, facts: dict[str, Any]) -> dict[str, Any]:
    """What Gemma 3 does otherwise."""
    everywhere = _gemma_global_layers(header, facts["layers"])
    windowed = facts["sliding_window"] is not None and len(everywhere) < facts["layers"]
    return {
        "sliding_window": facts["sliding_window"] if windowed else None,
        "global_layers": everywhere if windowed else (),
        "local_positions": Rotary(_short(header.find("gemma3.rope.freq_base_swa", float) or GEMMA_LOCAL_BASE)),
        "attention_scale": _gemma_scale(facts["width"], facts["layers"], facts["heads"], facts["head_width"]),
        "embedding_scale": facts["width"] ** 0.5,
        "norm_place": "both",
        "norm_plus_one": True,
    }


def _write_gemma(config: ModelConfig) -> dict[str, Any]:
    assert config.local_positions is not None
    keys: dict[str, Any] = {"rope.freq_base_swa": float(config.local_positions.base)}
    if config.sliding_window is not None:
        keys["attention.sliding_window"] = config.sliding_window
        if config.global_layers != _every(GEMMA_PERIOD, config.layers):
            windows = [config.window(layer) is not None for layer in range(config.layers)]
            keys["attention.sliding_window_pattern"] = windows
    return keys


def _gemma_global_layers(header: Header, layers: int) -> tuple[int, ...]:
    """The layers without a window: one in so many, or a list that says of each whether it has one."""
    key = "gemma3.attention.sliding_window_pattern"
    said = header.metadata.get(key)
    if not isinstance(said, list):
        period = header.find(key, int) if key in header.metadata else GEMMA_PERIOD
        return _every(period, layers) if period else ()
    if len(said) != layers:
        raise DanluError(f"{key} lists {len(said):,} layers, but the model has {layers:,}", where=header.path)
    return tuple(layer for layer, window in enumerate(said) if not window)


def _every(period: int, layers: int) -> tuple[int, ...]:
    """The last of each so many layers."""
    return tuple(range(period - 1, layers, period))


def _gemma_scale(width: int, layers: int, heads: int, head_width: int) -> float:
    """What llama.cpp multiplies Gemma 3's scores by."""
    return float(width // max(heads, 1) if layers == GEMMA_27B_LAYERS else head_width) ** -0.5


def _read_experts(header: Header, arch: str, feedforward_width: int) -> Experts | None:
    """The mixture. Where a file does not say the experts' widths, they follow from the feed-forward's."""
    count = header.find(f"{arch}.expert_count", int) or 0
    if not count and not arch.endswith("moe"):
        return None
    chosen = header.need(f"{arch}.expert_used_count", int)
    if arch == "llama":
        return Experts(count, chosen, feedforward_width, normalised=True)
    shared = arch == "qwen2moe"
    return Experts(
        count=count,
        chosen=chosen,
        width=_whole(header, f"{arch}.expert_feed_forward_length", feedforward_width // max(chosen, 1)),
        normalised=ARCHITECTURES[arch].normalised,
        shared_width=_whole(header, f"{arch}.expert_shared_feed_forward_length", feedforward_width) if shared else 0,
        shared_gate=shared,
    )


def _write_experts(experts: Experts, arch: str) -> dict[str, Any]:
    keys = {"expert_count": experts.count, "expert_used_count": experts.chosen}
    if arch != "llama":
        keys["expert_feed_forward_length"] = experts.width
    if experts.shared_width:
        keys["expert_shared_feed_forward_length"] = experts.shared_width
    return keys


def _write_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None or scaling.kind == "llama3":
        return {}
    keys: dict[str, Any] = {"rope.scaling.type": scaling.kind, "rope.scaling.factor": float(scaling.factor)}
    if scaling.kind == "yarn":
        keys["rope.scaling.original_context_length"] = scaling.original_context
        if scaling.attention_factor is not None:
            # llama.cpp multiplies its own 0.1 ln(factor) + 1 by this.
            keys["rope.scaling.attn_factor"] = scaling.attention_factor / (0.1 * math.log(scaling.factor) + 1)
    return keys


def _write_llama3(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None or scaling.kind != "llama3":
        return {}
    numbers = (scaling.factor, scaling.original_context, scaling.low_frequency, scaling.high_frequency)
    return {LLAMA3_SCALING: [float(number) for number in numbers]}


def _read_scaling(header: Header, arch: str) -> RopeScaling | None:
    own = header.find_all(LLAMA3_SCALING, float) or []
    if len(own) == 4:
        return RopeScaling("llama3", _short(own[0]), round(own[1]), _short(own[2]), _short(own[3]))

    def number(key: str) -> float | None:
        value = header.find(f"{arch}.rope.{key}", float)
        return None if value is None else _short(value)

    kind = header.find(f"{arch}.rope.scaling.type", str) or "none"
    factor = number("scaling.factor") or 1.0
    if kind == "none":
        kind, factor = "linear", number("scale_linear") or 1.0  # from before there were kinds
    if kind == "linear":
        return None if factor == 1 else RopeScaling(kind="linear", factor=factor)
    if kind != "yarn":
        raise DanluError(f"the rope scaling {kind} is not known", where=header.path, fix="known: none, linear, yarn")
    temper = header.find(f"{arch}.rope.scaling.attn_factor", float)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_context=header.need(f"{arch}.rope.scaling.original_context_length", int),
        beta_fast=number("scaling.yarn_beta_fast") or 32.0,
        beta_slow=number("scaling.yarn_beta_slow") or 1.0,
        attention_factor=None if temper is None else _short(temper * (0.1 * math.log(factor) + 1)),
    )


def rope_factors(config: ModelConfig) -> list[float] | None:
    """What llama.cpp divides each frequency by for Llama 3's scaling, as the tensor rope_freqs.weight holds it."""
    positions = config.positions
    if not isinstance(positions, Rotary) or positions.scaling is None or positions.scaling.kind != "llama3":
        return None
    return _factors(positions, config.head_width)


def _factors(positions: Rotary, head_width: int) -> list[float]:
    scaled, _ = frequencies(positions, head_width)
    plain, _ = frequencies(Rotary(positions.base), head_width)
    return [float(factor) for factor in plain / scaled]


def _llama3_scaling(header: Header, factors: list[float], base: float, head_width: int) -> RopeScaling:
    """The numbers behind a table of factors: the slowest pair is divided by the whole factor."""
    scaling = RopeScaling(kind="llama3", factor=round(max(factors), 4), original_context=LLAMA3_CONTEXT)
    if 2 * len(factors) == head_width:
        pairs = zip(_factors(Rotary(base, scaling), head_width), factors, strict=True)
        if all(math.isclose(mine, theirs, rel_tol=1e-3) for mine, theirs in pairs):
            return scaling
    raise DanluError("the rope factors (rope_freqs.weight) are not those of Llama 3", where=header.path)


def _whole(header: Header, key: str, otherwise: int) -> int:
    """A whole number; 0 is as good as none."""
    return header.find(key, int) or otherwise


def _short(value: float) -> float:
    """The shortest decimal that fp32 stores as this: 9.999999747378752e-06 -> 1e-05."""
    return float(f"{value:.7g}")
