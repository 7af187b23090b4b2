"""Parts of a GGUF file: the same stored blocks, under the names and keys of a smaller model."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from danlu.device.cut import Cut, write_cut
from danlu.errors import DanluError
from danlu.gguf_header import read_header

Kind = gguf.GGMLQuantizationType
LAYERS, ROWS, COLUMNS = 3, 8, 128
WORDS = ["the", "丹", "furnace"]


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(sum(name.encode())).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module", params=[Kind.Q8_0, Kind.Q4_0, Kind.F32])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of a matrix and a vector, and an embedding."""
    kind, out = request.param, tmp_path_factory.mktemp("cut") / "whole.gguf"
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_uint32("llama.block_count", LAYERS)
    writer.add_uint32("llama.embedding_length", COLUMNS)
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_array("tokenizer.ggml.tokens", WORDS)
    writer.add_array("tokenizer.ggml.token_type", [1, 1, 6])
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    for name in ["token_embd", *(f"blk.{layer}.ffn_up" for layer in range(LAYERS))]:
        packed = gguf.quantize(values(name, (ROWS, COLUMNS)), kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    for layer in range(LAYERS):
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", values(f"norm {layer}", (COLUMNS,)))
    writer.add_tensor("rope_freqs.weight", values("rope", (4,)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def read(path: Path) -> dict[str, np.ndarray]:
    """Every tensor, dequantised by the gguf package's own reader."""
    found = gguf.GGUFReader(path).tensors
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in found}


def cut(layers: tuple[int, ...], rows: int, columns: int) -> Cut:
    """Of the file above."""
    shapes = {"token_embd.weight": (ROWS, columns), "blk.{i}.ffn_up.weight": (rows, columns)}
    metadata = {"llama.block_count": len(layers), "llama.embedding_length": columns}
    return Cut(layers=layers, shapes=shapes | {"blk.{i}.ffn_norm.weight": (columns,)}, metadata=metadata)


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layers=st.sets(st.integers(0, LAYERS - 1), min_size=1),
    rows=st.integers(1, ROWS),
    blocks=st.integers(1, COLUMNS // 32),
)
def test_numbers_are_the_wholes_to_the_bit(
    whole: Path, tmp_path: Path, layers: set[int], rows: int, blocks: int
) -> None:
    kept, columns, out = tuple(sorted(layers)), 32 * blocks, tmp_path / "cut.gguf"
    write_cut(whole, cut(kept, rows, columns), out)
    before, after = read(whole), read(out)
    assert len(after) == 2 + 2 * len(kept)
    np.testing.assert_array_equal(after["token_embd.weight"], before["token_embd.weight"][:, :columns])
    np.testing.assert_array_equal(after["rope_freqs.weight"], before["rope_freqs.weight"])
    for new, old in enumerate(kept):
        matrix = before[f"blk.{old}.ffn_up.weight"][:rows, :columns]
        np.testing.assert_array_equal(after[f"blk.{new}.ffn_up.weight"], matrix)
        norm = before[f"blk.{old}.ffn_norm.weight"][:columns]
        np.testing.assert_array_equal(after[f"blk.{new}.ffn_norm.weight"], norm)
    changed = {"llama.block_count": len(kept), "llama.embedding_length": columns}
    assert read_header(out).metadata == read_header(whole).metadata | changed
    assert list(tmp_path.iterdir()) == [out]


def test_a_key_that_a_part_has_not_is_gone(whole: Path, tmp_path: Path) -> None:
    asked = cut((0,), ROWS, COLUMNS).model_copy(update={"absent": ("llama.rope.freq_base",)})
    write_cut(whole, asked, tmp_path / "cut.gguf")
    assert set(read_header(whole).metadata) - set(read_header(tmp_path / "cut.gguf").metadata) == set(asked.absent)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (cut((0, 3), 4, 64), "has no layer 3, of which a part is asked"),
        (cut((0,), ROWS + 1, 64), r"blk.0.ffn_up.weight of shape \[8, 128\] has no first part of shape \[9, 64\]"),
        (cut((0,), 4, COLUMNS + 32), "has no first part"),
        (Cut(layers=(0,), shapes={"blk.{i}.ffn_down.weight": (4, 32)}, metadata={}), "has no blk.{i}.ffn_down.weight"),
    ],
)
def test_parts_that_are_not_there(whole: Path, asked: Cut, told: str, tmp_path: Path) -> None:
    with pytest.raises(DanluError, match=told):
        write_cut(whole, asked, tmp_path / "cut.gguf")
    assert not list(tmp_path.iterdir())


def test_no_cut_goes_through_a_block(whole: Path, tmp_path: Path) -> None:
    asked = cut((0,), 4, 48)
    if read_header(whole).tensors[0].type == Kind.F32:
        write_cut(whole, asked, tmp_path / "cut.gguf")
        return
    with pytest.raises(DanluError, match=r"cannot be cut after 48 columns: Q\d_0 has blocks of 32"):
        write_cut(whole, asked, tmp_path / "cut.gguf")
