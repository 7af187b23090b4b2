"""What tests of compression share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from danlu.model.checkpoint import Checkpoint
from danlu.model.config import ModelConfig
from danlu.model.gguf import write_gguf
from danlu.model.transformer import Decoder
from tests.compress.short import make_short


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Checkpoint:
    """A small model of a trained one's weights."""
    return make_short(smollm2, tmp_path_factory.mktemp("short"))


@pytest.fixture(scope="session")
def small(short: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Two layers, 96 wide, whose features go together as those of a trained model do."""
    torch.manual_seed(0)
    shape = {"width": 96, "layers": 2, "heads": 3, "kv_heads": 1, "head_width": 32, "feedforward_width": 256}
    made = Decoder(ModelConfig(vocab_size=short.config.vocab_size, context=256, tied=True, **shape))
    with torch.no_grad():
        mixing = torch.randn(96, 96) * torch.logspace(0, -2, 96)
        made.embedding.tokens.weight.copy_(torch.randn(short.config.vocab_size, 96) @ mixing * 0.1)
        for weight in made.blocks.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.15)
    out = tmp_path_factory.mktemp("small") / "f32.gguf"
    write_gguf(made, short.tokenizer, out)
    return Checkpoint.open(out)
