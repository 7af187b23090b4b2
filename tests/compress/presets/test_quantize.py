"""Files of every type from a small model, and what cannot be stored as its name says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("llama_cpp", reason="the extra danlu[device] is not installed")

from danlu.compress.presets.quantize import TYPES, Stored, check_type, export, quantize
from danlu.device.engine import Engine
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint
from danlu.model.config import ModelConfig
from danlu.model.gguf import write_gguf
from danlu.model.transformer import Decoder
from danlu.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """An F32 file whose rows are multiples of 256, as K-types need."""
    tokenizer = Tokenizer.load(smollm2)
    shape = {"width": 256, "layers": 1, "heads": 4, "kv_heads": 2, "head_width": 64, "feedforward_width": 256}
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("even") / "f32.gguf"
    write_gguf(Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, context=64, tied=True, **shape)), tokenizer, out)
    return out


@pytest.mark.parametrize("file_type", ["f16", "bf16", "q8_0", "q6_k", "q4_k_m", "q4_0", "q2_k"])
def test_every_type_loads_and_is_smaller(even: Path, tmp_path: Path, file_type: str) -> None:
    out = tmp_path / "out.gguf"
    stored = quantize(even, file_type, out, threads=1)
    assert out.stat().st_size < 0.6 * even.stat().st_size
    assert stored.forced == {} and stored.words == ""
    assert sum(stored.types.values()) == 8, "seven matrices of the block, and the embedding"
    with Engine(out, context=64, threads=1) as engine:
        assert len(list(engine.generate([5, 6, 7], max_new_tokens=2))) == 2


def test_rows_that_do_not_fill_blocks_are_counted_and_said(tiny_model: Path, tmp_path: Path) -> None:
    stored = export(Checkpoint.open(tiny_model), "Q4_K_M", tmp_path / "out.gguf")
    assert sum(stored.forced.values()) == sum(stored.types.values()) == 15
    assert not any(name.endswith("_K") for name in stored.types)
    assert stored.words.startswith("15 of 15 matrices have rows that are no multiple of 256: stored ")
    assert [file.name for file in tmp_path.iterdir()] == ["out.gguf"]


def test_f32_is_exact(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_model)
    export(checkpoint, "f32", tmp_path / "out.gguf")
    weights, again = checkpoint.load().state_dict(), Checkpoint.open(tmp_path / "out.gguf").load().state_dict()
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_the_words_for_what_is_forced() -> None:
    stored = Stored({"Q5_0": 166, "Q4_K": 16, "Q8_0": 15}, {"Q5_0": 166, "Q8_0": 15}, 256)
    words = "181 of 197 matrices have rows that are no multiple of 256: stored 166 as Q5_0, 15 as Q8_0"
    assert stored.words == words


def test_an_unknown_type_names_the_nearest(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DanluError, match=r"did you mean q4_k_m\?"):
        export(Checkpoint.open(tiny_model), "q4km", tmp_path / "out.gguf")
    assert [check_type(name.upper()) for name in TYPES] == list(TYPES)
    assert list(tmp_path.iterdir()) == []


def test_what_is_quantized_already_is_refused(smollm2: Path, tmp_path: Path) -> None:
    with pytest.raises(DanluError, match=r"cannot write it as q8_0: .*requantizing"):
        quantize(smollm2, "q8_0", tmp_path / "out.gguf", threads=1)
    assert list(tmp_path.iterdir()) == [], "nothing half-written"


def test_a_damaged_source_and_a_missing_directory_are_said(even: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(even.read_bytes()[:-1000])
    with pytest.raises(DanluError, match="cannot write it as q4_0"):
        quantize(cut, "q4_0", tmp_path / "out.gguf", threads=1)
    assert list(tmp_path.iterdir()) == [cut]
    with pytest.raises(DanluError, match="no such directory"):
        export(Checkpoint.open(even), "q4_0", tmp_path / "absent" / "out.gguf")
