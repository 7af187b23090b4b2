"""Vocabularies learned from text: what goes in comes out, ids are the same everywhere, transformers reads them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from danlu.data.corpus_settings import VocabularySettings
from danlu.data.vocabulary import byte_symbols, even_sample, learn_vocabulary
from danlu.errors import DanluError
from danlu.tokenizer import Tokenizer

ENGLISH = "The alchemist heats the furnace; lead becomes gold, and 1024 elixirs are sealed in jars.\n"
CHINESE = "炼丹者燃起丹炉，铅化为金，炉火纯青，九转丹成，封坛一千零二十四。\n"
TEXTS = [f"{ENGLISH}{n} {CHINESE}{'naïve café 🙂' if n % 7 == 0 else ''}" for n in range(60)]
# Whole characters only: half a surrogate pair is no text.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def make(**chosen: object) -> Tokenizer:
    return learn_vocabulary(VocabularySettings.model_validate(chosen), iter(TEXTS))


BYTES = make(kind="bytes")
BPE = make(kind="bpe", size=400, special=("bos", "eos", "pad", "mask"), sentinels=3)
CHARACTERS = make(kind="characters", special=())
PIECES = make(kind="wordpiece", size=140, lowercase=True, sentinels=2)


def test_characters_are_numbered_in_the_order_of_unicode() -> None:
    known = sorted(set("".join(TEXTS)))
    assert CHARACTERS.vocab_size == len(known) and CHARACTERS.eos_id is None
    assert CHARACTERS.encode("".join(known)) == list(range(len(known)))
    with pytest.raises(DanluError, match="Ω"):
        CHARACTERS.encode("Ω")


@given(st.text(st.sampled_from(sorted(set("".join(TEXTS)))), max_size=40))
@settings(max_examples=60, deadline=None)
def test_known_characters_come_back(text: str) -> None:
    ids = CHARACTERS.encode(text)
    assert len(ids) == len(text) and CHARACTERS.decode(ids) == text


def test_with_a_size_rare_characters_are_unknown() -> None:
    made = make(kind="characters", size=40)
    assert made.vocab_size == 40 and made.eos_id == 39
    assert made.decode(made.encode("the elixir")) == "the elixir"
    assert made.encode("🙂Ω") == [0, 0] and made.decode([0], skip_special=False) == "<unk>"


@given(TEXT)
@settings(max_examples=60, deadline=None)
def test_a_byte_is_its_own_id(text: str) -> None:
    ids = BYTES.encode(text, special=False)
    assert ids == list(text.encode()) and BYTES.decode(ids) == text


def test_every_byte_has_a_symbol() -> None:
    assert sorted(byte_symbols().values()) == list(range(256))
    assert all(symbol.isprintable() and not symbol.isspace() for symbol in byte_symbols())
    assert BYTES.vocab_size == 257 and BYTES.eos_id == 256


@given(TEXT)
@settings(max_examples=60, deadline=None)
def test_merged_bytes_give_every_text_back(text: str) -> None:
    ids = BPE.encode(text, special=False)
    assert BPE.decode(ids) == text and len(ids) <= len(text.encode())


def test_merges_are_learned_in_both_languages() -> None:
    assert len(BPE.encode(ENGLISH)) < len(ENGLISH) / 3
    assert len(BPE.encode(CHINESE)) < len(CHINESE)
    assert make(kind="bpe", size=300).vocab_size == 300


def test_special_tokens_stand_last_and_sentinels_count_down() -> None:
    assert BPE.vocab_size == 400 and (BPE.bos_id, BPE.eos_id, BPE.pad_id) == (393, 394, 395) and BPE.adds_bos
    assert BPE.encode("<|mask|><extra_id_2><extra_id_1><extra_id_0>") == [396, 397, 398, 399]
    assert 394 not in BPE.encode("<|endoftext|>", special=False)
    assert BPE.eos_id in BPE.stop_ids


def test_gguf_has_a_name_for_merged_bytes() -> None:
    made = make(kind="bpe", size=300)
    facts = made.gguf_metadata(made.vocab_size)
    assert facts["ggml.pre"] == "smollm" and facts["ggml.eos_token_id"] == made.eos_id == 299


def test_pieces_of_words_are_those_of_transformers_bert() -> None:
    transformers = pytest.importorskip("transformers")
    vocabulary = PIECES._backend.get_vocab()
    theirs = transformers.BertTokenizerFast(vocab=vocabulary, do_lower_case=True)
    for text in (*TEXTS[:8], "Unknown Ω words, 未知字 too."):
        assert theirs(text)["input_ids"] == PIECES.encode_input(text)
    assert PIECES.encode("[PAD][UNK][CLS][SEP][MASK]") == [0, 1, 2, 3, 4]
    assert PIECES.encode_input("")[0] == 2 and PIECES.encode("<extra_id_0>") == [PIECES.vocab_size - 1]
    assert PIECES.vocab_size == 140


def test_every_process_learns_the_same() -> None:
    code = "from tests.data.test_vocabulary import BPE, PIECES; print(BPE.fingerprint, PIECES.fingerprint)"
    for seed in "12":
        environment = os.environ | {"PYTHONHASHSEED": seed}
        run = [sys.executable, "-c", code]
        said = subprocess.run(run, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
        assert said.stdout.split() == [BPE.fingerprint, PIECES.fingerprint], said.stderr


@pytest.mark.parametrize("made", [CHARACTERS, BYTES, BPE, PIECES], ids=["characters", "bytes", "bpe", "wordpiece"])
def test_transformers_reads_what_is_saved(made: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    made.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = made.encode(TEXTS[7])
    assert theirs.encode(TEXTS[7], add_special_tokens=False) == ids
    assert theirs.decode(ids) == made.decode(ids, skip_special=False) and len(theirs) == made.vocab_size
    again = VocabularySettings(kind="from", base=tmp_path)
    assert learn_vocabulary(again, iter(())).fingerprint == made.fingerprint


@given(st.lists(st.integers(1, 30), min_size=1, max_size=80), st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_a_sample_is_bounded_and_in_order(lengths: list[int], limit: int) -> None:
    texts = [chr(0x4E00 + n) * length for n, length in enumerate(lengths)]
    kept = even_sample(iter(texts), limit)
    assert kept and kept == [text for text in texts if text in kept]
    assert sum(map(len, kept)) <= limit or len(kept) == 1
    if sum(lengths) <= limit:
        assert kept == texts


def test_a_sample_is_even() -> None:
    texts = [f"{n:05d}" for n in range(20_000)]
    kept = [int(text) for text in even_sample(iter(texts), 10_000)]
    assert 900 <= len(kept) <= 2_000  # texts of five characters; the bound is halved, so at least about half stays
    quarters = [sum(n // 5_000 == quarter for n in kept) for quarter in range(4)]
    assert max(quarters) - min(quarters) < 5 * (len(kept) / 4) ** 0.5


def test_too_little_text_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert make(kind="bpe", size=5_000).vocab_size < 5_000
    assert "fewer than the 5,000 asked for" in capsys.readouterr().err
    for kind in ("characters", "bpe", "wordpiece"):
        size = {"size": 300} if kind != "characters" else {}
        with pytest.raises(DanluError, match="no text to learn"):
            learn_vocabulary(VocabularySettings(kind=kind, **size), iter(["", ""]))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"kind": "bpe"}, "needs a size"),
        ({"kind": "bpe", "size": 256}, "257 is the least"),
        ({"kind": "wordpiece", "size": 10, "sentinels": 5}, "11 is the least"),
        ({"kind": "bytes", "size": 300}, "leave out size"),
        ({"kind": "from"}, "base names the checkpoint"),
        ({"kind": "bytes", "base": "somewhere"}, "base names the checkpoint"),
        ({"kind": "wordpiece", "size": 300, "special": ["pad"]}, "special tokens of its own"),
        ({"kind": "from", "base": "somewhere", "sentinels": 1}, "leave out sentinels"),
        ({"kind": "bpe", "size": 300, "lowercase": True}, "lowercase belongs to"),
        ({"kind": "bytes", "special": ["eos", "eos"]}, "twice"),
    ],
)
def test_impossible_settings_are_refused(chosen: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        VocabularySettings.model_validate(chosen)
