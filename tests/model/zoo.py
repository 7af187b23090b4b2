"""A small random model of every family, in transformers and as the directory it is saved to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from danlu.model.checkpoint import StoredModel
from danlu.model.transformer import Decoder, Encoder, EncoderDecoder, EncoderPair

WORDS = 96
PLAIN = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TEXT = {**PLAIN, "max_position_embeddings": 64}
GROUPED = {**TEXT, "num_key_value_heads": 2}
BERT = {**TEXT, "type_vocab_size": 2}
ROBERTA = {**PLAIN, "max_position_embeddings": 66, "pad_token_id": 1, "type_vocab_size": 1}
GPT2 = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
T5 = {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "decoder_start_token_id": 0}
SWITCH = {**T5, "num_decoder_layers": 2, "num_experts": 4, "num_sparse_encoder_layers": 1}
SWITCH |= {"num_sparse_decoder_layers": 1, "expert_capacity": 64}
IMAGE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
IMAGE |= {"image_size": 16, "patch_size": 4}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LABELS = {"id2label": {0: "bad", 1: "poor", 2: "fair", 3: "good", 4: "很好"}}
CLIP_TEXT = {**PLAIN, "max_position_embeddings": 64, "eos_token_id": 95}
ROPES = {"full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 2.0}}
ROPES |= {"sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}

# Name -> (class in transformers, its configuration): one case for each thing that a family can do differently.
CASES: dict[str, tuple[Any, Any]] = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED)),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig(**GROUPED, sliding_window=8)),
    "qwen2": (
        hf.Qwen2ForCausalLM,
        hf.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    ),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**GROUPED, head_dim=16, tie_word_embeddings=True)),
    "gemma3": (
        hf.Gemma3ForCausalLM,
        hf.Gemma3TextConfig(
            **GROUPED,
            head_dim=16,
            sliding_window=8,
            query_pre_attn_scalar=12,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters=ROPES,
        ),
    ),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2)),
    "gpt2 narrow": (hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2, n_inner=40, activation_function="relu")),
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)),
    "mixtral window": (
        hf.MixtralForCausalLM,
        hf.MixtralConfig(**GROUPED, num_local_experts=3, num_experts_per_tok=1, sliding_window=8),
    ),
    "qwen2 moe": (
        hf.Qwen2MoeForCausalLM,
        hf.Qwen2MoeConfig(**GROUPED, **MIXTURE, shared_expert_intermediate_size=20, decoder_sparse_step=2),
    ),
    "qwen3 moe": (
        hf.Qwen3MoeForCausalLM,
        hf.Qwen3MoeConfig(**GROUPED, **MIXTURE, head_dim=16, norm_topk_prob=True, mlp_only_layers=[1]),
    ),
    "bert words": (hf.BertForMaskedLM, hf.BertConfig(**BERT)),
    "bert": (hf.BertModel, hf.BertConfig(**BERT, hidden_act="relu")),
    "bert sequence": (hf.BertForSequenceClassification, hf.BertConfig(**BERT, **LABELS)),
    "bert tokens": (hf.BertForTokenClassification, hf.BertConfig(**BERT, **LABELS)),
    "bert span": (hf.BertForQuestionAnswering, hf.BertConfig(**BERT)),
    "roberta words": (hf.RobertaForMaskedLM, hf.RobertaConfig(**ROBERTA)),
    "roberta": (hf.RobertaModel, hf.RobertaConfig(**ROBERTA)),
    "roberta sequence": (hf.RobertaForSequenceClassification, hf.RobertaConfig(**ROBERTA, **LABELS)),
    "roberta tokens": (hf.RobertaForTokenClassification, hf.RobertaConfig(**ROBERTA, **LABELS)),
    "roberta span": (hf.RobertaForQuestionAnswering, hf.RobertaConfig(**ROBERTA)),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config(**T5)),
    "t5 uneven": (hf.T5ForConditionalGeneration, hf.T5Config(**T5, num_decoder_layers=2)),
    "flan-t5": (
        hf.T5ForConditionalGeneration,
        hf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
    "switch": (hf.SwitchTransformersForConditionalGeneration, hf.SwitchTransformersConfig(**SWITCH)),
    "switch full": (
        hf.SwitchTransformersForConditionalGeneration,
        hf.SwitchTransformersConfig(**{**SWITCH, "expert_capacity": 3}),
    ),
    "vit": (hf.ViTForImageClassification, hf.ViTConfig(**IMAGE, **LABELS)),
    "vit body": (hf.ViTModel, hf.ViTConfig(**IMAGE, qkv_bias=False)),
    "vit oblong": (hf.ViTModel, hf.ViTConfig(**{**IMAGE, "image_size": [16, 24], "patch_size": [4, 8]})),
    "clip": (
        hf.CLIPModel,
        hf.CLIPConfig(text_config=CLIP_TEXT, vision_config={**IMAGE, "hidden_act": "gelu"}, projection_dim=24),
    ),
    "clip first": (
        hf.CLIPModel,
        hf.CLIPConfig(text_config={**CLIP_TEXT, "eos_token_id": 2}, vision_config=IMAGE, projection_dim=24),
    ),
}
DECODERS = [name for name, (kind, _) in CASES.items() if kind.__name__.endswith(("CausalLM", "LMHeadModel"))]
BERTS = [name for name in CASES if name.startswith(("bert", "roberta"))]
PAIRED = [name for name in CASES if name.startswith(("t5", "flan", "switch"))]


@dataclass(frozen=True)
class Twin:
    """One model, twice.

    Attributes:
        theirs: a random transformers model in fp32.
        path: the directory it was saved to.
        ours: the same, read from there.
    """

    theirs: Any
    path: Path
    ours: Decoder | Encoder | EncoderDecoder | EncoderPair

    @property
    def stored(self) -> StoredModel:
        return StoredModel.open(self.path)


def twin(case: str, path: Path) -> Twin:
    """A random model, every weight of which differs from its default."""
    kind, config = CASES[case]
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    theirs = kind(config).float().eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if name != "logit_scale":
                norm = "norm" in name.lower() and name.endswith("weight") and case != "gemma3"  # whose start at 0
                centre = 1.0 if norm else 0.0
                weight.normal_(centre, 0.2 if weight.dim() == 1 else 0.1)
    theirs.save_pretrained(path)
    return Twin(theirs, path, StoredModel.open(path).load().eval())


def inputs(model: nn.Module, rows: int = 3, length: int = 21) -> dict[str, Tensor]:
    """A batch for a model, by transformers' names; the same at every call."""
    random = torch.Generator().manual_seed(5)
    ids = torch.randint(3, WORDS - 1, (rows, length), generator=random)
    if isinstance(model, EncoderDecoder):
        written = torch.randint(3, WORDS - 1, (rows, 11), generator=random)
        return {"input_ids": ids, "decoder_input_ids": written}
    if isinstance(model, EncoderPair):
        ids[:, -1] = WORDS - 1  # where a text ends
        return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16, generator=random)}
    if isinstance(model, Encoder) and model.config.patches is not None:
        return {"pixel_values": torch.randn(rows, 3, *model.config.patches.image, generator=random)}
    return {"input_ids": ids}


def output(found: Any) -> Tensor:
    """The tensor that transformers' model is there for."""
    if "start_logits" in found:
        return torch.stack((found.start_logits, found.end_logits), -1)
    for name in ("logits_per_text", "logits", "pooler_output"):
        if name in found:
            return found[name]
    raise AssertionError(f"no output known among {list(found)}")


def compute(model: nn.Module, batch: dict[str, Tensor], **how: Any) -> Tensor:
    """What our model makes of a batch."""
    if isinstance(model, EncoderDecoder):
        return model.logits(model(batch["input_ids"], batch["decoder_input_ids"], **how))
    if isinstance(model, EncoderPair):
        return model(batch["input_ids"], batch["pixel_values"], **how)
    hidden = model(batch.get("input_ids", batch.get("pixel_values")), **how)
    if isinstance(model, Encoder):
        return model.logits(hidden, how.get("segments"))
    return model.logits(hidden)
