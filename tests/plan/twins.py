"""The models of the planner's data file in transformers, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf

Told = dict[str, int]
Twin = tuple[Any, Any]  # class in transformers, its configuration


def _decoder(told: Told) -> dict[str, Any]:
    return {
        "vocab_size": told["vocab"], "hidden_size": told["width"], "num_hidden_layers": told["layers"],
        "num_attention_heads": told["heads"], "num_key_value_heads": told["kv_heads"], "head_dim": told["head_width"],
        "intermediate_size": told["feedforward"], "tie_word_embeddings": bool(told["tied"]), "pad_token_id": 0,
    }  # fmt: skip


def _mixture(told: Told) -> dict[str, Any]:
    return {"num_experts_per_tok": told["chosen"], "moe_intermediate_size": told["expert_width"],
            "n_routed_experts": told["experts"], "n_shared_experts": told["shared_width"] // told["expert_width"],
            "first_k_dense_replace": told["layers"] - told["expert_layers"]}  # fmt: skip


def _latent(told: Told) -> dict[str, Any]:
    plain = {key: value for key, value in _decoder(told).items() if key != "head_dim"}
    return plain | _mixture(told) | {
        "q_lora_rank": told["query_rank"] or None, "kv_lora_rank": told["key_rank"],
        "qk_rope_head_dim": told["turned"], "qk_nope_head_dim": told["head_width"] - told["turned"],
        "v_head_dim": told["value_width"],
    }  # fmt: skip


def _hybrid(told: Told) -> Twin:
    attention = told["layers"] - told["without_attention"]
    plain = told["layers"] - told["without_feedforward"] - told["expert_layers"]
    pattern = "M" * told["state_layers"] + "*" * attention + "-" * plain + "E" * told["expert_layers"]
    mixture = {
        "n_routed_experts": told["experts"], "num_experts_per_tok": told["chosen"],
        "moe_intermediate_size": told["expert_width"], "moe_shared_expert_intermediate_size": told["shared_width"],
        "moe_latent_size": told["expert_input"] or None,
    } if told["experts"] else {}  # fmt: skip
    keys = {key: value for key, value in _decoder(told).items() if key != "num_hidden_layers"}
    config = hf.NemotronHConfig(
        **keys, **mixture, hybrid_override_pattern=pattern, mamba_num_heads=told["state_heads"],
        mamba_head_dim=told["state_head_width"], n_groups=told["state_groups"], ssm_state_size=told["state_width"],
        conv_kernel=told["state_kernel"],
    )  # fmt: skip
    return hf.NemotronHForCausalLM, config


def _mamba(told: Told) -> Twin:
    config = hf.Mamba2Config(
        vocab_size=told["vocab"], hidden_size=told["width"], num_hidden_layers=told["layers"],
        num_heads=told["state_heads"], head_dim=told["state_head_width"], n_groups=told["state_groups"],
        state_size=told["state_width"], conv_kernel=told["state_kernel"], tie_word_embeddings=bool(told["tied"]),
    )  # fmt: skip
    return hf.Mamba2ForCausalLM, config


def _t5(told: Told) -> Twin:
    config = hf.T5Config(
        vocab_size=told["vocab"], d_model=told["width"], d_kv=told["head_width"], d_ff=told["feedforward"],
        num_layers=told["second_layers"], num_decoder_layers=told["layers"], num_heads=told["heads"],
        feed_forward_proj="gated-gelu" if told["gated"] else "relu",
    )  # fmt: skip
    return hf.T5ForConditionalGeneration, config


def _tower(told: Told, of: str = "") -> dict[str, Any]:
    names = {"hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads",
             "intermediate_size": "feedforward"}  # fmt: skip
    return {key: told[of + name] for key, name in names.items()}


def _clip(name: str, told: Told) -> Twin:
    text = _tower(told) | {"vocab_size": told["vocab"], "max_position_embeddings": told["positions"]}
    image = _tower(told, "second_") | {"image_size": 224, "patch_size": int(name[-2:])}
    return hf.CLIPModel, hf.CLIPConfig(text_config=text, vision_config=image, projection_dim=told["width"])


def _vit(name: str, told: Told) -> Twin:
    config = hf.ViTConfig(**_tower(told), image_size=224, patch_size=int(name[-2:]), num_labels=1000)
    return hf.ViTForImageClassification, config


def _gpt(told: Told) -> Twin:
    config = hf.GPT2Config(vocab_size=told["vocab"], n_embd=told["width"], n_layer=told["layers"],
                           n_head=told["heads"], n_positions=told["positions"])  # fmt: skip
    return hf.GPT2LMHeadModel, config


def _bert(told: Told) -> dict[str, Any]:
    return _tower(told) | {"vocab_size": told["vocab"], "max_position_embeddings": told["positions"]}


# The first of these that a name starts with tells how the model is built.
FAMILIES: dict[str, Callable[[str, Told], Twin]] = {
    "gpt-oss": lambda _, told: (hf.GptOssForCausalLM, hf.GptOssConfig(
        **_decoder(told) | {"intermediate_size": told["expert_width"]}, num_local_experts=told["experts"])),
    "gpt": lambda _, told: _gpt(told),
    "bert": lambda _, told: (hf.BertForMaskedLM, hf.BertConfig(**_bert(told))),
    "roberta": lambda _, told: (hf.RobertaForMaskedLM, hf.RobertaConfig(**_bert(told), type_vocab_size=1)),
    "t5": lambda _, told: _t5(told),
    "flan-t5": lambda _, told: _t5(told),
    "vit": _vit,
    "clip": _clip,
    "mamba2": lambda _, told: _mamba(told),
    "nemotron": lambda _, told: _hybrid(told),
    "deepseek-v2": lambda _, told: (hf.DeepseekV2ForCausalLM, hf.DeepseekV2Config(**_latent(told))),
    "deepseek-v3": lambda _, told: (hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config(**_latent(told))),
    "moonlight": lambda _, told: (hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config(**_latent(told))),
    "kimi": lambda _, told: (hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config(**_latent(told))),
    "glm": lambda name, told: (hf.Glm4MoeForCausalLM, hf.Glm4MoeConfig(
        **_decoder(told), **_mixture(told), attention_bias=True, use_qk_norm=name == "glm-4.5")),
    "mixtral": lambda _, told: (hf.MixtralForCausalLM, hf.MixtralConfig(
        **_decoder(told), num_local_experts=told["experts"], num_experts_per_tok=told["chosen"])),
    "gemma-2": lambda _, told: (hf.Gemma2ForCausalLM, hf.Gemma2Config(**_decoder(told))),
    "gemma-3": lambda _, told: (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**_decoder(told))),
    "phi": lambda _, told: (hf.Phi3ForCausalLM, hf.Phi3Config(**_decoder(told))),
    "mistral": lambda _, told: (hf.MistralForCausalLM, hf.MistralConfig(**_decoder(told))),
    "qwen2.5": lambda _, told: (hf.Qwen2ForCausalLM, hf.Qwen2Config(**_decoder(told))),
    "qwen3-30b": lambda _, told: _sparse_qwen(told),
    "qwen3-235b": lambda _, told: _sparse_qwen(told),
    "qwen3": lambda _, told: (hf.Qwen3ForCausalLM, hf.Qwen3Config(**_decoder(told))),
    "trillion": lambda _, told: _sparse_qwen(told),
    "llama": lambda _, told: (hf.LlamaForCausalLM, hf.LlamaConfig(**_decoder(told))),
    "smollm2": lambda _, told: (hf.LlamaForCausalLM, hf.LlamaConfig(**_decoder(told))),
}  # fmt: skip


def _sparse_qwen(told: Told) -> Twin:
    config = hf.Qwen3MoeConfig(**_decoder(told), num_experts=told["experts"], num_experts_per_tok=told["chosen"],
                               moe_intermediate_size=told["expert_width"])  # fmt: skip
    return hf.Qwen3MoeForCausalLM, config


def twin(name: str, told: Told) -> Twin:
    """The same model in transformers. Raises StopIteration where no family's name begins like that."""
    return next(built for start, built in FAMILIES.items() if name.startswith(start))(name, told)
