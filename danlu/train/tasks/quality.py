"""How good predictions are, beyond the loss: the figures that papers on each kind of task report.

All take plain sequences and give shares or scores; nothing here depends on a model.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers.normalizers import BertNormalizer

from danlu.console import say
from danlu.errors import DanluError

Numbers = npt.NDArray[np.float64]
ARTICLES = re.compile(r"\b(a|an|the)\b")
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
SPACED = BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=True)


def accuracy(wanted: Sequence[Any], found: Sequence[Any]) -> float:
    """The share of predictions that are right."""
    return sum(one == other for one, other in zip(wanted, found, strict=True)) / max(len(wanted), 1)


def macro_f1(wanted: Sequence[Any], found: Sequence[Any]) -> float:
    """The mean over all labels that occur, on either side, of 2 x right / (wanted + found)."""
    asked, given = Counter(wanted), Counter(found)
    right = Counter(one for one, other in zip(wanted, found, strict=True) if one == other)
    labels = set(asked) | set(given)
    return sum(2 * right[label] / (asked[label] + given[label]) for label in labels) / max(len(labels), 1)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Type, first word and last word of every entity in a row of tags B-TYPE, I-TYPE, O (and E-, S-).

    As seqeval's default and conlleval count them: I- behind O, or behind another type, begins an entity, too.
    """
    found, begin, kind, before = set(), -1, "", "O"
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, named = tag.partition("-")
        starts = prefix in ("B", "S") or (prefix in ("I", "E") and (before in ("O", "E", "S") or named != kind))
        if begin >= 0 and (starts or prefix == "O" or before in ("E", "S")):
            found.add((kind, begin, place - 1))
            begin = -1
        if starts:
            begin = place
        before, kind = prefix, named
    return found


def entity_f1(wanted: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of whole entities over all rows together; 0 where there is nothing to divide by."""
    pairs = [(entities(one), entities(other)) for one, other in zip(wanted, found, strict=True)]
    right = sum(len(one & other) for one, other in pairs)
    asked, given = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
    return {
        "entity_precision": right / max(given, 1),
        "entity_recall": right / max(asked, 1),
        "entity_f1": 2 * right / max(asked + given, 1),
    }


def answer_scores(wanted: Sequence[Sequence[str]], found: Sequence[str]) -> dict[str, float]:
    """SQuAD's exact match and F1 (arXiv:1606.05250), each against the best of the right answers, as shares.

    Words lose case, punctuation and the English articles; every Chinese character is a word of its own.
    """
    both = [max(_answer_score(one, said) for one in answers) for answers, said in zip(wanted, found, strict=True)]
    exact = [max(words(one) == words(said) for one in answers) for answers, said in zip(wanted, found, strict=True)]
    return {"exact_match": sum(exact) / max(len(exact), 1), "answer_f1": sum(both) / max(len(both), 1)}


def _answer_score(wanted: str, found: str) -> float:
    one, other = words(wanted), words(found)
    common = (Counter(one) & Counter(other)).total()
    return float(one == other) if not one or not other else 2 * common / (len(one) + len(other))


def words(text: str) -> list[str]:
    """The words of an answer as SQuAD's evaluation compares them."""
    lower = SPACED.normalize_str(unicodedata.normalize("NFKC", text))
    plain = "".join(one for one in lower if one not in string.punctuation and unicodedata.category(one)[0] != "P")
    return ARTICLES.sub(" ", plain).split()


def correlations(wanted: Numbers, found: Numbers) -> dict[str, float]:
    """Pearson's and Spearman's, of values and of their ranks; equal values share the mean of their ranks.

    0 where one side is the same everywhere.
    """
    return {"pearson": _pearson(wanted, found), "spearman": _pearson(_ranks(wanted), _ranks(found))}


def _pearson(one: Numbers, other: Numbers) -> float:
    if len(one) < 2 or not one.std() or not other.std():
        return 0.0
    return float(np.mean((one - one.mean()) * (other - other.mean())) / (one.std() * other.std()))


def _ranks(values: Numbers) -> Numbers:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place.reshape(-1)].astype(np.float64)


def translation_scores(wanted: Sequence[str], found: Sequence[str], tokenize: str = "auto") -> dict[str, float]:
    """BLEU and chrF by sacrebleu (arXiv:1804.08771), 0 to 100.

    Args: tokenize: sacrebleu's name of a way to cut words; "auto": zh where most letters wanted are Chinese, else 13a.

    Raises DanluError where sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        fix = "pip install 'danlu[evaluate]'"
        raise DanluError("BLEU and chrF are measured by sacrebleu, which is not installed", fix=fix) from None
    chosen = _cut_of(wanted) if tokenize == "auto" else tokenize
    references = [list(wanted)]
    bleu, chrf = BLEU(tokenize=chosen), CHRF()
    scores = {
        "bleu": float(bleu.corpus_score(list(found), references).score),
        "chrf": float(chrf.corpus_score(list(found), references).score),
    }
    say(f"test: sacrebleu's signatures: {bleu.get_signature()} and {chrf.get_signature()}")
    return scores


def _cut_of(texts: Sequence[str]) -> str:
    letters = [one for text in texts for one in text if one.isalpha()]
    return "zh" if 2 * sum(bool(HAN.match(one)) for one in letters) > len(letters) else "13a"
