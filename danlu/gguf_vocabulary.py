"""A tokenizer as GGUF keeps it <-> a tokenizer as tokenizer.json keeps it.

GGUF names a pre-tokenizer instead of holding its rules; the table `SPLITS` is read in both directions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from danlu.console import warn
from danlu.errors import DanluError, one_of
from danlu.gguf_header import Header

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types of the GGUF specification
SPACE = "▁"  # SentencePiece's visible space

# Tokens that end a turn of a conversation, by the names model makers give them; the list llama.cpp stops at.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<EOT>")

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Name in tokenizer.ggml.pre -> the patterns text is cut by, one after the other, before byte-level merging.
SPLITS: dict[str, tuple[str, ...]] = {
    "smollm": (r"\p{N}", GPT2),
    "llama-bpe": (LLAMA3,),
    "qwen2": (QWEN2,),
    "gpt-2": (GPT2,),
    "tekken": (TEKKEN,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
# Other names for the same rules.
ALIASES = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "falcon3": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "megrez": "qwen2",
    "starcoder": "smollm",
    "refact": "smollm",
    "phi-2": "gpt-2",
}
WHOLE_WORDS = {"llama-bpe", "tekken"}  # a word that is itself a token is not built by merges
ADDS_BOS = {"llama-bpe", "tekken"}  # llama.cpp's defaults where the file does not say
COMPOSED = {"qwen2"}  # text is brought to Unicode's composed form (NFC) first


def tokenizer_json(header: Header) -> dict[str, Any]:
    """The content of a tokenizer.json equal to the tokenizer in a GGUF file.

    Raises DanluError where the kind of tokenizer or its pre-tokenizer is not known, or the vocabulary is inconsistent.
    """
    kind = header.need("tokenizer.ggml.model", str)
    tokens = header.need_all("tokenizer.ggml.tokens", str)
    types = header.find_all("tokenizer.ggml.token_type", int) or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise DanluError(f"{len(tokens):,} tokens but {len(types):,} token types", where=header.path)
    # Some files call these ordinary; llama.cpp takes them for control tokens all the same.
    types = [CONTROL if token in TURN_ENDS else kind for token, kind in zip(tokens, types, strict=True)]
    if kind == "gpt2":
        parts = _byte_level(header, tokens, types)
    elif kind == "llama":
        parts = _sentencepiece(header, tokens, types)
    else:
        raise DanluError(f"the tokenizer kind {kind} is not known; gpt2 and llama are", where=header.path)
    vocab = parts["model"]["vocab"]
    if len(vocab) != len(types) - types.count(UNUSED):
        raise DanluError("two ids have the same token text", where=header.path)
    special = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[number] != USER_DEFINED,
        }
        for number, token in enumerate(tokens)
        if types[number] in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special, **parts}


def adds_bos(header: Header) -> bool:
    """Whether text of this file's model begins with the beginning-of-sequence token."""
    said = header.find("tokenizer.ggml.add_bos_token", bool)
    if said is not None:
        return said
    return header.need("tokenizer.ggml.model", str) == "llama" or _pre(header) in ADDS_BOS


def _pre(header: Header) -> str:
    """The pre-tokenizer's name as `SPLITS` knows it."""
    name = header.find("tokenizer.ggml.pre", str)
    if name is None:
        warn(f"{header.path}: names no pre-tokenizer (tokenizer.ggml.pre); llama.cpp's default is used")
        return "default"
    name = ALIASES.get(name, name)
    if name not in SPLITS:
        fix = f"{one_of(name, [*SPLITS, *ALIASES])}; or use the model's Hugging Face directory"
        raise DanluError(f"the pre-tokenizer {name} is not known", where=header.path, fix=fix)
    return name


def _byte_level(header: Header, tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Byte-level BPE: every byte has a printable stand-in, merges are listed by rank."""
    pre = _pre(header)
    cuts = [
        {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False} for cut in SPLITS[pre]
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    merges = [_pair(merge, header.path) for merge in header.need_all("tokenizer.ggml.merges", str)]
    vocab = _vocab(tokens, types)
    return {
        "normalizer": {"type": "NFC"} if pre in COMPOSED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": _bpe(vocab, merges) | {"ignore_merges": pre in WHOLE_WORDS},
    }


def _sentencepiece(header: Header, tokens: list[str], types: list[int]) -> dict[str, Any]:
    """SentencePiece's BPE: merges follow from the scores, unknown characters fall back to bytes."""
    vocab = _vocab(tokens, types)
    scores = header.need_all("tokenizer.ggml.scores", float)
    if len(scores) != len(tokens):
        raise DanluError(f"{len(tokens):,} tokens but {len(scores):,} scores", where=header.path)
    prefix = header.find("tokenizer.ggml.add_space_prefix", bool) is not False
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decode: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decode.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = header.find("tokenizer.ggml.unknown_token_id", int) or 0
    if unknown >= len(tokens):
        raise DanluError(f"the unknown token is id {unknown:,} of only {len(tokens):,}", where=header.path)
    model = _bpe(vocab, _merges_by_score(tokens, types, scores))
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace] if prefix else [replace],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decode},
        "model": model | {"unk_token": tokens[unknown], "fuse_unk": True, "byte_fallback": True},
    }


def _vocab(tokens: list[str], types: list[int]) -> dict[str, int]:
    # Unused ids only fill the embedding up; no text leads to them.
    return {token: number for number, token in enumerate(tokens) if types[number] != UNUSED}


def _bpe(vocab: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }


def _pair(merge: str, where: Path) -> list[str]:
    """A merge is written with one space between its halves; the first half may itself begin with one."""
    cut = merge.find(" ", 1)
    if cut < 0:
        raise DanluError(f"the merge {merge!r} has no two halves", where=where)
    return [merge[:cut], merge[cut + 1 :]]


def _merges_by_score(tokens: list[str], types: list[int], scores: list[float]) -> list[list[str]]:
    """The merges that SentencePiece's rule implies: of neighbours that form a token, the best-scored join."""
    usable = {token for token, kind in zip(tokens, types, strict=True) if kind in (NORMAL, USER_DEFINED)}
    ranked = sorted((-scores[number], number) for number, token in enumerate(tokens) if token in usable)
    merges = []
    for _, number in ranked:
        token = tokens[number]
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        merges += [[left, right] for left, right in cuts if left in usable and right in usable]
    return merges


def vocabulary(document: dict[str, Any], size: int, where: Path | None) -> dict[str, Any]:
    """The `tokenizer.ggml.*` metadata for the content of a tokenizer.json, special ids and template left out.

    Args:
        document: the parsed tokenizer.json.
        size: rows of the model's embedding; ids without a token become unused `[PAD...]` tokens.
        where: named in errors.

    Returns: the keys model, pre, tokens, token_type, and merges or scores and add_space_prefix.
    Raises DanluError where GGUF has no name for what the tokenizer does.
    """
    model = document["model"]
    if model["type"] != "BPE":
        raise DanluError(f"a tokenizer of kind {model['type']} cannot be written to GGUF, only BPE", where=where)
    stripping = [token["content"] for token in document["added_tokens"] if token["lstrip"] or token["rstrip"]]
    if stripping:
        warn(f"GGUF cannot say that spaces beside these tokens are swallowed: {', '.join(stripping[:8])}")
    tokens, types = _tokens_and_types(document, size, where)
    common = {"tokens": tokens, "token_type": types}
    if model.get("byte_fallback"):
        return {"model": "llama", "pre": "default", **common, **_scores(document, tokens, types, where)}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not merges:
        what = "the tokenizer merges no bytes, and llama.cpp reads no vocabulary without merges"
        raise DanluError(what, where=where, fix="take a vocabulary of merged bytes (bpe)")
    return {"model": "gpt2", "pre": pre_name(document, where), **common, "merges": merges}


def _tokens_and_types(document: dict[str, Any], size: int, where: Path | None) -> tuple[list[str], list[int]]:
    by_id = {number: token for token, number in document["model"]["vocab"].items()}
    added = {token["id"]: token for token in document["added_tokens"]}
    by_id |= {number: token["content"] for number, token in added.items()}
    if max(by_id) >= size:
        raise DanluError(
            f"the tokenizer has id {max(by_id):,}, but the model's vocabulary ends at {size:,}", where=where
        )
    fallback = document["model"].get("byte_fallback")
    tokens, types = [], []
    for number in range(size):
        tokens.append(by_id.get(number, f"[PAD{number}]"))
        if number not in by_id:
            types.append(UNUSED)
        elif number in added:
            types.append(_added_type(added[number], document["model"].get("unk_token") if fallback else None))
        else:
            types.append(BYTE if fallback and _is_byte(by_id[number]) else NORMAL)
    return tokens, types


def _added_type(token: dict[str, Any], unknown: str | None) -> int:
    if token["content"] == unknown:
        return UNKNOWN
    return CONTROL if token["special"] else USER_DEFINED


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scores(document: dict[str, Any], tokens: list[str], types: list[int], where: Path | None) -> dict[str, Any]:
    """Scores under which SentencePiece's rule repeats the listed merges: minus the rank of a token's first merge."""
    made: dict[str, float] = {}
    for rank, merge in enumerate(document["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        made.setdefault(left + right, -float(rank))
    never = -float(len(made) + 1)
    return {
        "scores": [
            made.get(token, never) if kind == NORMAL else 0.0 for token, kind in zip(tokens, types, strict=True)
        ],
        "add_space_prefix": _prefixes_space(document, where),
    }


def _prefixes_space(document: dict[str, Any], where: Path | None) -> bool:
    """Whether a SentencePiece-like tokenizer puts a space before text."""
    steps = _steps(document["normalizer"], "normalizers") + _steps(document["pre_tokenizer"], "pretokenizers")
    for step in steps:
        if step["type"] not in ("Prepend", "Replace", "Metaspace"):
            raise DanluError(f"GGUF has no name for the step {json.dumps(step)} of this tokenizer", where=where)
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def pre_name(document: dict[str, Any], where: Path | None = None) -> str:
    """The name GGUF has for how a byte-level tokenizer.json cuts text; DanluError where there is none."""
    cuts: list[str] = []
    for step in _steps(document["pre_tokenizer"], "pretokenizers"):
        cuts += _cuts(step, where)
    whole = bool(document["model"].get("ignore_merges"))
    for name, known in SPLITS.items():
        if known == tuple(cuts) and (name in WHOLE_WORDS) == whole:
            return name
    raise DanluError(
        f"GGUF has no name that Danlu knows for how this tokenizer cuts text: {json.dumps(cuts)}",
        where=where,
        fix=f"known: {', '.join(SPLITS)}",
    )


def _cuts(step: dict[str, Any], where: Path | None) -> list[str]:
    """The patterns one pre-tokenizer step cuts by."""
    kind = step["type"]
    if kind == "Digits" and step["individual_digits"]:
        return [r"\p{N}"]
    # "Removed" with invert keeps what matches: for patterns that match everything, the same as isolating it.
    isolates = kind == "Split" and (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True))
    if isolates and "Regex" in step["pattern"]:
        return [step["pattern"]["Regex"]]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return [GPT2] if step.get("use_regex", True) else []
    raise DanluError(f"GGUF has no name for the step {json.dumps(step)} of this tokenizer", where=where)


def _steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """A step, a sequence of steps or nothing -> a list of steps."""
    if part is None:
        return []
    return list(part[name]) if part["type"] == "Sequence" else [part]
