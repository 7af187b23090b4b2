"""Rows of two sides: what is written follows what is read, shifted by one, and each side keeps its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from danlu.data.datasets import read_pairs, read_parallel
from danlu.data.encoding import Limit
from danlu.data.memory import MemoryStream
from danlu.data.pairs import ImageTexts, pair_rows, text_pair_rows
from danlu.data.stream import IGNORED
from danlu.errors import DanluError
from danlu.tokenizer import Tokenizer
from tests.data.wordpiece import IDS, wordpiece

Write = Callable[[str, Any], Path]
CLS, SEP = IDS["[CLS]"], IDS["[SEP]"]
PAIRS = [("the cat", "北京"), ("the dog sat on the mat .", "大"), ("is", "京大学")]
ALL = np.arange(3)


def test_what_is_written_follows_a_start_and_ends() -> None:
    batch = pair_rows(wordpiece(), PAIRS, 4, Limit(16), Limit(16)).take(ALL)
    assert batch.targets[0].tolist() == [CLS, IDS["北"], IDS["京"], SEP, *[IGNORED] * 4]
    assert batch.written[0].tolist() == [4, CLS, IDS["北"], IDS["京"], 0, 0, 0, 0]
    assert batch.written_segments[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert batch.tokens.shape == (3, 16) and batch.segments.sum(1).tolist() == [4, 9, 3]
    assert batch.count == 4 + 3 + 5 and batch.size == 16 + batch.count
    parts = batch.split(2)
    assert sum(part.count for part in parts) == batch.count and len(parts[0].written) == 2


def test_an_end_is_put_where_the_tokenizer_puts_none(smollm: Tokenizer) -> None:
    rows = pair_rows(smollm, PAIRS, 0, Limit(32), Limit(3, truncate=True))
    assert all(rows.target[row][-1] == smollm.eos_id for row in range(3))
    assert max(rows.target.lengths(ALL)) == 3
    assert smollm.decode(rows.source[0].tolist()) == "the cat"


def test_a_side_that_is_too_long_is_refused() -> None:
    with pytest.raises(DanluError, match="question 2 has 9 tokens; at most 8"):
        pair_rows(wordpiece(), PAIRS, 0, Limit(8, name="question"), Limit(8))
    with pytest.raises(DanluError, match="answer 3 has 5 tokens; at most 4"):
        pair_rows(wordpiece(), PAIRS, 0, Limit(16), Limit(4, name="answer"))


def test_texts_that_belong_together_lie_side_by_side() -> None:
    batch = text_pair_rows(wordpiece(), PAIRS, Limit(16)).take(ALL)
    assert batch.tokens.shape == (3, 2, 16) and batch.segments.sum(-1).tolist() == [[4, 4], [9, 3], [3, 5]]
    assert batch.tokens[2, 1, :5].tolist() == [CLS, IDS["京"], IDS["大"], IDS["学"], SEP]
    assert (batch.count, batch.size, len(batch.split(3))) == (3, 28, 3)
    images = ImageTexts(batch.tokens[:, 0], batch.segments[:, 0], torch.zeros(3, 1, 2, 2))
    assert images.count == images.size == 3 and images.split(2)[1].pixels.shape == (1, 1, 2, 2)


def test_the_same_rows_on_any_number_of_ranks() -> None:
    rows = pair_rows(wordpiece(), PAIRS * 4, 0, Limit(16), Limit(16))
    whole = MemoryStream(rows, 4, 1).batch(5)
    parts = [MemoryStream(rows, 4, 1, rank, 2).batch(5) for rank in range(2)]
    written = [part.written[part.written_segments > 0].tolist() for part in (whole, *parts)]
    assert written[0] == written[1] + written[2]


def test_pairs_from_files(write: Write) -> None:
    one, two = write("a.de", "Ein Hund\nEine Katze\n"), write("b.en.gz", "A dog\nA cat\n")
    assert read_parallel(one, two) == [("Ein Hund", "A dog"), ("Eine Katze", "A cat")]
    assert read_pairs(write("c.tsv", "Hi.\t嗨。\n")) == [("Hi.", "嗨。")]
    with pytest.raises(DanluError, match=r"a\.de: has 2 lines, but .*d\.en has 1"):
        read_parallel(one, write("d.en", "A dog\n"))
    with pytest.raises(DanluError, match=r"e\.en:1: is an empty line"):
        read_parallel(one, write("e.en", "\nA cat\n"))
    with pytest.raises(DanluError, match=r"f\.tsv:2: is no text, a tab"):
        read_pairs(write("f.tsv", "Hi.\t嗨。\nHi.\n"))


def test_real_translations(real_data: Callable[[str], Path]) -> None:
    pairs = read_parallel(real_data("multi30k_val.de.gz"), real_data("multi30k_val.en.gz"))
    assert len(pairs) == 1014 and pairs[0][1] == "A group of men are loading cotton onto a truck"
    assert len(read_pairs(real_data("tatoeba_en_zh_20133.tsv.gz"))) == 20133
