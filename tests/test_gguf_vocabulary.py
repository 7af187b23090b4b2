from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, trainers

from danlu.data.corpus_settings import VocabularySettings
from danlu.data.vocabulary import learn_vocabulary
from danlu.errors import DanluError
from danlu.gguf_vocabulary import ALIASES, SPLITS, WHOLE_WORDS, pre_name
from danlu.tokenizer import Tokenizer
from tests.gguf_files import LlamaVocabulary, smaller, vocabulary_file
from tests.test_tokenizer import TEXTS

pytest.importorskip("llama_cpp")


@pytest.fixture(scope="module")
def small(smollm2: Path) -> dict[str, Any]:
    """SmolLM2's vocabulary cut to 4,000 tokens."""
    return smaller(Tokenizer.load(smollm2), 4000)


@pytest.mark.parametrize("pre", [*SPLITS, "deepseek-r1-qwen", "starcoder"])
def test_every_pre_tokenizer_cuts_as_llama_cpp_does(pre: str, small: dict[str, Any], tmp_path: Path) -> None:
    file = vocabulary_file({**small, "ggml.pre": pre}, tmp_path / "v.gguf")
    ours, engine = Tokenizer.load(file), LlamaVocabulary(file)
    for special in (True, False):
        assert ours.encode_batch(TEXTS, special) == [engine.encode(text, special) for text in TEXTS]
    again = ours.gguf_metadata(4000)
    assert again["ggml.pre"] == ALIASES.get(pre, pre)
    assert again["ggml.tokens"] == small["ggml.tokens"]
    assert again["ggml.token_type"] == small["ggml.token_type"]


def test_the_begin_token_is_added_where_llama_cpp_would(small: dict[str, Any], tmp_path: Path) -> None:
    unsaid = {key: value for key, value in small.items() if key != "ggml.add_bos_token"}
    for pre in ("llama-bpe", "smollm"):
        file = vocabulary_file({**unsaid, "ggml.pre": pre}, tmp_path / f"{pre}.gguf")
        assert Tokenizer.load(file).adds_bos == (LlamaVocabulary(file).encode("a", bos=True)[0] == 1)


def test_a_directory_with_a_begin_token_adds_it_in_transformers_too(small: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    file = vocabulary_file({**small, "ggml.add_bos_token": True}, tmp_path / "v.gguf")
    ours = Tokenizer.load(file)
    ours.save(tmp_path / "hf")
    assert Tokenizer.load(tmp_path / "hf").adds_bos
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").encode("a b") == [ours.bos_id, *ours.encode("a b")]


def test_an_unknown_pre_tokenizer_is_refused_with_the_nearest(small: dict[str, Any], tmp_path: Path) -> None:
    file = vocabulary_file({**small, "ggml.pre": "lama-bpe"}, tmp_path / "v.gguf")
    with pytest.raises(
        DanluError, match=r"lama-bpe is not known\n.*did you mean llama-bpe\?.*smollm, llama-bpe, qwen2"
    ):
        Tokenizer.load(file)


def test_without_a_pre_tokenizer_llama_cpps_default_is_used_and_said(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unsaid = {key: value for key, value in small.items() if key != "ggml.pre"}
    file = vocabulary_file(unsaid, tmp_path / "v.gguf")
    ours, engine = Tokenizer.load(file), LlamaVocabulary(file)
    assert "names no pre-tokenizer" in capsys.readouterr().err
    assert ours.encode_batch(TEXTS) == [engine.encode(text) for text in TEXTS]


def test_inconsistent_vocabularies_are_refused(small: dict[str, Any], tmp_path: Path) -> None:
    tokens = small["ggml.tokens"]
    changes = {
        "token types": {"ggml.token_type": small["ggml.token_type"][:-1]},
        "same token text": {"ggml.tokens": [*tokens[:-1], tokens[40]]},
        "kind bert": {"ggml.model": "bert"},
        "lack tokenizer.ggml.merges": {"ggml.merges": []},
    }
    for complaint, change in changes.items():
        file = vocabulary_file({**small, **change}, tmp_path / "v.gguf")
        with pytest.raises(DanluError, match=complaint):
            Tokenizer.load(file)


@pytest.mark.parametrize(
    "steps",
    [
        [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False}],
        [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}],
    ],
)
def test_other_spellings_of_the_same_rules_have_the_same_name(steps: list[dict[str, Any]]) -> None:
    document = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "model": {"ignore_merges": False}}
    assert pre_name(document) == ("smollm" if len(steps) == 2 else "gpt-2")


@pytest.mark.parametrize("step", [{"type": "Whitespace"}, {"type": "ByteLevel", "add_prefix_space": True}, None])
def test_rules_that_gguf_cannot_name_are_refused(step: dict[str, Any] | None) -> None:
    with pytest.raises(DanluError, match="GGUF has no name"):
        pre_name({"pre_tokenizer": step, "model": {}})


def test_names_and_rules_are_one_to_one() -> None:
    keys = {(cuts, name in WHOLE_WORDS) for name, cuts in SPLITS.items()}
    assert len(keys) == len(SPLITS)
    assert set(ALIASES.values()) <= set(SPLITS)


@pytest.fixture(scope="module", params=["prefix", "no prefix"])
def sentencepiece(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer of Llama 2's kind, trained on this file: BPE over ▁, bytes as a fallback."""
    prefix = request.param == "prefix"
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    lines = Path(__file__).read_text(encoding="utf-8").split("\n")
    backend.train_from_iterator([line.lstrip() for line in lines], trainer)
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    document = json.loads(backend.to_str())
    document["added_tokens"] = document["added_tokens"][:3]  # the trainer makes the bytes special; they are not
    out = tmp_path_factory.mktemp("sentencepiece")
    (out / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    named = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
    (out / "tokenizer_config.json").write_text(json.dumps({**named, "add_bos_token": True}))
    return out


def test_sentencepiece_ids_equal_llama_cpp_in_both_directions(sentencepiece: Path, tmp_path: Path) -> None:
    ours = Tokenizer.load(sentencepiece)
    file = vocabulary_file(ours.gguf_metadata(1000), tmp_path / "v.gguf")
    engine, again = LlamaVocabulary(file), Tokenizer.load(file)
    texts = [*TEXTS, "def test_every(param): # 你 ▁", "<s>hello</s> there", "import the model"]
    expected = ours.encode_batch(texts)
    assert [engine.encode(text) for text in texts] == expected
    assert again.encode_batch(texts) == expected
    assert again.adds_bos
    assert [again.decode(ids, skip_special=False) for ids in expected] == [
        ours.decode(ids, skip_special=False) for ids in expected
    ]
    written = again.gguf_metadata(1000)
    assert written["ggml.token_type"] == ours.gguf_metadata(1000)["ggml.token_type"]
    assert written["ggml.add_space_prefix"] == ours.gguf_metadata(1000)["ggml.add_space_prefix"]


def test_an_unknown_token_out_of_range_is_refused(sentencepiece: Path, tmp_path: Path) -> None:
    metadata = Tokenizer.load(sentencepiece).gguf_metadata(1000) | {"ggml.unknown_token_id": 5000}
    with pytest.raises(DanluError, match="unknown token is id 5,000 of only 1,000"):
        Tokenizer.load(vocabulary_file(metadata, tmp_path / "v.gguf"))


def test_an_end_of_turn_that_a_file_calls_ordinary_is_special_as_in_llama_cpp(
    small: dict[str, Any], tmp_path: Path
) -> None:
    types = [1, 1, 1, *small["ggml.token_type"][3:]]
    file = vocabulary_file({**small, "ggml.token_type": types}, tmp_path / "v.gguf")
    ours, engine = Tokenizer.load(file), LlamaVocabulary(file)
    text = "hi<|im_end|><|endoftext|>"
    assert ours.encode(text) == engine.encode(text)
    assert ours.encode(text)[-2:] == [2, 0]
    assert ours.stop_ids == {0, 2}


def test_bytes_without_merges_are_refused(tmp_path: Path) -> None:
    """llama.cpp loads no file whose vocabulary has no merges."""
    learn_vocabulary(VocabularySettings(kind="bytes"), []).save(tmp_path)
    with pytest.raises(DanluError, match="merges no bytes, and llama"):
        Tokenizer.load(tmp_path).gguf_metadata(257)


def test_ids_beyond_the_models_vocabulary_are_refused(sentencepiece: Path) -> None:
    with pytest.raises(DanluError, match="vocabulary ends at 500"):
        Tokenizer.load(sentencepiece).gguf_metadata(500)
