"""Fewer words: the same pieces and the same logits on text whose words are kept, and tokens for any text at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from danlu.cli import app
from danlu.compress.pruning.vocabulary import kept_ids, prune_vocabulary, reduced
from danlu.compress.quality import loss_change
from danlu.data.corpus_settings import VocabularySettings
from danlu.data.vocabulary import learn_vocabulary
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint
from danlu.model.gguf import write_gguf
from danlu.tokenizer import Tokenizer
from tests.compress.short import OTHER, TEXT


@pytest.fixture(scope="module")
def whole(smollm2: Path) -> Tokenizer:
    return Tokenizer.load(smollm2)


def kept_of(tokenizer: Tokenizer, text: str, keep: int | None = None) -> list[int]:
    ids = tokenizer.encode(text, special=False)
    return kept_ids(tokenizer, {number: ids.count(number) for number in set(ids)}, keep)


def texts_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.decode([number]) for number in ids]


def test_text_whose_words_are_kept_is_cut_as_before(whole: Tokenizer) -> None:
    kept = kept_of(whole, TEXT[:20_000])
    small = reduced(whole, kept)
    assert small.vocab_size == len(kept) < 0.1 * whole.vocab_size
    for line in TEXT[:20_000].splitlines():
        ids = whole.encode(line, special=False)
        if set(ids) <= set(kept):
            assert [kept[number] for number in small.encode(line, special=False)] == ids
    words = [word for word in texts_of(whole, kept) if "\ufffd" not in word]
    for word in words[:: len(words) // 300]:  # words that the text may hold only within others
        ids = whole.encode(word, special=False)
        if set(ids) <= set(kept):
            assert [kept[number] for number in small.encode(word, special=False)] == ids


@pytest.fixture(scope="module")
def smaller(whole: Tokenizer) -> dict[int | None, Tokenizer]:
    """By the words that may stay."""
    return {keep: reduced(whole, kept_of(whole, TEXT[:20_000], keep)) for keep in (None, 800, 1500)}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60), st.sampled_from([None, 800, 1500]))
def test_any_text_has_tokens_and_comes_back(
    whole: Tokenizer, smaller: dict[int | None, Tokenizer], text: str, keep: int | None
) -> None:
    small = smaller[keep]
    assert keep is None or small.vocab_size <= keep
    assert small.decode(small.encode(text, special=False)) == whole.decode(whole.encode(text, special=False))


def test_room_that_the_text_does_not_need_goes_to_the_words_that_were_first(whole: Tokenizer) -> None:
    needed = kept_of(whole, TEXT[:5000])
    more = kept_of(whole, TEXT[:5000], len(needed) + 1000)
    assert len(more) == len(needed) + 1000 and set(needed) < set(more)
    added = sorted(set(more) - set(needed))
    left = sorted(set(whole.document["model"]["vocab"].values()) - set(more))
    assert added[-1] < left[100], "those with the lowest ids"


def test_conversations_keep_their_form_and_their_ends(whole: Tokenizer) -> None:
    small = reduced(whole, kept_of(whole, "x"))
    talk = [{"role": "user", "content": "Tell me."}, {"role": "assistant", "content": "No."}]
    rendered = whole.render(talk, generation_prompt=True)
    assert small.render(talk, generation_prompt=True) == rendered
    assert small.decode(small.encode(rendered), skip_special=False) == rendered
    assert len(small.stop_ids) == len(whole.stop_ids)
    texts = [{each.id_of(name) for name in ("<|im_start|>", "<|im_end|>")} for each in (small, whole)]
    assert None not in texts[0] and texts[0] <= small.special_ids
    assert small.decode([small.eos_id or 0], skip_special=False) == whole.decode(
        [whole.eos_id or 0], skip_special=False
    )


def test_logits_of_kept_words_are_what_they_were(short: Checkpoint, tmp_path: Path) -> None:
    """Of a model that has more words than the text: to the bit, as nothing else about it changes."""
    text = OTHER[:2000]
    made = prune_vocabulary(short, text, tmp_path / "slim")
    slim = Checkpoint.open(made.path)
    kept = kept_of(short.tokenizer, text)
    assert slim.config.vocab_size == len(kept) < short.config.vocab_size
    before, after = short.load(), slim.load()
    ids = short.tokenizer.encode(text, special=False)
    new = slim.tokenizer.encode(text, special=False)
    assert [kept[number] for number in new] == ids
    with torch.inference_mode():
        first, second = before(torch.tensor([ids])), after(torch.tensor([new]))
        assert torch.equal(first, second)
        assert torch.allclose(before.logits(first)[..., kept], after.logits(second), atol=1e-5)
    card = json.loads((made.path / "card.json").read_text())["figures"]
    assert card["words"]["value"] == len(kept) and card["tokens_of_the_text"]["value"] == 0
    assert card["parameters"]["value"] == sum(weight.numel() for weight in after.parameters())

    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(made.path)
    assert theirs(text, add_special_tokens=False)["input_ids"] == new
    model = transformers.AutoModelForCausalLM.from_pretrained(made.path)
    with torch.inference_mode():
        assert torch.allclose(model(torch.tensor([new])).logits, after.logits(second), atol=1e-3)


def test_llama_cpp_reads_it_with_the_same_tokens(short: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="the extra danlu[device] is not installed")
    from danlu.device.engine import Engine

    slim = Checkpoint.open(prune_vocabulary(short, TEXT[:5000], tmp_path / "slim", keep=1200).path)
    write_gguf(slim.load(), slim.tokenizer, tmp_path / "slim.gguf")
    again = Tokenizer.load(tmp_path / "slim.gguf")
    text = OTHER[:300] + " 炼丹炉 🜍"
    assert again.encode(text, special=False) == slim.tokenizer.encode(text, special=False)
    with Engine(tmp_path / "slim.gguf", context=512, threads=1) as engine:
        assert engine.tokenize(text) == slim.tokenizer.encode(text)
        assert len(list(engine.generate(slim.tokenizer.encode("The"), max_new_tokens=3))) == 3


def test_merges_that_lead_to_one_word_in_two_ways_are_all_kept() -> None:
    """As vocabularies made from SentencePiece's have them; and ids of added tokens that stand in other places."""
    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcd", "ab", "bc", "abc", "cd", "abcd"]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"], ["c", "d"], ["ab", "cd"]]
    added = [{"id": number, "content": tokens[number], "special": True, "single_word": False, "lstrip": False,
              "rstrip": False, "normalized": False} for number in (0, 1)]  # fmt: skip
    around = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
              {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}},
              {"Sequence": {"id": "B", "type_id": 0}}],
              "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}  # fmt: skip
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": "<unk>", "byte_fallback": True}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    document = {"version": "1.0", "added_tokens": added, "normalizer": replace, "pre_tokenizer": None,
                "post_processor": around, "decoder": decoder, "model": model}  # fmt: skip
    listed = {str(one["id"]): one for one in added}
    whole = Tokenizer(document, {"bos_token": "<s>", "added_tokens_decoder": listed}, frozenset(), Path("here"))
    kept = kept_of(whole, "abc")
    assert {tokens[number] for number in kept} == {*tokens[:258], *"abcd", "ab", "bc", "abc"}, "single letters stay"
    small = reduced(whole, kept)
    assert small.encode("abc") == [kept.index(vocab["abc"])]
    assert small.encode_input("abc") == [kept.index(1), kept.index(vocab["abc"])]
    assert [kept[number] for number in small.encode("abd")] == [vocab["ab"], vocab["d"]]
    assert small.config["added_tokens_decoder"] == listed, "the first ids stay the first"


def test_what_cannot_be_cut_down_is_said(short: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(DanluError, match=r"must stay.*\n.*or more"):
        prune_vocabulary(short, TEXT, tmp_path / "slim", keep=10)
    with pytest.raises(DanluError, match=r"no words would go.*\n.*keep fewer"):
        prune_vocabulary(short, TEXT, tmp_path / "slim", keep=short.tokenizer.vocab_size)
    with pytest.raises(DanluError, match="is empty"):
        prune_vocabulary(short, " \n", tmp_path / "slim")
    letters = learn_vocabulary(VocabularySettings(kind="characters", special=[]), ["abc"])
    with pytest.raises(DanluError, match="kind WordLevel"):
        kept_ids(letters, {0: 1})
    assert not list(tmp_path.iterdir())


def test_the_command_measures_on_another_text_and_refuses_the_same(short: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT[:8000], encoding="utf-8")
    (tmp_path / "other.txt").write_text(OTHER[:4000], encoding="utf-8")
    words = ["compress", "vocabulary", str(short.path), "--calibration", str(tmp_path / "text.txt"), "--keep", "1200"]
    words += ["--out", str(tmp_path / "slim"), "--dtype", "bf16", "--json", "--heldout"]
    said = CliRunner().invoke(app, [*words, str(tmp_path / "other.txt")])
    assert said.exit_code == 0, said.output
    figures = json.loads(said.stdout)["figures"]
    assert figures == json.loads((tmp_path / "slim" / "card.json").read_text())["figures"]
    assert figures["words"]["value"] == 1200 and figures["loss_rise"]["low"] < figures["loss_rise"]["high"]
    slim = Checkpoint.open(tmp_path / "slim")
    assert figures == figures | loss_change(short, slim, OTHER[:4000])
    refused = CliRunner().invoke(app, [*words, str(tmp_path / "text.txt")])
    assert refused.exit_code == 2 and "is in the calibration text" in refused.stderr
