"""Scores of a generated answer against its reference: ROUGE-L and exact match, for English and Chinese alike."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

# Scripts written without spaces between words: each character is a unit. The rest is cut into words.
CHARACTER_SCRIPTS = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f"  # Burmese
    "\u1780-\u17ff"  # Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"  # Japanese kana and the marks written with them
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # Han
    "\U00020000-\U0003ffff"  # Han, rare
)
UNIT = re.compile(rf"[{CHARACTER_SCRIPTS}]|[^\W_{CHARACTER_SCRIPTS}]+")


class Rouge(NamedTuple):
    """ROUGE-L, each a share in 0..1."""

    precision: float
    recall: float
    f: float


def units(text: str) -> list[str]:
    """The units ROUGE compares: lower-case words of letters and digits; single characters for Chinese and its like.

    On ASCII text these are the tokens of the `rouge-score` package without stemming. That package drops every other
    letter; here they count, after NFKC (full-width letters and digits become plain ones).
    """
    return UNIT.findall(unicodedata.normalize("NFKC", text).lower())


def rouge_l(reference: str, answer: str) -> Rouge:
    """ROUGE-L of one answer: how long a common subsequence it shares with the reference (Lin 2004, ACL W04-1013).

    Precision is the subsequence's share of the answer, recall its share of the reference, f their harmonic mean
    (beta = 1). An empty side scores 0.
    """
    wanted, given = units(reference), units(answer)
    common = lcs_length(wanted, given)
    if common == 0:
        return Rouge(0.0, 0.0, 0.0)
    return Rouge(common / len(given), common / len(wanted), 2 * common / (len(given) + len(wanted)))


def lcs_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, one row of the table held in the bits of an integer.

    Hyyro's form of the bit-parallel recurrence (2004, "Bit-parallel LCS-length computation revisited"): a zero bit in
    `row` is a step of the table's last row. Takes len(second) operations on integers of len(first) bits.
    """
    places: dict[str, int] = {}
    for position, unit in enumerate(first):
        places[unit] = places.get(unit, 0) | 1 << position
    full = row = (1 << len(first)) - 1
    for unit in second:
        matched = row & places.get(unit, 0)
        row = (row + matched | row - matched) & full
    return len(first) - row.bit_count()


def exact_match(reference: str, answer: str) -> bool:
    """Whether answer and reference are the same text after `normalise`."""
    return normalise(reference) == normalise(answer)


def normalise(text: str) -> str:
    """What may differ without a difference in meaning, made equal.

    NFKC (full-width and other compatibility forms become plain), case folded, each run of white space one space, ends
    trimmed, and a closing full stop or exclamation mark, Western or Chinese, dropped. Other punctuation counts: in an
    answer about code it carries the meaning.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).rstrip(".。!").rstrip()
