"""Rows with labels: from the files that data sets are published in to batches, nothing lost without a word."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.data.datasets import (
    LabelledText,
    Question,
    TaggedWords,
    names_of,
    read_labelled,
    read_questions,
    read_tagged,
    read_text,
)
from danlu.data.encoding import Limit, encode_all, fitted
from danlu.data.labelled import LabelBatch, LabelledRows, question_rows, tagged_rows, text_rows, value_rows
from danlu.data.memory import MemoryStream, Ragged
from danlu.data.row_files import labelled_texts
from danlu.data.rows_settings import RowsSettings
from danlu.data.stream import IGNORED
from danlu.errors import DanluError
from danlu.tokenizer import Tokenizer
from tests.data.wordpiece import IDS, wordpiece

Write = Callable[[str, Any], Path]
CLS, SEP = IDS["[CLS]"], IDS["[SEP]"]
ALL = np.arange(1000)


def ids(*words: str) -> list[int]:
    return [IDS[word] for word in words]


# --- Memory ---------------------------------------------------------------------------------------------------------


@given(rows=st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=20), min_size=1, max_size=12), data=st.data())
@settings(max_examples=60, deadline=None)
def test_rows_of_any_length_come_back_padded(rows: list[list[int]], data: st.DataObject) -> None:
    kept = Ragged.of(rows)
    chosen = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1)))
    table, segments = kept.padded(chosen, -7), kept.segments(chosen)
    assert len(kept) == len(rows) and table.shape == segments.shape and table.shape[1] % 8 == 0
    assert table.shape[1] < max(len(rows[row]) for row in chosen) + 8 or table.shape[1] == 8
    for row, line, segment in zip(chosen, table, segments, strict=True):
        assert line[segment > 0].tolist() == rows[row] and (line[segment == 0] == -7).all()
        assert (np.diff(segment) <= 0).all()


def labelled(count: int) -> LabelledRows:
    return LabelledRows(Ragged.of([[number] * (1 + number % 5) for number in range(count)]), np.arange(count))


def test_each_row_once_an_epoch_on_any_number_of_ranks() -> None:
    rows = labelled(12)
    alone = MemoryStream(rows, 4, 3)
    drawn = torch.cat([alone.batch(step).labels for step in range(6)]).tolist()
    assert sorted(drawn[:12]) == sorted(drawn[12:]) == list(range(12)) and drawn[:12] != drawn[12:]
    for step in (0, 7):
        parts = [MemoryStream(rows, 4, 3, rank, 2).batch(step) for rank in range(2)]
        whole = alone.batch(step)
        assert torch.cat([part.labels for part in parts]).tolist() == whole.labels.tolist()
        assert torch.equal(whole.inputs[:, 0], whole.labels) and sum(part.size for part in parts) == whole.size
    with pytest.raises(DanluError, match="no rows"):
        MemoryStream(labelled(0), 4, 3)


def test_a_batch_is_cut_with_all_that_belongs_to_a_row() -> None:
    batch = LabelBatch(torch.arange(6).view(3, 2), torch.tensor([1, IGNORED, 0]), weights=torch.ones(3))
    parts = batch.split(2)
    assert [part.count for part in parts] == [1, 1] and batch.count == 2 and batch.size == 3
    assert [part.inputs.tolist() for part in parts] == [[[0, 1], [2, 3]], [[4, 5]]]
    assert parts[1].weights is not None and len(parts[1].weights) == 1 and parts[1].segments is None
    assert torch.equal(batch.to("cpu").labels, batch.labels)
    with pytest.raises(DanluError, match="3 rows cannot be cut into 4 parts"):
        batch.split(4)


# --- Labels ---------------------------------------------------------------------------------------------------------


def test_texts_and_their_labels(write: Write) -> None:
    file = write("rows.gz", "good the cat sat\nbad the dog\x85 sat\r\n")
    examples = read_labelled(file)
    assert examples[1] == LabelledText("the dog\x85 sat", "bad") and names_of(examples) == ("bad", "good")
    batch = text_rows(wordpiece(), examples, names_of(examples), Limit(16)).take(ALL[:2])
    assert batch.labels.tolist() == [1, 0] and batch.types is None
    assert batch.inputs[0].tolist() == [CLS, *ids("the", "cat", "sat"), SEP, 0, 0, 0]
    assert batch.segments is not None and batch.segments[0].tolist() == [1] * 5 + [0] * 3


def test_two_texts_are_told_apart() -> None:
    examples = [LabelledText("the cat", "0.5", "the dog sat"), LabelledText("the", "-2", "cat")]
    batch = value_rows(wordpiece(), examples, Limit(16)).take(ALL[:2])
    assert batch.inputs[0].tolist() == [CLS, *ids("the", "cat"), SEP, *ids("the", "dog", "sat"), SEP]
    assert batch.types is not None and batch.types[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert batch.labels.tolist() == [0.5, -2.0] and batch.count == 2
    with pytest.raises(DanluError, match="some have none"):
        value_rows(wordpiece(), [*examples, LabelledText("the", "1")], Limit(16))


def test_labels_that_are_not_known_are_refused() -> None:
    with pytest.raises(DanluError, match=r"label 'goood' is not known\n  did you mean good"):
        text_rows(wordpiece(), [LabelledText("the", "goood")], ("bad", "good"), Limit(16))
    for value in ("nan", "warm"):
        with pytest.raises(DanluError, match=f"label '{value}' is no finite number"):
            value_rows(wordpiece(), [LabelledText("the", value)], Limit(16))


def test_a_label_that_is_none_is_named_by_its_line(write: Write) -> None:
    rows = write("rows.txt", "0.5 the cat\n1e60 the dog\nnan the mat\n")
    with pytest.raises(DanluError, match=r"rows\.txt:2: the label '1e60' is no finite number\n  mend the row"):
        value_rows(wordpiece(), read_labelled(rows), Limit(16))
    with pytest.raises(DanluError, match=r"rows\.txt:3: the label 'nan' is not known"):
        text_rows(wordpiece(), read_labelled(rows), ("0.5", "1e60"), Limit(16))
    tags = write("tags.conll", "The\tO\n\n\n大\tB\n学\tX\n")
    with pytest.raises(DanluError, match=r"tags\.conll:4: the label 'X' is not known"):
        tagged_rows(wordpiece(), read_tagged(tags), ("B", "O"), Limit(16))
    table = RowsSettings(train=str(write("t.csv", "a,b\nthe,1\ncat,inf\n")), format="table",
                         columns={"text": "a", "label": "b"})  # fmt: skip
    with pytest.raises(DanluError, match=r"t\.csv:3: the label 'inf'"):
        value_rows(wordpiece(), labelled_texts(table, "train"), Limit(16))


def test_long_texts_are_refused_or_cut_with_a_word(capsys: pytest.CaptureFixture) -> None:
    rows = encode_all(wordpiece(), ["the cat", "the cat sat on the mat"])
    with pytest.raises(DanluError, match=r"text 2 has 8 tokens; at most 5 are allowed \(1 of 2 are longer\)"):
        fitted(rows, Limit(5))
    cut = fitted(rows, Limit(5, truncate=True))
    assert cut[0] == rows[0] and cut[1].ids == [CLS, *ids("the", "cat", "sat"), SEP]
    assert len(cut[1].types) == len(cut[1].places) == len(cut[1].sequences) == 5
    assert "1 of 2 texts were cut to 5 tokens" in capsys.readouterr().err


# --- Tags -----------------------------------------------------------------------------------------------------------


def test_the_first_token_of_a_word_learns_its_tag(write: Write, capsys: pytest.CaptureFixture) -> None:
    file = write("tags.conll", "The\tO\nunhappys\tB\n\u200b\tI\ncat\tI\n\n\n大\tB\n学\tI\n")
    examples = read_tagged(file)
    assert [one.words for one in examples] == [("The", "unhappys", "\u200b", "cat"), ("大", "学")]
    names = names_of(examples)
    assert names == ("B", "I", "O")
    batch = tagged_rows(wordpiece(), examples, names, Limit(16)).take(ALL[:2])
    assert batch.inputs[0, :7].tolist() == [CLS, *ids("the", "un", "##happy", "##s", "cat"), SEP]
    assert batch.labels[0].tolist() == [IGNORED, 2, 0, IGNORED, IGNORED, 1, IGNORED, IGNORED]
    assert batch.labels[1].tolist() == [IGNORED, 0, 1] + [IGNORED] * 5 and batch.count == 5
    assert "1 of 6 words have no token of their own" in capsys.readouterr().err


def test_cut_sentences_keep_the_tags_of_what_stays(capsys: pytest.CaptureFixture) -> None:
    example = TaggedWords(tuple("北京大学"), ("B", "I", "I", "I"))
    batch = tagged_rows(wordpiece(), [example], ("B", "I"), Limit(4, truncate=True), joiner="").take(ALL[:1])
    assert batch.inputs[0, :4].tolist() == [CLS, *ids("北", "京"), SEP]
    assert batch.labels[0, :4].tolist() == [IGNORED, 0, 1, IGNORED]
    assert "1 of 1 texts were cut" in capsys.readouterr().err


def test_a_word_that_begins_within_a_token_teaches_nothing(capsys: pytest.CaptureFixture) -> None:
    """un ##happy ##s, told as unh + appys, or as one and the same token's parts."""
    for words in (("unh", "appys"), ("c", "at")):
        batch = tagged_rows(wordpiece(), [TaggedWords(words, ("B", "I"))], ("B", "I"), Limit(8), "").take(ALL[:1])
        assert batch.labels[0].tolist() == [IGNORED, 0] + [IGNORED] * 6
        assert "1 of 2 words have no token of their own" in capsys.readouterr().err


def test_byte_level_tokens_learn_the_tags_of_the_words_they_begin(smollm: Tokenizer) -> None:
    example = TaggedWords(("Marie", "Curie", "北", "京"), ("B-PER", "I-PER", "B-LOC", "I-LOC"))
    names = ("B-LOC", "B-PER", "I-LOC", "I-PER")
    batch = tagged_rows(smollm, [example], names, Limit(64)).take(ALL[:1])
    learned = batch.labels[0] != IGNORED
    assert batch.labels[0][learned].tolist() == [1, 3, 0, 2]
    assert "Marie".startswith(smollm.decode(batch.inputs[0][learned][:1].tolist()))


# --- Answers --------------------------------------------------------------------------------------------------------


def squad(*answers: dict[str, Any]) -> dict[str, Any]:
    asked = [{"question": "who sat?", "answers": [answer] if answer else []} for answer in answers]
    return {"data": [{"paragraphs": [{"context": "The cat sat on unhappys mat.", "qas": asked}]}]}


def test_an_answer_is_found_among_the_tokens(write: Write, capsys: pytest.CaptureFixture) -> None:
    answers = {"text": "cat", "answer_start": 4}, {"text": "on unhappys", "answer_start": 12}
    wrong = {"text": "dog", "answer_start": 4}
    examples = read_questions(write("squad.json.gz", json.dumps(squad(*answers, wrong, {}))))
    assert "2 of 4 questions are left out: 1 have no answer, 1 one that" in capsys.readouterr().err
    batch = question_rows(wordpiece(), examples, Limit(32)).take(ALL[:2])
    assert batch.labels.shape == (2, 2) and batch.count == 4 and batch.types is not None
    found = [batch.inputs[row, first : last + 1].tolist() for row, (first, last) in enumerate(batch.labels.tolist())]
    assert found == [ids("cat"), ids("on", "un", "##happy", "##s")]
    assert batch.types[0, batch.labels[0, 0]] == 1


def test_an_answer_that_was_cut_off_teaches_nothing(capsys: pytest.CaptureFixture) -> None:
    asked = [Question("who?", "the cat sat on the mat", begin, begin + 3) for begin in (4, 8, 19)]
    batch = question_rows(wordpiece(), asked, Limit(8, truncate=True)).take(ALL[:3])
    assert batch.labels.tolist() == [[5, 5], [6, 6], [IGNORED, IGNORED]] and batch.count == 4
    assert "1 of 3 answers are not whole in their row" in capsys.readouterr().err


# --- Bad files, real files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reader", "name", "content", "complaint"),
    [
        (read_labelled, "a.txt", "1 fine\nunlabelled\n", "a.txt:2: is no label, a space, and a text"),
        (read_tagged, "a.conll", "word\tO\nword O\n", "a.conll:2: is no word, a tab, and its tag"),
        (read_questions, "a.json", '{"data": 3}', "is not laid out as SQuAD's files"),
        (read_text, "a.txt", "café".encode("latin-1"), "is not in utf-8"),
        (read_text, "a.zip", b"PK\x03\x04 no archive", "a.zip: cannot be read"),
        (read_text, "missing/a.txt", None, "No such file"),
    ],
)
def test_bad_files_are_refused(
    reader: Callable[[Path], Any], name: str, content: Any, complaint: str, write: Write, tmp_path: Path
) -> None:
    file = tmp_path / name if content is None else write(name, content)
    with pytest.raises(DanluError, match=complaint):
        reader(file)


def test_a_damaged_gzip_and_an_archive_of_several_are_refused(tmp_path: Path, write: Write) -> None:
    whole = write("a.txt.gz", "1 fine\n" * 50).read_bytes()
    (tmp_path / "cut.gz").write_bytes(whole[: len(whole) // 2])
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        for name in "ab":
            archive.writestr(name, "1 fine")
    for name in ("cut.gz", "two.zip"):
        with pytest.raises(DanluError, match=f"{name}: cannot be read"):
            read_text(tmp_path / name)
    with pytest.raises(DanluError, match="there is no encoding utf-9"):
        read_text(write("b.txt", "1 fine"), "utf-9")


def test_real_data_sets(real_data: Callable[[str], Path]) -> None:
    sentiment = read_labelled(real_data("sentconv_stsa.binary.dev.gz"))
    questions = read_labelled(real_data("sentconv_TREC.train.all.gz"), "latin-1")
    assert (len(sentiment), len(names_of(sentiment))) == (872, 2)
    assert (len(questions), len(names_of(questions))) == (5452, 6)
    entities = read_tagged(real_data("wnut17_train.conll.gz"))
    assert (len(entities), len(names_of(entities))) == (3394, 13)
    for name in ("xquad_en_1190.json.gz", "xquad_zh_1190.json.gz"):
        asked = read_questions(real_data(name))
        assert len(asked) == 1190 and all(0 <= one.begin < one.end <= len(one.passage) for one in asked)


def test_real_answers_stand_where_the_tokens_say(real_data: Callable[[str], Path], smollm: Tokenizer) -> None:
    """English and Chinese, in tokens of bytes: what the tokens cover is the answer, or a little more around it."""
    for name in ("xquad_en_1190.json.gz", "xquad_zh_1190.json.gz"):
        asked = [one for one in read_questions(real_data(name))[::40] if len(one.passage) < 900]
        rows = question_rows(smollm, asked, Limit(4096))
        for number, one in enumerate(asked):
            first, last = np.asarray(rows.labels[number]).tolist()
            said = smollm.decode(rows.tokens[number][first : last + 1].tolist())
            assert one.passage[one.begin : one.end] in said and len(said) <= one.end - one.begin + 20
