"""A config.json, read key by key: what is missing, malformed, or asked for and not computed here is an error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from danlu.errors import DanluError
from danlu.model.config import Activation, Head

ACTIVATIONS: dict[Activation, str] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "tanh": "tanh",
}
SAME_ACTIVATION = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}

# Keys of every config.json that say nothing about what is computed.
HARMLESS = {
    *("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "mask_token_id"),
    *("initializer_range", "initializer_factor", "pretraining_tp", "is_llama_config", "transformers.js_config"),
    *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "gradient_checkpointing"),
    *("id2label", "label2id", "problem_type", "return_dict", "output_attentions", "output_hidden_states"),
    *("output_past", "output_router_logits", "task_specific_params", "torchscript", "finetuning_task", "_commit_hash"),
    *("is_encoder_decoder", "num_labels", "n_ctx", "language", "unsloth_version", "unsloth_fixed", "name", "license"),
    *(
        "cache_implementation",
        "max_length",
        "min_length",
        "do_sample",
        "num_beams",
        "early_stopping",
        "tokenizer_class",
    ),
    *("prefix", "max_position_embedding", "chunk_size_feed_forward", "is_composition", "summary_type"),
    *("summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
}

# Keys that change nothing at 1.
FACTORS = {
    *("partial_rotary_factor", "embedding_multiplier", "residual_multiplier", "attention_multiplier"),
    *("logit_scale", "logits_scaling"),
}


def write_labels(head: Head) -> dict[str, Any]:
    """id2label and label2id of a classifier; nothing where a head has no labels."""
    named = head.labels or tuple(f"LABEL_{number}" for number in range(head.outputs))
    if head.task not in ("sequence", "tokens"):
        return {}
    return {
        "id2label": {str(number): label for number, label in enumerate(named)},
        "label2id": {label: number for number, label in enumerate(named)},
    }


class Fields:
    """What a config.json says. Every key that is asked for counts as understood; `finish` names those that are left.

    Args:
        hf: the content of a config.json.
        where: the file, for messages.
        defaults: what absent keys are.
    """

    def __init__(self, hf: Mapping[str, Any], where: Path | None = None, **defaults: Any) -> None:
        self.hf = {**defaults, **{key: value for key, value in hf.items() if value is not None or key not in defaults}}
        self.where = where
        self._asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """Whatever stands there; `default` where nothing or null does."""
        self._asked.add(key)
        value = self.hf.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._malformed(key, value, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number; null is none."""
        self._asked.add(key)
        value = self.hf.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._malformed(key, value, "a number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self._malformed(key, value, "true or false")
        return value

    def activation(self, key: str, default: str | None = None) -> Activation:
        """The name of a non-linearity, as ours."""
        asked = self.get(key, default)
        named = SAME_ACTIVATION.get(asked, asked) if isinstance(asked, str) else asked
        for ours, theirs in ACTIVATIONS.items():
            if named == theirs:
                return ours
        known = ", ".join([*ACTIVATIONS.values(), *SAME_ACTIVATION])
        raise DanluError(f"{key} is {asked!r}, which is not known", where=self.where, fix=f"known: {known}")

    def only(self, key: str, *values: Any) -> None:
        """Accept a key only with these values: with any other it asks for what is not computed here."""
        value = self.get(key)
        if value is not None and value not in values:
            what = f"{key} is {value!r}, a computation that Danlu does not do"
            raise DanluError(what, where=self.where, fix="use another model")

    def ignore(self, *keys: str) -> None:
        """These change nothing about what is computed."""
        self._asked.update(keys)

    def part(self, key: str, **defaults: Any) -> Fields:
        """A configuration inside this one."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise self._malformed(key, value, "a mapping")
        return Fields(value, self.where, **defaults)

    def labels(self) -> tuple[str, ...]:
        """The labels that a classifier tells apart; without id2label they have numbers for names."""
        named = self.get("id2label")
        if isinstance(named, dict) and named:
            if sorted(map(str, named)) != sorted(map(str, range(len(named)))):
                raise self._malformed("id2label", named, "a mapping from 0, 1, ... to names")
            return tuple(str(named[number]) for number in sorted(named, key=int))
        return tuple(f"LABEL_{number}" for number in range(self.integer("num_labels", 2)))

    def finish(self) -> None:
        """Stop at keys that nobody asked for, unless they are empty or say nothing about the computation."""
        left = [
            f"{key} is {value!r}"
            for key, value in sorted(self.hf.items())
            if value and key not in self._asked | HARMLESS and not (key in FACTORS and value == 1)
        ]
        if left:
            what = f"{', '.join(left)}: not computed by Danlu for this architecture"
            fix = (
                "where a key changes nothing about the computation, delete it from config.json; else use another model"
            )
            raise DanluError(what, where=self.where, fix=fix)

    def _malformed(self, key: str, value: Any, expected: str) -> DanluError:
        if key not in self.hf:
            return DanluError(f"lacks {key}", where=self.where)
        return DanluError(f"{key} is {value!r}; it must be {expected}", where=self.where)
