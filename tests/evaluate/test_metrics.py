"""ROUGE-L agrees with the reference implementation, for words and for characters; exact match folds only form."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.evaluate.metrics import exact_match, lcs_length, rouge_l, units

rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
DATA = Path(os.environ.get("DANLU_DATA", "../shared/data"))


class Characters:
    """rouge-score's tokenizer interface, for text that is all Chinese."""

    def tokenize(self, text: str) -> list[str]:
        return [letter for letter in text.lower() if letter.isalnum()]


ENGLISH = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
CHINESE = rouge_scorer.RougeScorer(["rougeL"], tokenizer=Characters())


def assert_same(scorer, reference: str, answer: str) -> None:
    theirs = scorer.score(reference, answer)["rougeL"]
    assert rouge_l(reference, answer) == pytest.approx((theirs.precision, theirs.recall, theirs.fmeasure))


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("police killed the gunman", "police kill the gunman"),
        ("police killed the gunman", "the gunman kill police"),
        ("Return a list of the names in d.", "Returns the list of names; see os.listdir(d)."),
        ("snake_case and 3.14", "snake case, 3 14"),
        ("same words", "same words"),
        ("", "something"),
        ("something", "..."),
    ],
)
def test_english_agrees_with_rouge_score(reference, answer):
    assert_same(ENGLISH, reference, answer)


@given(st.text(st.characters(max_codepoint=126), max_size=80), st.text(st.characters(max_codepoint=126), max_size=80))
def test_any_ascii_agrees_with_rouge_score(reference, answer):
    assert_same(ENGLISH, reference, answer)


@given(
    st.lists(st.sampled_from("的一是不了在人有我他"), max_size=60),
    st.lists(st.sampled_from("的一是不了在人有我他，。"), max_size=60),
)
def test_chinese_is_compared_by_characters(reference, answer):
    assert_same(CHINESE, "".join(reference), "".join(answer))


def lines_of(name: str, count: int) -> list[str]:
    if not (DATA / name).is_file():
        pytest.skip(f"{DATA / name} is not here; set DANLU_DATA")
    with gzip.open(DATA / name, "rt", encoding="utf-8") as lines:
        return list(itertools.islice(lines, count))


def test_agrees_on_real_english_text():
    for row in map(json.loads, lines_of("scitldr_a_test.jsonl.gz", 20)):
        reference, answer = (text.encode("ascii", "ignore").decode() for text in (row["target"][0], *row["source"][:1]))
        assert_same(ENGLISH, reference, answer)


def test_agrees_on_real_chinese_text():
    for line in lines_of("csl_ts_test.tsv.gz", 20):
        abstract, title = (re.sub(r"[^\u4e00-\u9fff]", "", column) for column in line.split("\t")[1:3])
        assert rouge_l(title, abstract).f > 0
        assert_same(CHINESE, title, abstract)


def test_units_of_mixed_text():
    assert units("用 Python３ 读取 café_au_lait。") == ["用", "python3", "读", "取", "café", "au", "lait"]


def test_identical_scores_one_and_disjoint_zero():
    assert rouge_l("温度 is 20 degrees", "温度 IS 20 degrees!").f == 1
    assert rouge_l("abc", "xyz").f == 0


def test_long_answers_take_no_time():
    words = random.Random(0)
    first, second = ([f"w{words.randrange(500)}" for _ in range(8000)] for _ in range(2))
    started = time.perf_counter()
    assert lcs_length(first, second) == lcs_length(second, first)
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    ("reference", "answer", "same"),
    [
        ("Paris", " paris.\n", True),
        ("北京。", "北京", True),
        ("ＡＢＣ１２３", "abc123", True),
        ("a  b\tc", "a b c", True),
        ("len(x)", "len[x]", False),
        ("yes", "no", False),
        ("-1", "1", False),
        ("", "  ", True),
    ],
)
def test_exact_match_folds_form_and_keeps_meaning(reference, answer, same):
    assert exact_match(reference, answer) is same
