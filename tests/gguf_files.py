"""GGUF files and llama.cpp vocabularies for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from danlu.device.engine import library
from danlu.tokenizer import Tokenizer


def vocabulary_file(metadata: Mapping[str, Any], out: Path) -> Path:
    """A GGUF that holds a tokenizer and no tensors. `metadata`: as `Tokenizer.gguf_metadata` gives it."""
    writer = gguf.GGUFWriter(out, "llama")
    shape = {"context_length": 64, "embedding_length": 64, "block_count": 1, "feed_forward_length": 64}
    for key, value in {**shape, "attention.head_count": 1}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    for key, value in metadata.items():
        add[type(value)](f"tokenizer.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return out


def smaller(tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    """The GGUF metadata of a byte-level tokenizer cut to its first `size` ids: quick to load, cuts text the same."""
    made = tokenizer.gguf_metadata(tokenizer.vocab_size)
    kept = set(made["ggml.tokens"][:size])
    merges = [merge for merge in made["ggml.merges"] if merge.replace(" ", "") in kept]
    cut = {name: made[f"ggml.{name}"][:size] for name in ("tokens", "token_type")}
    return {**made, "ggml.merges": merges, **{f"ggml.{name}": value for name, value in cut.items()}}


class LlamaVocabulary:
    """llama.cpp's own tokeniser for a file."""

    def __init__(self, file: Path) -> None:
        # library() keeps one log callback for the whole process; one that is collected would crash the next load.
        self._model = library().Llama(str(file), vocab_only=True, verbose=False)

    def encode(self, text: str, special: bool = True, bos: bool = False) -> list[int]:
        return list(self._model.tokenize(text.encode(), add_bos=bos, special=special))
