"""A small WordPiece tokenizer like BERT's, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from danlu.tokenizer import Tokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = ("the", "cat", "dog", "sat", "on", "mat", "un", "##happy", "##s", "is", "who", "?", ".", "北", "京", "大", "学")
IDS = {token: number for number, token in enumerate((*SPECIAL, *WORDS))}


def wordpiece() -> Tokenizer:
    """[CLS] text [SEP], or [CLS] text [SEP] text [SEP] with kinds 0 and 1; Chinese characters stand alone."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}

    def put(token: str, kind: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": kind}}

    first, second = ({"Sequence": {"id": name, "type_id": kind}} for name, kind in (("A", 0), ("B", 1)))
    single = [put("[CLS]", 0), first, put("[SEP]", 0)]
    document = {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": token, **flags} for number, token in enumerate(SPECIAL)],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, second, put("[SEP]", 1)],
            "special_tokens": {
                token: {"id": token, "ids": [IDS[token]], "tokens": [token]} for token in ("[CLS]", "[SEP]")
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": IDS,
        },
    }
    return Tokenizer(document, {"pad_token": "[PAD]", "mask_token": "[MASK]"}, frozenset(), Path("wordpiece"))
