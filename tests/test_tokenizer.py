from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.data.corpus_settings import VocabularySettings
from danlu.data.vocabulary import learn_vocabulary
from danlu.errors import DanluError
from danlu.gguf_header import read_header
from danlu.tokenizer import Tokenizer, UnknownCharacter
from tests.gguf_files import LlamaVocabulary, vocabulary_file

TEXTS = [
    "",
    " ",
    "Hello, world! It's 2024-11-21; we'll pay $1,234.56 — don't I'LL x'S.",
    "def f(x):\n    return x**2  # square\n\n\n\tif a <= b: pass   \n",
    "你好，世界！大模型训练１２３４ 全角，混合 English 和中文。",
    "emoji 😀👩‍👩‍👧‍👦 🇨🇳 ok ½ ² Ⅳ ٣ é ñ Ünïcödé",
    "  leading, trailing and\ttabs \t  ",
    "a\r\nb\r\n\r\n c\n\n\n   d",
    "x\u00a0y\u3000z\u2028w \u200bq",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "1 22 333 4444 55555 0x1F 3.14159e-10",
    "camelCaseHTTPServer snake_case UPPER lower-КИРИЛЛИЦА العربية हिन्दी 한국어 日本語",
]
CHAT = [
    {"role": "system", "content": "Be brief <b>& true</b>."},
    {"role": "user", "content": '你好 "quoted"\n'},
    {"role": "assistant", "content": "Hi."},
]
ROLES = "user\nassistant\n"


@pytest.fixture(scope="module")
def real(smollm2: Path) -> Tokenizer:
    return Tokenizer.load(smollm2)


def with_template(template: object) -> Tokenizer:
    """A tokenizer with this chat template."""
    tiny = byte_tokenizer()
    return Tokenizer(json.loads(tiny._json), {**tiny._config, "chat_template": template}, frozenset(), Path("here"))


def test_facts_of_smollm2(real: Tokenizer) -> None:
    assert (real.vocab_size, real.bos_id, real.eos_id, real.pad_id) == (49152, 1, 2, 2)
    assert real.stop_ids == {0, 2}
    assert not real.adds_bos


@pytest.mark.parametrize("special", [True, False])
def test_ids_equal_llama_cpp(real: Tokenizer, smollm2: Path, special: bool) -> None:
    pytest.importorskip("llama_cpp")
    engine = LlamaVocabulary(smollm2)
    ours = real.encode_batch(TEXTS, special)
    assert ours == [engine.encode(text, special) for text in TEXTS]
    assert ours == [real.encode(text, special) for text in TEXTS]


def test_special_text_stays_text_when_asked(real: Tokenizer) -> None:
    assert real.encode("<|im_end|>") == [2]
    assert 2 not in real.encode("<|im_end|>", special=False)
    assert real.decode(real.encode("<|im_end|>", special=False)) == "<|im_end|>"
    assert real.decode([2]) == ""
    assert real.decode([2], skip_special=False) == "<|im_end|>"


@settings(max_examples=80, deadline=None)
@given(text=st.text())
def test_text_survives_and_offsets_cover_it(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert ids == tokenizer.encode(text)
    covered = {place for start, end in offsets for place in range(start, end)}
    assert covered == set(range(len(text)))
    assert offsets == sorted(offsets)


@cache
def byte_tokenizer() -> Tokenizer:
    from tests.model.tiny import tiny_tokenizer

    return tiny_tokenizer()


def characters(size: int | None) -> Tokenizer:
    """A vocabulary of the characters a, b and the line's end."""
    return learn_vocabulary(VocabularySettings(kind="characters", size=size, special=()), ["ab\nba\n"])


@settings(max_examples=40, deadline=None)
@given(before=st.text("ab\n"), unknown=st.characters(exclude_characters="ab\n"), after=st.text())
def test_a_character_without_a_token_is_named(before: str, unknown: str, after: str) -> None:
    tokenizer, text = characters(None), before + unknown + after
    assert tokenizer.unk_id is None and tokenizer.decode(tokenizer.encode(before)) == before
    for encode in (
        lambda: tokenizer.encode(text),
        lambda: tokenizer.encode(text, special=False),
        lambda: tokenizer.encode_input(text),
        lambda: tokenizer.encode_with_offsets(text),
        lambda: tokenizer.encode_batch(["ab", text, text]),
    ):
        with pytest.raises(UnknownCharacter) as error:
            encode()
        assert f"the character {unknown!r} (U+{ord(unknown):04X}) is not in the vocabulary" == error.value.what
        assert error.value.place == len(before) and error.value.text in (0, 1)
        assert error.value.where == Path("vocabulary") and "leave it out of the text" in str(error.value.fix)
    assert error.value.text == 1


def test_what_stands_for_unknown_characters_is_known(real: Tokenizer) -> None:
    some = characters(4)
    assert some.unk_id is not None and some.encode("a炉b") == [some.id_of("a"), some.unk_id, some.id_of("b")]
    assert byte_tokenizer().unk_id is None and real.unk_id == 0


def test_saved_tokenizer_is_the_same_here_and_in_transformers(real: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    real.save(tmp_path)
    again, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert again.fingerprint == real.fingerprint
    assert again.stop_ids == real.stop_ids
    assert theirs(TEXTS, add_special_tokens=False)["input_ids"] == real.encode_batch(TEXTS)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
    for prompt in (True, False):
        expected = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
        assert real.render(CHAT, prompt) == again.render(CHAT, prompt) == expected


def test_gguf_facts_survive_a_round_trip_through_a_directory(real: Tokenizer, smollm2: Path, tmp_path: Path) -> None:
    real.save(tmp_path)
    written, read = Tokenizer.load(tmp_path).gguf_metadata(49152), read_header(smollm2).metadata
    for key in ("model", "pre", "tokens", "token_type", "merges", "bos_token_id", "padding_token_id", "add_bos_token"):
        assert written[f"ggml.{key}"] == read[f"tokenizer.ggml.{key}"], key
    assert written["chat_template"] == read["tokenizer.chat_template"]


def test_the_tokenizer_needs_no_torch() -> None:
    code = "import sys, danlu.tokenizer; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages | tojson }}", json.dumps(CHAT, ensure_ascii=False)),
        ("{%- for m in messages %}\n {% if loop.first %}{% continue %}{% endif %}\n{{ m.role }}\n{% endfor %}", ROLES),
        ("{{ bos_token }}|{{ eos_token }}|{{ add_generation_prompt }}", "<|im_start|>|<|im_end|>|False"),
        ("{{ strftime_now('%Y') | length }}{{ tools is none }}", "4True"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}a{% endgeneration %}{{ x }}", "a1"),
    ],
)
def test_templates_follow_the_conventions_of_hugging_face(template: str, text: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = with_template(template)
    assert ours.render(CHAT) == text
    ours.save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(CHAT, tokenize=False) == text


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for m in messages %}", "line 1 of the chat template"),
        ("{{ messages[0].content + 1 }}", "refuses this conversation"),
    ],
)
def test_a_template_that_refuses_says_why(template: str | None, complaint: str) -> None:
    with pytest.raises(DanluError, match=complaint):
        with_template(template).render(CHAT)


def directory(tmp_path: Path, config: dict | None = None, **changes: object) -> Path:
    """A saved tiny tokenizer, its tokenizer.json changed."""
    byte_tokenizer().save(tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text()) | changes
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_limits_and_additions_of_the_file_do_not_apply(tmp_path: Path) -> None:
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    assert len(Tokenizer.load(directory(tmp_path, truncation=cut)).encode("abcdef")) == 6


def test_bos_comes_from_the_configuration_or_the_post_processor(tmp_path: Path) -> None:
    bos = "<|im_start|>"
    first = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {bos: {"id": bos, "ids": [1], "tokens": [bos]}}
    step = {"type": "TemplateProcessing", "single": first, "pair": [*first, *first], "special_tokens": tokens}
    wrapped = {"type": "Sequence", "processors": [step]}
    assert Tokenizer.load(directory(tmp_path, {"bos_token": bos}, post_processor=step)).adds_bos
    assert Tokenizer.load(directory(tmp_path, {"bos_token": {"content": bos}}, post_processor=wrapped)).adds_bos
    assert not Tokenizer.load(directory(tmp_path, {"bos_token": bos})).adds_bos
    off = {"bos_token": bos, "add_bos_token": False}
    assert not Tokenizer.load(directory(tmp_path, off, post_processor=step)).adds_bos
    assert Tokenizer.load(tmp_path).encode("a")[0] != 1


def test_stop_ids_come_from_every_file(tmp_path: Path) -> None:
    directory(tmp_path, {"eos_token": "<|im_start|>"})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert Tokenizer.load(tmp_path).stop_ids == {0, 1, 2, 7, 9}


def test_a_template_of_several_is_the_default_one(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    directory(tmp_path, {"chat_template": several})
    (tmp_path / "chat_template.jinja").unlink()
    assert Tokenizer.load(tmp_path).render(CHAT) == "d"


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DanluError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\0")
    with pytest.raises(DanluError, match=r"only tokenizer\.model"):
        Tokenizer.load(tmp_path)
    for broken in (
        "{",
        "[]",
        "{}",
        '{"model": {"type": "BPE"}, "added_tokens": []}',
        '{"model": 1, "added_tokens": []}',
    ):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(DanluError, match=str(tmp_path)):
            Tokenizer.load(tmp_path)


def test_a_gguf_whose_special_ids_are_out_of_range_is_refused(tmp_path: Path) -> None:
    metadata = byte_tokenizer().gguf_metadata(300)
    file = vocabulary_file({**metadata, "ggml.eos_token_id": 400}, tmp_path / "v.gguf")
    with pytest.raises(DanluError, match="eos token is id 400 of only 300"):
        Tokenizer.load(file)
