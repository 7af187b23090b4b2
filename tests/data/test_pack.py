"""Packing: no token lost, no document cut or mixed with another, the same rows for the same seed."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.data.pack import Packer, PackFigures
from danlu.data.stream import Rows
from danlu.data.template import Document

WINDOW = 16
PADDING = 999


def document(number: int, length: int) -> Document:
    """A document no other equals."""
    return Document(np.full(length, number, dtype=np.int32), np.arange(length) % 2 == 1)


def pack(lengths: list[int], directory: Path, seed: int = 0) -> PackFigures:
    packer = Packer(directory, WINDOW, PADDING, seed)
    for number, length in enumerate(lengths):
        packer.add(document(number, length))
    return packer.close()


@given(st.lists(st.integers(1, WINDOW), max_size=400), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_every_document_stands_whole_in_one_row(lengths: list[int], seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        figures = pack(lengths, Path(folder), seed)
        rows = Rows.open(Path(folder))
        found: dict[int, int] = {}
        for tokens, segments, trained in zip(rows.tokens, rows.segments, rows.trained, strict=True):
            assert (np.diff(segments[segments > 0]) >= 0).all()
            assert (tokens[segments == 0] == PADDING).all() and not trained[segments == 0].any()
            assert not segments[np.argmin(segments > 0) :].any() or (segments > 0).all()  # padding is last
            for segment in range(1, segments.max() + 1):
                here = segments == segment
                number = int(tokens[here][0])
                assert (tokens[here] == number).all() and number not in found
                assert (trained[here] == document(number, int(here.sum())).trained).all()
                found[number] = int(here.sum())
        assert found == dict(enumerate(lengths))
        assert figures == PackFigures(len(rows), len(lengths), sum(lengths), int(rows.trained.sum()))


def test_rows_are_well_filled(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    packer = Packer(tmp_path, 512, 0, seed=0)
    for number in range(5000):
        packer.add(document(number, int(chance.integers(5, 200))))
    assert packer.close().efficiency(512) > 0.995


def test_the_seed_decides_the_rows(tmp_path: Path) -> None:
    lengths = [1 + number % 7 for number in range(300)]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pack(lengths, tmp_path / name, seed)
    same = [(tmp_path / name / "tokens.npy").read_bytes() for name in "abc"]
    assert same[0] == same[1] != same[2]


def test_a_document_too_long_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="17 tokens does not fit a window of 16"):
        Packer(tmp_path, WINDOW, 0, 0).add(document(1, WINDOW + 1))


def test_no_rows_are_still_arrays(tmp_path: Path) -> None:
    pack([], tmp_path)
    assert len(Rows.open(tmp_path)) == 0
    assert Rows.open(tmp_path).window == WINDOW
