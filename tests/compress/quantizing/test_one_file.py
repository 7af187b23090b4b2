"""`danlu compress quantize`: a file with its card, measured on text that was held out; bad input is refused."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data import topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.small_models import Small, train_small
from danlu.compress.apart import check_apart, shared
from danlu.compress.quantizing import quantizer
from danlu.compress.quantizing.one_file import quantize_file
from danlu.compress.quantizing.quantizer import read_text
from danlu.errors import DanluError

WHOLE = "\n\n".join(topics.topics[topic] for topic in sorted(topics.topics))
CHINESE = "".join(chr(0x4E00 + number * 7919 % 20000) for number in range(4000))


def test_a_card_says_what_it_was_made_from_and_what_was_measured(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="the extra danlu[device] is not installed")
    text, heldout, out = (tmp_path / name for name in ("text.txt", "heldout.txt", "out.gguf"))
    text.write_text(WHOLE[:60_000], encoding="utf-8")
    heldout.write_text(WHOLE[80_000:86_000], encoding="utf-8")
    card = quantize_file(tiny_model, "q8_0", None, text, heldout, out, 4096, 0)
    assert card == json.loads((tmp_path / "out.gguf.card.json").read_text())
    assert card["figures"]["file_size"]["value"] == out.stat().st_size == card["files"]["out.gguf"]["bytes"]
    apart = card["figures"]["divergence"]
    assert 0 < apart["low"] <= apart["value"] <= apart["high"] < 0.01 and apart["unit"] == "nat/token"
    assert card["figures"]["same_top"]["value"] > 0.9
    assert set(card["inputs"]) == {"model", "calibration", "heldout"} and card["stand_ins"] == {"q8_0": 1}
    like = quantize_file(tiny_model, None, out, text, None, tmp_path / "like.gguf", 4096, 0)
    assert like["forms"] == card["forms"] and not like["stand_ins"] and set(like["figures"]) == {"file_size"}

    before = set(tmp_path.iterdir())
    with pytest.raises(DanluError, match="100% of the held-out text is in the calibration text"):
        quantize_file(tiny_model, "q8_0", None, text, text, tmp_path / "never.gguf", 4096, 0)
    with pytest.raises(DanluError, match="and not both"):
        quantize_file(tiny_model, "q8_0", out, text, None, tmp_path / "never.gguf", 4096, 0)
    heldout.write_text("too short", encoding="utf-8")
    with pytest.raises(DanluError, match="more than 512 are needed"):
        quantize_file(tiny_model, "q8_0", None, text, heldout, tmp_path / "never.gguf", 4096, 0)
    assert set(tmp_path.iterdir()) == before


def test_words_that_no_file_can_hold_are_refused_before_anything_is_rounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("nothing must be rounded")

    monkeypatch.setattr(quantizer, "round_blocks", never)
    (tmp_path / "text.txt").write_text(WHOLE[:60_000], encoding="utf-8")
    small = Small(layers=1, width=32, heads=2, kv_heads=1, channels=32, context=64)
    base = train_small(small, tmp_path / "text.txt", 1, tmp_path / "base", vocabulary="bytes")
    with pytest.raises(DanluError, match="reads no vocabulary without merges"):
        quantize_file(base, "q4_0", None, tmp_path / "text.txt", None, tmp_path / "out.gguf", 4096, 0)
    assert not (tmp_path / "out.gguf").exists()


def test_a_damaged_file_is_told_as_such(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(WHOLE[:60_000], encoding="utf-8")
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF" + bytes(range(200)))
    for where in ({"ref": tmp_path / "damaged.gguf", "type": "q4_0", "like": None},
                  {"ref": tiny_model, "type": None, "like": tmp_path / "damaged.gguf"}):  # fmt: skip
        with pytest.raises(DanluError) as problem:
            quantize_file(**where, calibration=text, heldout=None, out=tmp_path / "out.gguf", tokens=4096, steps=0)
        assert "damaged.gguf" in str(problem.value)
    text.write_bytes(b"\xff\xfe\x00 no text")
    with pytest.raises(DanluError, match="no text in UTF-8"):
        read_text(text)


@pytest.mark.parametrize("text", [WHOLE[:20_000], CHINESE])
def test_a_text_that_is_largely_in_another_one_is_refused(text: str) -> None:
    half, rest = text[: len(text) // 2], text[len(text) // 2 :]
    check_apart(half, rest)
    for inside in (text, half, half[100:], "\n".join(half.split(". "))):
        with pytest.raises(DanluError, match="in the calibration text"):
            check_apart(text, inside)
    with pytest.raises(DanluError, match="in the calibration text"):
        check_apart(half, half[-len(half) // 2 :] + rest[: len(half) // 2])


@settings(max_examples=30, deadline=None)
@given(st.text(min_size=1), st.text(max_size=200))
def test_what_is_shared_is_a_share(text: str, other: str) -> None:
    assert 0 <= shared(text, other) <= 1
    assert shared(text, other + text + other) == (1 if text.strip() else 0)
