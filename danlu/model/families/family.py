"""A family of models as data: how its config.json and its weights' names translate into ours, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from danlu.console import warn
from danlu.errors import DanluError
from danlu.model.config import ModelConfig
from danlu.model.families.rope import read_rope, write_rope

# Fields of ModelConfig and their keys in every family's config.json.
INTEGERS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "feedforward_width": "intermediate_size",
    "context": "max_position_embeddings",
}
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
SAME_ACTIVATION = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}

# Keys that change what is computed in a way Danlu does not, with the values under which they change nothing.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention_chunk_size": (None,),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "auto_map": (None, {}),
    "clip_qkv": (None,),
    "embedding_multiplier": (None, 1),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "no_rope_layers": (None, []),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "partial_rotary_factor": (None, 1),
    "quantization_config": (None,),
    "residual_multiplier": (None, 1),
    "rope_interleaved": (None, False),
    "use_qk_norm": (None, False),
}
# Keys that change nothing about the computation, or that are read here under another name.
KNOWN = {
    *INTEGERS.values(),
    *("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "pretraining_tp", "rms_norm_eps"),
    *("hidden_act", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "attention_bias"),
    *("mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "is_llama_config"),
    *("_attn_implementation_autoset", "transformers.js_config", "id2label", "label2id", "return_dict"),
}


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        architecture: its class in transformers, as in config.json.
        model_type: its short name in config.json.
        gguf: its name in GGUF.
        flags: a key of config.json -> the fields of ModelConfig it turns on and off.
        fixed: fields of ModelConfig that are always so.
        defaults: keys of config.json that may be absent, and what they then are.
        window: which layers a sliding window covers: "none", "all", or "listed" in the configuration.
        neighbours: GGUF pairs neighbouring features for rotary positions, where Hugging Face pairs the two halves.
    """

    architecture: str
    model_type: str
    gguf: str
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fixed: Mapping[str, object] = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)
    window: Literal["none", "all", "listed"] = "none"
    neighbours: bool = False

    def read(self, hf: Mapping[str, Any], where: Path | None = None) -> ModelConfig:
        """config.json -> ModelConfig.

        Raises DanluError where a key is missing, malformed, or asks for a computation that Danlu does not do.
        """
        _refuse_foreign(hf, where)
        hf = {**self.defaults, **hf}
        heads = _integer(hf, "num_attention_heads", where)
        derived = {"num_key_value_heads": heads, "head_dim": _integer(hf, "hidden_size", where) // max(heads, 1)}
        hf |= {key: value for key, value in derived.items() if hf.get(key) is None}
        base, scaling = read_rope(hf, where)
        facts: dict[str, Any] = {name: _integer(hf, key, where) for name, key in INTEGERS.items()}
        facts |= {name: bool(hf.get(key, False)) for key, names in self.flags.items() for name in names}
        facts |= {
            "rope_base": base,
            "rope_scaling": scaling,
            "norm_epsilon": _number(hf, "rms_norm_eps", where),
            "tied": bool(hf.get("tie_word_embeddings", False)),
            "sliding_window": self._read_window(hf, where),
            "activation": _activation(hf, where),
        }
        return ModelConfig(**{**facts, **self.fixed})

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """ModelConfig -> the architecture's part of config.json. What it cannot express is left out."""
        facts = asdict(config)
        hf: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        hf |= {key: facts[name] for name, key in INTEGERS.items()}
        hf |= {key: all(facts[name] for name in names) for key, names in self.flags.items()}
        hf |= {
            "rms_norm_eps": config.norm_epsilon,
            "tie_word_embeddings": config.tied,
            "hidden_act": ACTIVATIONS[config.activation],
        }
        hf |= write_rope(config)
        if self.window != "none":
            hf["sliding_window"] = config.sliding_window
        if self.window == "listed":
            hf |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
        return hf

    def expresses(self, config: ModelConfig) -> bool:
        """Whether nothing is lost by writing this configuration as this family."""
        return self.read(self.write(config)) == config

    def _read_window(self, hf: Mapping[str, Any], where: Path | None) -> int | None:
        window = hf.get("sliding_window")
        on = self.window == "all" or (self.window == "listed" and hf.get("use_sliding_window", False))
        if not on or window is None:
            return None
        listed = hf.get("layer_types")
        if listed is None and self.window == "listed":
            first = hf.get("max_window_layers", 0)
            layers = range(_integer(hf, "num_hidden_layers", where))
            listed = ["sliding_attention" if layer >= first else "full_attention" for layer in layers]
        kinds = set(listed or ["sliding_attention"])
        if kinds == {"full_attention"}:
            return None
        if kinds != {"sliding_attention"}:
            what = f"layers of several kinds of attention ({', '.join(sorted(kinds))}) are not supported"
            raise DanluError(what, where=where, fix="use a model with one kind of attention in all layers")
        return _integer(hf, "sliding_window", where)


def _refuse_foreign(hf: Mapping[str, Any], where: Path | None) -> None:
    """Stop at what changes the computation; say which keys are not known."""
    for key, values in NEUTRAL.items():
        if key in hf and hf[key] not in values:
            raise DanluError(
                f"{key} is {hf[key]!r}, a computation that Danlu does not do", where=where, fix="use another model"
            )
    unknown = [key for key, value in hf.items() if key not in KNOWN and key not in NEUTRAL and value]
    if unknown:
        warn(f"{where}: not known to Danlu, and taken not to change the computation: {', '.join(sorted(unknown))}")


def _integer(hf: Mapping[str, Any], key: str, where: Path | None) -> int:
    value = hf.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise DanluError(f"{key} is {value!r}; it must be a whole number" if key in hf else f"lacks {key}", where=where)
    return value


def _number(hf: Mapping[str, Any], key: str, where: Path | None) -> float:
    value = hf.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DanluError(f"{key} is {value!r}; it must be a number" if key in hf else f"lacks {key}", where=where)
    return float(value)


def _activation(hf: Mapping[str, Any], where: Path | None) -> str:
    asked = hf.get("hidden_act")
    named = SAME_ACTIVATION.get(asked, asked) if isinstance(asked, str) else asked
    for ours, theirs in ACTIVATIONS.items():
        if named == theirs:
            return ours
    known = ", ".join([*ACTIVATIONS.values(), *SAME_ACTIVATION])
    raise DanluError(f"hidden_act is {asked!r}, which is not known", where=where, fix=f"known: {known}")


def translate(name: str, table: Mapping[str, str]) -> str | None:
    """A weight's name under a table such as {"blocks.{i}.attention.query": "model.layers.{i}.self_attn.q_proj"}.

    Returns the other name, its last part (weight, bias) and layer number kept, or None where the table lacks it.
    """
    stem, _, kind = name.rpartition(".")
    number = re.search(r"\.(\d+)\.", stem)
    pattern = stem if number is None else f"{stem[: number.start()]}.{{i}}.{stem[number.end() :]}"
    if pattern not in table or kind not in ("weight", "bias"):
        return None
    other = table[pattern]
    return f"{other.format(i=number.group(1)) if number else other}.{kind}"
