from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from danlu.errors import DanluError
from danlu.gguf_header import read_header


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A small GGUF with every type of value and two tensors."""
    out = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_uint8("a.u8", 200)
    writer.add_int16("a.i16", -5)
    writer.add_uint64("a.u64", 2**40)
    writer.add_float64("a.f64", 0.25)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "丹炉 🔥")
    writer.add_array("a.texts", ["x", "", "三"])
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("two", np.arange(4, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_reads_what_the_reference_reader_reads(file: Path, smollm2: Path) -> None:
    header, reference = read_header(file), gguf.GGUFReader(file)
    for name, field in reference.fields.items():
        if not name.startswith("GGUF."):
            assert header.metadata[name] == field.contents(), name
    assert header.metadata["a.text"] == "丹炉 🔥"
    for tensor, theirs in zip(header.tensors, reference.tensors, strict=True):
        assert (tensor.name, tensor.type, tensor.offset) == (theirs.name, theirs.tensor_type, theirs.data_offset)
        assert tensor.shape == tuple(theirs.shape.tolist()[::-1])
    real = read_header(smollm2)
    assert len(real.tensors) == 272
    assert len(real.need_all("tokenizer.ggml.tokens", str)) == 49152


def test_a_file_cut_anywhere_in_its_header_says_so(file: Path, tmp_path: Path) -> None:
    whole, cut = file.read_bytes(), tmp_path / "cut.gguf"
    end = read_header(file).tensors[0].offset - 32  # the last bytes before the data are padding
    for length in range(4, end):
        cut.write_bytes(whole[:length])
        with pytest.raises(DanluError, match="is cut short"):
            read_header(cut)


def test_what_is_no_gguf_is_refused(file: Path, tmp_path: Path) -> None:
    whole, other = file.read_bytes(), tmp_path / "other.gguf"
    for content, complaint in {
        b"": "is no GGUF file",
        b"PK\x03\x04 zip": "is no GGUF file",
        b"GGUF" + (1).to_bytes(4, "little") + whole[8:]: "is GGUF version 1;",
        b"GGUF" + (3).to_bytes(4, "big") + whole[8:]: "little-endian",
        whole.replace(b"a.i16", b"a.\xff\xfe6"): "not UTF-8",
        whole.replace(b"a.i16", b"a.u64"): "twice",
        whole.replace(b"\x03\0\0\0\0\0\0\0two", b"\x03\0\0\0\0\0\0\0one"): "two tensors have one name",
    }.items():
        other.write_bytes(content)
        with pytest.raises(DanluError, match=complaint):
            read_header(other)
    with pytest.raises(DanluError, match="No such file"):
        read_header(tmp_path / "absent.gguf")
    with pytest.raises(DanluError, match="directory"):
        read_header(tmp_path)


def test_a_value_of_another_type_is_named(file: Path) -> None:
    header = read_header(file)
    assert header.need("a.u8", float) == 200.0
    assert header.find("absent", int) is None
    with pytest.raises(DanluError, match="lack absent"):
        header.need("absent", int)
    with pytest.raises(DanluError, match=r"a\.text is 丹炉 🔥; it must be a whole number"):
        header.need("a.text", int)
    with pytest.raises(DanluError, match=r"a\.numbers holds 1; it must hold text"):
        header.need_all("a.numbers", str)
