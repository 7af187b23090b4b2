"""ModelConfig <-> the metadata of a GGUF file. Keys: GGUF specification, "LLM" section."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from danlu.errors import DanluError
from danlu.gguf_header import Header
from danlu.model.config import ModelConfig, RopeScaling, Rotary
from danlu.model.families.known import FAMILIES, family_for
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

# Keys under the architecture's name that are read here or change nothing.
KNOWN = {
    *REQUIRED.values(),
    *("vocab_size", "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length"),
    *("attention.value_length", "attention.sliding_window", "rope.dimension_count", "rope.freq_base"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.finetuned", "rope.scale_linear"),
    *("tensor_data_layout", "attention.causal"),
}


def read_metadata(header: Header, factors: list[float] | None) -> ModelConfig:
    """The configuration of a GGUF model. Biases, extra norms and a separate head show in the names of its tensors.

    Args:
        header: of the file.
        factors: the content of the tensor rope_freqs.weight, which Llama 3 has.

    Raises DanluError where the architecture is not known, or a key is missing or asks for what Danlu does not compute.
    """
    arch = header.need("general.architecture", str)
    known_names = {family.gguf for family in FAMILIES if family.gguf is not None}
    if arch not in known_names:
        known = ", ".join(sorted(known_names))
        raise DanluError(f"the GGUF architecture {arch} is not known", where=header.path, fix=f"known: {known}")
    _refuse_foreign(header, arch)
    facts: dict[str, Any] = {name: header.need(f"{arch}.{key}", int) for name, key in REQUIRED.items()}
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    if "token_embd.weight" not in shapes:
        raise DanluError("has no token_embd.weight, so it is no whole model", where=header.path)

    def whole(key: str, otherwise: int) -> int:
        return header.find(f"{arch}.{key}", int) or otherwise

    head_width = whole("attention.key_length", facts["width"] // max(facts["heads"], 1))
    widths = {head_width, whole("attention.value_length", head_width), whole("rope.dimension_count", head_width)}
    if len(widths) != 1:
        what = f"keys, values and rotary positions of different widths ({sorted(widths)}) are not supported"
        raise DanluError(what, where=header.path)
    base = _short(header.find(f"{arch}.rope.freq_base", float) or 10_000.0)
    scaling = _read_scaling(header, arch)
    if factors is not None and scaling is None:
        scaling = _llama3_scaling(header, factors, base, head_width)
    return ModelConfig(
        **facts,
        vocab_size=shapes["token_embd.weight"][0],
        kv_heads=whole("attention.head_count_kv", facts["heads"]),
        head_width=head_width,
        positions=Rotary(base, scaling),
        norm_epsilon=_short(header.need(f"{arch}.attention.layer_norm_rms_epsilon", float)),
        tied="output.weight" not in shapes,
        attention_bias="blk.0.attn_q.bias" in shapes,
        output_bias="blk.0.attn_output.bias" in shapes,
        feedforward_bias="blk.0.ffn_gate.bias" in shapes,
        qk_norm="blk.0.attn_q_norm.weight" in shapes,
        sliding_window=header.find(f"{arch}.attention.sliding_window", int) or None,
    )


def write_metadata(config: ModelConfig) -> dict[str, Any]:
    """The metadata that says this configuration, architecture included.

    Raises DanluError where llama.cpp would compute something else.
    """
    arch = family_for(config).gguf
    if config.activation != "silu":
        raise DanluError(f"llama.cpp computes {arch} with the activation silu, not {config.activation}")
    if arch == "qwen3" and config.attention_bias:
        raise DanluError("llama.cpp's qwen3 has no attention biases")
    assert arch is not None and isinstance(config.positions, Rotary)
    scaling = config.positions.scaling
    if scaling is not None and scaling.kind == "llama3" and arch != "llama":
        raise DanluError(f"llama.cpp has no llama3 rope scaling for {arch}")
    if scaling is not None and (scaling.beta_fast, scaling.beta_slow) != (32.0, 1.0):
        raise DanluError("llama.cpp computes yarn with beta_fast 32 and beta_slow 1 only")
    facts = asdict(config)
    keys = {key: facts[name] for name, key in REQUIRED.items()}
    if config.sliding_window is not None:
        # llama.cpp sees everything in these architectures; within one window that is the same.
        keys["context_length"] = min(config.context, config.sliding_window)
        keys["attention.sliding_window"] = config.sliding_window
    keys |= {
        "vocab_size": config.vocab_size,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_width,
        "attention.value_length": config.head_width,
        "attention.layer_norm_rms_epsilon": float(config.norm_epsilon),
        "rope.dimension_count": config.head_width,
        "rope.freq_base": float(config.positions.base),
    }
    extra: dict[str, Any] = {}
    if scaling is not None and scaling.kind == "llama3":
        numbers = (scaling.factor, scaling.original_context, scaling.low_frequency, scaling.high_frequency)
        extra[LLAMA3_SCALING] = [float(number) for number in numbers]
    elif scaling is not None:
        keys |= _write_scaling(scaling)
    return {"general.architecture": arch, **{f"{arch}.{key}": value for key, value in keys.items()}, **extra}


def _write_scaling(scaling: RopeScaling) -> dict[str, Any]:
    keys: dict[str, Any] = {"rope.scaling.type": scaling.kind, "rope.scaling.factor": float(scaling.factor)}
    if scaling.kind == "yarn":
        keys["rope.scaling.original_context_length"] = scaling.original_context
        if scaling.attention_factor is not None:
            # llama.cpp multiplies its own 0.1 ln(factor) + 1 by this.
            keys["rope.scaling.attn_factor"] = scaling.attention_factor / (0.1 * math.log(scaling.factor) + 1)
    return keys


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


def _refuse_foreign(header: Header, arch: str) -> None:
    for key, value in header.metadata.items():
        own = key.removeprefix(f"{arch}.")
        if own != key and own not in KNOWN and value not in (0, 0.0, False, "", "none"):
            what = f"{key} is {value!r}, which may change the computation and is not known to Danlu"
            raise DanluError(what, where=header.path, fix="use the model's Hugging Face directory")


def _short(value: float) -> float:
    """The shortest decimal that fp32 stores as this: 9.999999747378752e-06 -> 1e-05."""
    return float(f"{value:.7g}")
