"""Scales moved into weights: the same outputs, by a configuration that an architecture of Hugging Face can express."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from danlu.errors import DanluError
from danlu.model.config import EncoderDecoderConfig, ModelConfig
from danlu.model.families.known import FAMILIES, family_of
from danlu.model.initialize import initialize, mup_config
from danlu.model.scales import check_scales, fold_scales
from danlu.model.transformer import make_model

DECODER = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}
BERT = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
T5 = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
SHAPES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": DECODER | {"tie_word_embeddings": False},
    "Qwen2ForCausalLM": DECODER | {"tie_word_embeddings": True},
    "Qwen3ForCausalLM": DECODER | {"tie_word_embeddings": True, "head_dim": 8},
    "GPT2LMHeadModel": {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "BertForMaskedLM": BERT,
    "T5ForConditionalGeneration": T5,
}


@pytest.mark.parametrize("architecture", SHAPES)
def test_a_mup_model_says_the_same_with_its_scales_in_its_weights(architecture: str) -> None:
    keys = {**SHAPES[architecture], "architectures": [architecture]}
    plain = family_of(keys).config(keys, Path("config.json"))
    scaled = mup_config(plain)
    assert not any(family.expresses(scaled) for family in FAMILIES), "there is something to move"
    original = make_model(scaled)
    initialize(original, "mup", 3)
    with torch.no_grad():
        for weight in original.parameters():  # biases and norms that do something
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())), alpha=0.05)
    made = make_model(plain)
    made.load_state_dict(original.state_dict())
    fold_scales(made, scaled)
    tokens = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(1))
    given = (tokens, tokens[:, :5]) if isinstance(plain, EncoderDecoderConfig) else (tokens,)
    original.eval(), made.eval()
    with torch.no_grad():
        wanted, found = (model.logits(model(*given)) for model in (original, made))
        assert wanted.std() > 0.01
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_what_no_weight_can_hold_is_refused() -> None:
    keys = {**SHAPES["Qwen3ForCausalLM"], "architectures": ["Qwen3ForCausalLM"]}
    plain = family_of(keys).config(keys, Path("config.json"))
    assert isinstance(plain, ModelConfig)
    refused = {
        "the embedding is multiplied": replace(plain, embedding_scale=5.0),
        "queries are normalised": replace(plain, norm_plus_one=True),
        "no norm": replace(plain, final_norm=False),
    }
    for told, config in refused.items():
        with pytest.raises(DanluError, match=f"could not be saved: {told}"):
            check_scales(config, mup_config(config))
