"""A vocabulary cut down to what a text needs: fewer rows of embedding and head, and every text still has tokens.

Text whose pieces are all kept is cut into the same pieces as before; what was dropped is spelled in smaller ones, down
to bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from danlu.artifact import Figures, figure
from danlu.compress.product import Making, Product, Shelf, Source, workplace
from danlu.compress.quality import cut
from danlu.data.vocabulary import byte_symbols
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint
from danlu.tokenizer import Tokenizer

BY_WORD = ("embedding.tokens.weight", "head.weight", "head.bias")  # one row a word
TALK = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}, {"role": "user", "content": "?"}]


def prune_vocabulary(
    checkpoint: Checkpoint, text: str, out: Path, keep: int | None = None, dtype: torch.dtype = torch.float32
) -> Product:
    """Drop the words that a text does not need and write a Hugging Face directory.

    Kept are, besides those of the text: special tokens, the pieces of the chat template, every byte, and what merges
    lead to a kept word. Nothing else about the model changes: with all pieces of a text kept, logits over kept words
    are what they were.

    Args:
        checkpoint: a decoder whose vocabulary is byte-pair encoding.
        text: like what the model is for, and much of it: words that it lacks are spelled.
        out: the directory.
        keep: words that stay: the text's most frequent ones; where it has fewer, the rest are those that the
            vocabulary itself was built of first, which are frequent in any text. By default all of the text's.
        dtype: of the stored weights.

    Raises DanluError where the vocabulary is of another kind, the text is empty, `keep` leaves no room for what must
    stay, or is the whole vocabulary.
    """
    making = Making("vocabulary", "compress/pruning/vocabulary", {"keep": keep}, checkpoint)
    tokenizer = checkpoint.tokenizer
    counts = _counts(tokenizer, text)
    kept = kept_ids(tokenizer, counts, keep)
    smaller = reduced(tokenizer, kept)
    source, rows = Source.of(checkpoint), torch.tensor(kept)
    config = replace(source.config, vocab_size=len(kept))
    with workplace(out) as folder, torch.inference_mode():
        shelf = Shelf(folder)
        for name in set(BY_WORD) & source.makers.keys():
            shelf.keep(name, source.makers[name]()[rows])
        shelf.keep_others(source)
        making.write(config, shelf, smaller, out, dtype)
    return making.sign(out, _figures(checkpoint, text, counts, kept, smaller, source.parameters))


def kept_ids(tokenizer: Tokenizer, counts: Mapping[int, int], keep: int | None = None) -> list[int]:
    """The ids that stay, ascending.

    Args:
        counts: how often each occurs in a text.
        keep: how many stay; None for all that occur.

    Raises DanluError where the vocabulary is no byte-pair encoding, what must stay is more than `keep`, or no word
    would go.
    """
    document = tokenizer.document
    kind = document["model"].get("type")
    if kind != "BPE" or document["model"].get("continuing_subword_prefix"):
        what = f"a vocabulary of the kind {kind} whose words are made so cannot be cut down; byte-pair encoding can"
        raise DanluError(what, where=tokenizer.where)
    parts = _parts(document)
    kept = _closed(_needed(tokenizer, document), parts)
    least = len(kept)
    if keep is not None and keep < least:
        what = f"{keep:,} words are too few: {least:,} must stay, bytes, special tokens and those of the chat template"
        raise DanluError(what, where="--keep", fix=f"keep {least:,} or more")
    if keep is not None and keep >= tokenizer.vocab_size:
        what = f"no words would go: the vocabulary has {tokenizer.vocab_size:,}"
        raise DanluError(what, where="--keep", fix=f"keep fewer, down to {least:,}")
    wanted = sorted(counts, key=lambda number: (-counts[number], number))
    if keep is not None:
        wanted += sorted(set(document["model"]["vocab"].values()) - counts.keys())
    for number in wanted:
        more = _closed([number], parts) - kept
        if keep is None or len(kept) + len(more) <= keep:
            kept |= more
    return sorted(kept)


def reduced(tokenizer: Tokenizer, kept: list[int]) -> Tokenizer:
    """The same tokenizer with these ids alone, numbered anew in their order."""
    new = {old: number for number, old in enumerate(kept)}
    document, config = tokenizer.document, tokenizer.config
    model = document["model"]
    vocab = {token: new[old] for token, old in model["vocab"].items() if old in new}
    model["vocab"] = vocab
    model["merges"] = [merge for merge in model["merges"] if all(part in vocab for part in _spelled(merge))]
    document["added_tokens"] = [added | {"id": new[added["id"]]} for added in document["added_tokens"]]
    _renumber(document.get("post_processor"), new)
    listed = config.get("added_tokens_decoder")
    if isinstance(listed, dict):
        config["added_tokens_decoder"] = {str(new[int(old)]): one for old, one in listed.items() if int(old) in new}
    stops = frozenset(new[old] for old in tokenizer.stop_ids if old in new)
    made = Tokenizer(document, config, stops, tokenizer.where)
    for added in document["added_tokens"]:
        if made.id_of(added["content"]) != added["id"]:
            what = f"the token {added['content']} stands before words that are no tokens of their own kind"
            raise DanluError(what, where=tokenizer.where, fix="the ids of added tokens must come after all words")
    return made


def _counts(tokenizer: Tokenizer, text: str) -> Counter[int]:
    """How often each token occurs in a text."""
    if not text.strip():
        raise DanluError("the text is empty", where="--calibration", fix="name a text like what the model is for")
    counts: Counter[int] = Counter()
    for ids in tokenizer.encode_batch(cut(text, 100_000), special=False):
        counts.update(ids)
    return counts


def _needed(tokenizer: Tokenizer, document: dict[str, Any]) -> set[int]:
    """What must stay whatever the text: special tokens, the unknown one, bytes, and the pieces of the chat template."""
    vocab = document["model"]["vocab"]
    needed = {added["id"] for added in document["added_tokens"]}
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    always = [*byte_symbols(), *fallback, document["model"].get("unk_token")]
    needed |= {vocab[token] for token in always if token in vocab}
    if tokenizer.chat_template is not None:
        for talk in (TALK, [{"role": "system", "content": "."}, *TALK]):
            needed |= set(_rendered(tokenizer, talk))
    return needed


def _rendered(tokenizer: Tokenizer, talk: list[dict[str, Any]]) -> list[int]:
    """Tokens of a conversation; none where the template refuses it, as some do with a system's message."""
    try:
        return tokenizer.encode(tokenizer.render(talk, generation_prompt=True))
    except DanluError:
        return []


def _spelled(merge: str | list[str]) -> list[str]:
    """The two parts of a merge and what they make. tokenizer.json has two spellings."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return [left, right, left + right]


def _parts(document: dict[str, Any]) -> dict[int, set[int]]:
    """Of each id, those that merges make it of."""
    vocab, parts = document["model"]["vocab"], dict[int, set[int]]()
    for merge in document["model"]["merges"]:
        left, right, made = (vocab[part] for part in _spelled(merge))
        parts.setdefault(made, set()).update((left, right))
    return parts


def _closed(ids: Iterable[int], parts: Mapping[int, set[int]]) -> set[int]:
    """These ids and all that merges make them of.

    Then each text whose tokens are all kept is cut as before: every merge that was carried out on it is kept, and the
    first of the merges that are kept is the first of all.
    """
    found, waiting = set[int](), list(ids)
    while waiting:
        number = waiting.pop()
        if number not in found:
            found.add(number)
            waiting += parts.get(number, ())
    return found


def _renumber(step: Any, new: Mapping[int, int]) -> None:
    """Ids in what tokenizer.json puts around a text, changed in place."""
    if isinstance(step, dict):
        listed = step.get("special_tokens")
        for token in listed.values() if isinstance(listed, dict) else ():
            token["ids"] = [new[old] for old in token["ids"]]
        for pair in (step.get("sep"), step.get("cls")):
            if isinstance(pair, list):
                pair[1] = new[pair[1]]
        for inner in step.get("processors", ()):
            _renumber(inner, new)


def _figures(
    checkpoint: Checkpoint, text: str, counts: Mapping[int, int], kept: list[int], smaller: Tokenizer, before: int
) -> Figures:
    """Sizes, and how much more often the text itself is now cut."""
    config, total = checkpoint.config, sum(counts.values())
    rows = 1 if config.tied else 2
    dropped = (config.vocab_size - len(kept)) * config.width * rows
    spelled = sum(len(ids) for ids in smaller.encode_batch(cut(text, 100_000), special=False))
    return {
        "words_before": figure(config.vocab_size, "words"),
        "words": figure(len(kept), "words"),
        "parameters_before": figure(before, "parameters"),
        "parameters": figure(before - dropped, "parameters"),
        "tokens_of_the_text": figure(spelled / total - 1, "share", by=f"rise; {total:,} tokens before"),
    }
