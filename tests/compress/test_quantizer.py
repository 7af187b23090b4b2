"""A whole model rounded to one format: nearer to the original than without the text, and llama.cpp runs it."""

from __future__ import annotations

from pathlib import Path
from pydoc_data import topics

import pytest
import torch

from danlu.compress import quantizer
from danlu.compress.quantizer import calibration_rows, quantize_model
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint
from danlu.model.config import ModelConfig
from danlu.model.gguf import write_gguf
from danlu.model.transformer import Decoder
from danlu.tokenizer import Tokenizer

WHOLE = "\n\n".join(topics.topics[topic] for topic in sorted(topics.topics))  # of Python's language reference
TEXT, OTHER = WHOLE[:120_000], WHOLE[200_000:210_000]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """Two layers, 96 wide, whose features go together as those of a trained model do."""
    tokenizer = Tokenizer.load(smollm2)
    torch.manual_seed(0)
    shape = {"width": 96, "layers": 2, "heads": 3, "kv_heads": 1, "head_width": 32, "feedforward_width": 256}
    made = Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, context=64, tied=True, **shape))
    with torch.no_grad():
        mixing = torch.randn(96, 96) * torch.logspace(0, -2, 96)
        made.embedding.tokens.weight.copy_(torch.randn(tokenizer.vocab_size, 96) @ mixing * 0.1)
        for block in made.blocks:
            for weight in block.parameters():
                if weight.dim() > 1:
                    weight.normal_(0, 0.15)
    out = tmp_path_factory.mktemp("model") / "f32.gguf"
    write_gguf(made, tokenizer, out)
    return out


def divergence(reference: Checkpoint, other: Checkpoint) -> float:
    ids = reference.tokenizer.encode(OTHER, special=False)
    tokens = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    with torch.inference_mode():
        before, after = (model.logits(model(tokens)).log_softmax(-1) for model in (reference.load(), other.load()))
        return float((before.exp() * (before - after)).sum(-1).mean())


def test_a_file_is_nearer_with_a_text_than_without_and_llama_cpp_runs_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(model)
    made = quantize_model(checkpoint, "q4_0", TEXT, tmp_path / "with.gguf", tokens=8192)
    assert made.forms == {"q4_0": 14, "q8_0": 1} and made.stand_ins == {"q8_0": 1}
    assert made.bytes == made.path.stat().st_size
    monkeypatch.setattr(quantizer, "_inputs", lambda products: {})
    quantize_model(checkpoint, "q4_0", TEXT, tmp_path / "without.gguf", tokens=8192)
    with_text, without = (Checkpoint.open(tmp_path / name) for name in ("with.gguf", "without.gguf"))
    assert divergence(checkpoint, with_text) < 0.8 * divergence(checkpoint, without)
    assert {file.name for file in tmp_path.iterdir()} == {"with.gguf", "without.gguf"}, "nothing else is left"

    pytest.importorskip("llama_cpp", reason="the extra danlu[device] is not installed")
    from danlu.device.engine import Engine

    with Engine(tmp_path / "with.gguf", context=64, threads=1) as engine:
        assert len(list(engine.generate([5, 6, 7], max_new_tokens=3))) == 3


@pytest.mark.soak
def test_rows_that_do_not_fill_blocks_take_what_stands_in(model: Path, tmp_path: Path) -> None:
    made = quantize_model(Checkpoint.open(model), "Q3_K", TEXT, tmp_path / "out.gguf", tokens=4096)
    assert made.forms == {"iq4_nl": 12, "q3_k": 2, "q8_0": 1}, "rows of 96 take 4 bits, the two of 256 three"


def test_a_text_is_drawn_evenly_and_must_be_long_enough(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    rows = calibration_rows(checkpoint, TEXT, 4096)
    assert rows.shape == (64, 64)
    every = calibration_rows(checkpoint, TEXT, 10**9)
    assert torch.equal(rows[0], every[0]) and torch.equal(rows[-1], every[-1]) and len(every) > len(rows)
    with pytest.raises(DanluError, match="4,096 are needed"):
        calibration_rows(checkpoint, TEXT[:500], 4096)
