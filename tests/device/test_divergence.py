"""A file's divergence from the original as the engine computes both, beside torch's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from danlu.device.divergence import compare, score_divergence
from danlu.device.measure import Document
from danlu.errors import DanluError
from danlu.evaluate import divergence as torchs
from danlu.model.checkpoint import Checkpoint
from danlu.model.config import ModelConfig
from danlu.model.gguf import write_gguf
from danlu.model.transformer import Decoder

pytest.importorskip("llama_cpp", reason="the extra danlu[device] is not installed")


def test_rows_of_logits_are_scored_as_torch_does() -> None:
    generator = np.random.default_rng(0)
    reference, other = generator.normal(0, 5, (2, 21, 50_000)).astype(np.float32)
    other = (reference + 0.05 * other).astype(np.float32)
    targets = generator.integers(0, 50_000, 21, dtype=np.int32)
    before, after = (torch.from_numpy(each).double() for each in (reference, other))
    apart, same, *losses = compare(reference, other, targets)
    assert np.isclose(apart, float(torchs.divergence(before, after).sum()), rtol=1e-4)
    assert same == int((before.argmax(-1) == after.argmax(-1)).sum())
    for loss, logits in zip(losses, (before, after), strict=True):
        expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets).long(), reduction="sum")
        assert np.isclose(loss, float(expected), rtol=1e-6)
    assert compare(reference, reference, targets)[:2].tolist() == [0, 21]


def test_documents_are_scored_as_torch_does(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_model)
    model = checkpoint.load()
    write_gguf(model, checkpoint.tokenizer, tmp_path / "f32.gguf")
    with torch.no_grad():
        changed = checkpoint.load()
        for block in changed.blocks:
            for weight in block.parameters():
                weight.mul_(1 + 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        changed.embedding.tokens.weight.mul_(1.5)
    write_gguf(changed, checkpoint.tokenizer, tmp_path / "changed.gguf")
    ids = checkpoint.tokenizer.encode("def add(a, b):\n    return a + b\n" * 20, special=False)
    documents = [Document(part, [*part[1:], -100]) for part in (ids[:90], ids[90:120])]
    documents[0].targets[:10] = [-100] * 10
    found = score_divergence(tmp_path / "f32.gguf", tmp_path / "changed.gguf", documents, context=128, threads=1)
    assert found.counts.tolist() == [79, 29]
    for number, document in enumerate(documents):
        tokens, scored = torch.tensor([document.tokens]), torch.tensor(document.targets) != -100
        with torch.no_grad():
            before, after = (each.logits(each(tokens))[0, scored] for each in (model, changed))
        targets = torch.tensor(document.targets)[scored]
        assert np.isclose(found.divergence[number], float(torchs.divergence(before, after).sum()), rtol=0.01)
        loss = torch.nn.functional.cross_entropy(after, targets, reduction="sum")
        assert np.isclose(found.loss[number], float(loss), rtol=0.005)
        assert abs(found.same[number] - int((before.argmax(-1) == after.argmax(-1)).sum())) <= 2
    itself = score_divergence(tmp_path / "f32.gguf", tmp_path / "f32.gguf", documents, context=128, threads=1)
    assert not itself.divergence.any() and np.array_equal(itself.same, itself.counts)
    assert np.array_equal(itself.loss, found.original_loss)


def test_other_words_and_broken_files_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_model)
    write_gguf(checkpoint.load(), checkpoint.tokenizer, tmp_path / "f32.gguf")
    shape = {"width": 32, "layers": 1, "heads": 1, "kv_heads": 1, "head_width": 32, "feedforward_width": 32}
    other = Decoder(ModelConfig(vocab_size=checkpoint.config.vocab_size + 8, context=512, tied=True, **shape))
    write_gguf(other, checkpoint.tokenizer, tmp_path / "other.gguf")
    documents = [Document([1, 2, 3], [2, 3, -100])]
    with pytest.raises(DanluError, match="words"):
        score_divergence(tmp_path / "f32.gguf", tmp_path / "other.gguf", documents, context=128)
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "f32.gguf").read_bytes()[:100_000])
    with pytest.raises(DanluError, match="cannot load"):
        score_divergence(tmp_path / "f32.gguf", tmp_path / "cut.gguf", documents, context=128)
