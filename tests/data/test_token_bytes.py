"""The bytes of each token, in every kind of vocabulary; SmolLM2's are compared with llama.cpp's in tests/serve."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from danlu.data.corpus_settings import VocabularySettings
from danlu.data.token_bytes import TokenBytes
from danlu.data.vocabulary import learn_vocabulary
from danlu.tokenizer import Tokenizer


def test_a_sentencepiece_s() -> None:
    names = ["<unk>", "<0xE4>", "<0xB8>", "<0x20>", "▁", "▁a", "a", "丹"]
    model = models.BPE({name: at for at, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    backend = Backend(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    known = TokenBytes(Tokenizer(json.loads(backend.to_str()), {}, frozenset(), Path("made")))
    assert [known.of(at) for at in range(1, 9)] == [b"\xe4", b"\xb8", b" ", b" ", b" a", b"a", "丹".encode(), b"<s>"]
    assert known.ids[b" a"] == 5 and known.ids["丹".encode()] == 7
    assert known.ids[b" "] is None  # two tokens are a space: its bytes do not say which


def test_pieces_of_words_and_bytes() -> None:
    pieces = learn_vocabulary(VocabularySettings(kind="wordpiece", size=60), ["gold golden ore", "gold and ore"])
    known = TokenBytes(pieces)
    whole, rest = pieces.id_of("g"), pieces.id_of("##o")
    assert whole is not None and rest is not None
    assert (known.of(whole), known.of(rest)) == (b" g", b"o")
    single = TokenBytes(learn_vocabulary(VocabularySettings(kind="bytes"), []))
    assert sorted(made for made in map(single.of, range(256)) if made is not None) == [bytes([at]) for at in range(256)]
    assert single.of(257) is None
