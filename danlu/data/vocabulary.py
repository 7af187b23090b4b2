"""Vocabularies to pre-train with, learned from the corpus itself: characters, bytes, merged bytes, pieces of words.

Each becomes a `Tokenizer`, so a checkpoint carries it and transformers loads it. All but WordPiece give a text back as
it was, in every script.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from danlu.console import say, warn
from danlu.data.corpus_settings import VocabularySettings
from danlu.errors import DanluError
from danlu.gguf_vocabulary import SPLITS
from danlu.tokenizer import Tokenizer

SPECIAL = {"bos": "<|begin|>", "eos": "<|endoftext|>", "pad": "<|pad|>", "mask": "<|mask|>"}
WORDPIECE = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
UNKNOWN = "<unk>"
CONTINUES = "##"  # before a piece that is not the first of its word
WORDS = SPLITS["smollm"]  # digits one by one, then GPT-2's words: keeps the text, and GGUF has a name for it
WHERE = Path("vocabulary")  # named in errors of a tokenizer that lies in no file


def learn_vocabulary(settings: VocabularySettings, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that the settings describe.

    Args:
        settings: its kind and size.
        texts: the corpus, read once from front to back in memory that does not grow with it; kinds `bytes` and `from`
            do not read it.

    Returns: a tokenizer; the same texts in the same order give the same one.
    Raises DanluError where there is no text to learn from, or the checkpoint has no tokenizer.
    """
    if settings.kind == "from":
        assert settings.base is not None
        return Tokenizer.load(settings.base)
    if settings.kind == "characters":
        return _characters(settings, texts)
    if settings.kind == "bytes":
        return _finish(_byte_level(models.BPE(byte_symbols(), [])), SPECIAL, settings.special, settings.sentinels)
    sample = even_sample((text for text in texts if text), settings.learn_characters)
    if not sample:
        raise DanluError("there is no text to learn a vocabulary from")
    return _merged_bytes(settings, sample) if settings.kind == "bpe" else _wordpiece(settings, sample)


def byte_symbols() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary -> the byte.

    Latin-1's printable characters stand for themselves, the other bytes for the characters from U+0100 on (GPT-2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def even_sample(texts: Iterable[str], characters: int, seed: int = 0) -> list[str]:
    """Texts drawn evenly from all, in their order, together at most `characters` long; one text alone may be longer.

    Each text draws a number and is kept where that is below a bound, which is halved when too much is kept (Wegman's
    adaptive sampling: Flajolet, Computing 43, 1990). So the texts are read once, and what is kept is all that is held.
    """
    draw = random.Random(seed)
    kept: list[tuple[float, str]] = []
    bound, size = 1.0, 0
    for text in texts:
        number = draw.random()
        if number > bound:
            continue
        kept.append((number, text))
        size += len(text)
        while size > characters and len(kept) > 1:
            bound = max(bound / 2, min(number for number, _ in kept))
            kept = [one for one in kept if one[0] <= bound]
            size = sum(len(text) for _, text in kept)
    return [text for _, text in kept]


# --- Kinds --------------------------------------------------------------------------------------------------------


def _characters(settings: VocabularySettings, texts: Iterable[str]) -> Tokenizer:
    """A token a character, in the order of Unicode. Without a size an unknown one is an error, otherwise <unk>."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    if not counts:
        raise DanluError("there is no text to learn a vocabulary from")
    unknown = [] if settings.size is None else [UNKNOWN]
    room = None if settings.size is None else settings.size - len(unknown) - len(settings.special) - settings.sentinels
    if room is not None and room < 1:
        raise DanluError(f"vocabulary.size {settings.size} leaves no room for characters", fix="raise it")
    kept = sorted(_most_frequent(counts)[:room])
    if len(kept) < len(counts):
        share = sum(counts[one] for one in kept) / counts.total()
        say(f"vocabulary: {len(kept):,} of {len(counts):,} characters, which are {share:.4%} of the text")
    backend = Backend(models.WordLevel({text: n for n, text in enumerate([*unknown, *kept])}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    names, roles = {**SPECIAL, "unk": UNKNOWN}, [*(["unk"] if unknown else []), *settings.special]
    return _finish(backend, names, roles, settings.sentinels)


def _merged_bytes(settings: VocabularySettings, sample: list[str]) -> Tokenizer:
    """Byte-level BPE (arXiv:1508.07909, and the GPT-2 report): every text has tokens, and comes back as it was."""
    assert settings.size is not None
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=settings.size - len(settings.special) - settings.sentinels,
        min_frequency=settings.minimum_frequency,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(iter(sample), trainer)
    return _checked(_finish(backend, SPECIAL, settings.special, settings.sentinels), settings.size)


def _wordpiece(settings: VocabularySettings, sample: list[str]) -> Tokenizer:
    """BERT's pieces of words (arXiv:1810.04805); each Chinese character is a word of its own."""
    assert settings.size is not None
    backend = Backend(models.WordPiece({WORDPIECE["unk"]: 0}, unk_token=WORDPIECE["unk"]))
    backend.normalizer = normalizers.BertNormalizer(lowercase=settings.lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    room = settings.size - len(WORDPIECE) - settings.sentinels
    # The library numbers letters by the order of a hash table, another in every process; named beforehand, their
    # numbers, and with them the ties between merges, are the same in all.
    named = [*WORDPIECE.values(), *_alphabet(backend, sample, room, settings.minimum_frequency)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=room + len(WORDPIECE),
        min_frequency=settings.minimum_frequency,
        special_tokens=named,
        limit_alphabet=0,
        show_progress=False,
    )
    learned = Backend(models.WordPiece({WORDPIECE["unk"]: 0}, unk_token=WORDPIECE["unk"]))
    learned.normalizer, learned.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    learned.train_from_iterator(iter(sample), trainer)
    backend.model = models.WordPiece(learned.get_vocab(), unk_token=WORDPIECE["unk"])
    backend.decoder = decoders.WordPiece(prefix=CONTINUES, cleanup=False)
    begin, end = WORDPIECE["cls"], WORDPIECE["sep"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B:1 {end}:1",
        special_tokens=[(text, backend.token_to_id(text)) for text in (begin, end)],
    )
    return _checked(_finish(backend, WORDPIECE, list(WORDPIECE), settings.sentinels), settings.size)


def _alphabet(backend: Backend, sample: Sequence[str], room: int, minimum: int) -> list[str]:
    """The letters pieces are made of, most frequent first: each by itself and, where it occurs so, continuing a word.

    Letters that occur less than `minimum` times, or find no room, are unknown.
    """
    words: Counter[str] = Counter()
    for text in sample:
        words.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text)))
    counts: Counter[str] = Counter()
    inside: set[str] = set()
    for word, count in words.items():
        for letter in word:
            counts[letter] += count
        inside.update(word[1:])
    made: list[str] = []
    for letter in _most_frequent(counts):
        forms = [letter, CONTINUES + letter] if letter in inside else [letter]
        if counts[letter] < minimum or len(made) + len(forms) > room:
            break
        made += forms
    return made


# --- Making a tokenizer -------------------------------------------------------------------------------------------


def _byte_level(model: models.Model) -> Backend:
    """Text -> words -> bytes, for a model whose symbols stand for bytes."""
    backend = Backend(model)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in WORDS]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _finish(backend: Backend, names: dict[str, str], roles: Sequence[str], sentinels: int) -> Tokenizer:
    """The tokenizer with its special tokens after all others; <extra_id_0> is the very last, as in T5."""
    extra = [f"<extra_id_{number}>" for number in reversed(range(sentinels))]
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in [*(names[r] for r in roles), *extra]])
    config: dict[str, Any] = {f"{role}_token": names[role] for role in roles}
    config |= {"add_bos_token": "bos" in roles, "clean_up_tokenization_spaces": False}
    return Tokenizer(json.loads(backend.to_str()), config, frozenset(), WHERE)


def _checked(tokenizer: Tokenizer, size: int) -> Tokenizer:
    """Say where the text had fewer pairs to merge than asked for."""
    if tokenizer.vocab_size < size:
        warn(f"vocabulary: the text gives {tokenizer.vocab_size:,} tokens, fewer than the {size:,} asked for")
    return tokenizer


def _most_frequent(counts: Counter[str]) -> list[str]:
    """All of them, ties in the order of Unicode."""
    return sorted(counts, key=lambda text: (-counts[text], text))
