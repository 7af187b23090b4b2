"""Small models and a small tokenizer, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

from danlu.device.engine import library
from danlu.tokenizer import Tokenizer

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
Llama, Mistral = transformers.LlamaConfig, transformers.MistralConfig
Qwen2, Qwen3 = transformers.Qwen2Config, transformers.Qwen3Config
# Name -> (configuration class, what it adds to SHAPE): one case for each thing that a family can do differently.
CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (Llama, {}),
    "llama tied": (Llama, {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama biases": (Llama, {"attention_bias": True, "mlp_bias": True}),
    "llama head_dim": (Llama, {"head_dim": 32, "rms_norm_eps": 1e-3}),
    "llama3 rope": (Llama, {"rope_parameters": {"rope_theta": 500.0, **LLAMA3}}),
    "linear rope": (Llama, {"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 4.0}}),
    "yarn rope": (Llama, {"rope_parameters": {"rope_theta": 500.0, **YARN}}),
    "yarn rope, tempered": (Llama, {"rope_parameters": {"rope_theta": 500.0, "attention_factor": 1.3, **YARN}}),
    "mistral window": (Mistral, {"sliding_window": 16}),
    "mistral": (Mistral, {"sliding_window": None}),
    "qwen2": (Qwen2, {}),
    "qwen2 yarn": (Qwen2, {"rope_parameters": {"rope_theta": 500.0, **YARN}}),
    "qwen2 window": (Qwen2, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}),
    "qwen3": (Qwen3, {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3 untied": (Qwen3, {"head_dim": 16}),
}


def tiny_tokenizer() -> Tokenizer:
    """Byte-level, without merges but one, with two control tokens: 260 ids, cut as Qwen2 cuts."""
    from danlu.gguf_vocabulary import SPLITS

    alphabet = sorted(ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: number for number, token in enumerate([*special, *alphabet, "th"])}
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    cut = {"type": "Split", "pattern": {"Regex": SPLITS["qwen2"][0]}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {"type": "BPE", "vocab": vocab, "merges": [["t", "h"]], "ignore_merges": False}
    document = {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": token, **entry} for number, token in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }
    config = {"bos_token": special[1], "eos_token": special[2], "pad_token": special[0], "chat_template": TEMPLATE}
    return Tokenizer(document, config, frozenset(), Path("tiny"))


def tiny_reference(case: str, out: Path) -> transformers.PreTrainedModel:
    """A random transformers model, also saved to `out` with a tokenizer. Every weight differs from its default."""
    kind, extra = CASES[case]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**{**SHAPE, **extra})).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.2 if weight.dim() == 1 else 0.08)
    model.save_pretrained(out)
    tiny_tokenizer().save(out)
    return model


def tokens(rows: int = 2, length: int = 48) -> torch.Tensor:
    """int64 [rows, length], the same at every call."""
    return torch.randint(3, 259, (rows, length), generator=torch.Generator().manual_seed(5))


def llama_cpp_logits(file: Path, ids: list[int]) -> np.ndarray:
    """What llama.cpp computes for every position, fp32 [T, vocab], with an fp32 cache."""
    # library() keeps one log callback for the whole process; one that is collected would crash the next load.
    made = library().Llama(
        str(file),
        n_ctx=128,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=0,
        type_v=0,
        flash_attn=False,
        yarn_beta_fast=-1.0,  # as the file says; the wrapper would override it
        yarn_beta_slow=-1.0,
        verbose=False,
    )
    made.eval(ids)
    scores = np.array(made.scores[: len(ids)])
    made.close()
    return scores
