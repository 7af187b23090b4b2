"""Rows with labels: of a whole text, of each word, or where in a passage an answer stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from danlu.console import warn
from danlu.data.batch import RowBatch
from danlu.data.datasets import LabelledText, Question, TaggedWords
from danlu.data.encoding import Encoded, Limit, cut, encode_all, fitted
from danlu.data.memory import Ragged, tensor
from danlu.data.stream import IGNORED
from danlu.errors import DanluError, one_of
from danlu.tokenizer import Tokenizer


@dataclass(frozen=True)
class LabelBatch(RowBatch):
    """Inputs with what is to be said of them.

    Attributes:
        inputs: token ids, int64 [B, T], or pixels, float [B, channels, height, width].
        labels: of a row, int64 [B], or float [B, classes], the probability of each; of each token, int64 [B, T]; start
            and end of an answer, int64 [B, 2]; values, float [B] or [B, outputs]. A class or a place of -100 is not
            learned.
        segments: int32 [B, T], 1, or 0 for padding; None for images.
        types: int64 [B, T], 0 or 1, the first text of a row or its second; None for 0.
        weights: fp32, what each label's loss is multiplied by; of the labels' shape, or [B] where labels are floats;
            None for 1.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    segments: torch.Tensor | None = None
    types: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    @cached_property
    def count(self) -> int:
        """How many labels are learned; an answer's start and end are two, values and probabilities one a row."""
        if self.labels.is_floating_point():
            return len(self.labels)
        return int((self.labels != IGNORED).sum())

    @cached_property
    def size(self) -> int:
        """Tokens, padding aside, or images."""
        return len(self.inputs) if self.segments is None else int((self.segments > 0).sum())


@dataclass(frozen=True)
class LabelledRows:
    """Texts and their labels in memory.

    Attributes:
        tokens: ids, with what the tokenizer puts around a text or two.
        labels: int64 [rows], float32 [rows] or int64 [rows, 2]; Ragged where every token has one.
        types: 0 or 1 for each token, None where no row has a second text.
    """

    tokens: Ragged
    labels: npt.NDArray[np.int64] | npt.NDArray[np.float32] | Ragged
    types: Ragged | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def lengths(self, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens of the rows with these numbers, int64 [B]."""
        return self.tokens.lengths(chosen)

    def take(self, chosen: npt.NDArray[np.int64]) -> LabelBatch:
        """The batch of the rows with these numbers, padded to a multiple of 8."""
        labels = self.labels.padded(chosen, IGNORED) if isinstance(self.labels, Ragged) else self.labels[chosen]
        types = None if self.types is None else tensor(self.types.padded(chosen, 0))
        segments = tensor(self.tokens.segments(chosen))
        return LabelBatch(tensor(self.tokens.padded(chosen, 0)), tensor(labels), segments, types)


def text_rows(
    tokenizer: Tokenizer, examples: Sequence[LabelledText], names: Sequence[str], limit: Limit
) -> LabelledRows:
    """Rows for a classifier whose labels have these names.

    Raises DanluError where a label has another name, or a text is too long and must not be cut.
    """
    known = _numbered(names)
    numbers = [_number(one.label, known, one.where) for one in examples]
    return _rows(_encode_examples(tokenizer, examples, limit), np.array(numbers, dtype=np.int64))


def value_rows(tokenizer: Tokenizer, examples: Sequence[LabelledText], limit: Limit) -> LabelledRows:
    """Rows for a regression: labels are numbers.

    Raises DanluError where a label is no finite number, or a text is too long and must not be cut.
    """
    values = np.array([_value(one) for one in examples], dtype=np.float32)
    return _rows(_encode_examples(tokenizer, examples, limit), values)


def tagged_rows(
    tokenizer: Tokenizer, examples: Sequence[TaggedWords], names: Sequence[str], limit: Limit, joiner: str = " "
) -> LabelledRows:
    """Rows for a classifier of tokens. The first token of a word learns its tag, the others none.

    Words that begin within a token, or have none, teach nothing: they are counted and said.

    Args:
        names: of the tags.
        joiner: between two words; nothing where words are Chinese characters.

    Raises DanluError where a tag has another name, or a sentence is too long and must not be cut.
    """
    whole = encode_all(tokenizer, [joiner.join(one.words) for one in examples])
    labels, lost, known = [], 0, _numbered(names)
    for one, row in zip(examples, whole, strict=True):
        found, without = _tag(row, one.words, [_number(tag, known, one.where) for tag in one.tags], len(joiner))
        labels.append(found)
        lost += without
    if lost:
        total = sum(len(one.words) for one in examples)
        warn(f"{lost:,} of {total:,} words have no token of their own and teach nothing")
    kept = fitted(whole, limit)
    return _rows(kept, Ragged.of([cut(one, row, limit.tokens) for one, row in zip(labels, whole, strict=True)]))


def question_rows(tokenizer: Tokenizer, examples: Sequence[Question], limit: Limit) -> LabelledRows:
    """Rows for a model of answers' places: the question, the passage, and the answer's first and last token.

    Where an answer was cut off its places are -100 and not learned; those rows are counted and said.
    Raises DanluError where a row is too long and must not be cut.
    """
    return span_rows(encode_questions(tokenizer, examples, limit), examples)


def encode_questions(tokenizer: Tokenizer, examples: Sequence[Question], limit: Limit) -> list[Encoded]:
    """Each question and its passage. Raises DanluError where a row is too long and must not be cut."""
    return fitted(encode_all(tokenizer, [(one.question, one.passage) for one in examples]), limit)


def span_rows(encoded: list[Encoded], examples: Sequence[Question]) -> LabelledRows:
    """Rows for a model of answers' places, of what `encode_questions` has made; see `question_rows`."""
    spans = np.array([_span(row, one) for row, one in zip(encoded, examples, strict=True)], dtype=np.int64)
    lost = int((spans[:, 0] == IGNORED).sum()) if len(spans) else 0
    if lost:
        warn(f"{lost:,} of {len(spans):,} answers are not whole in their row and teach nothing")
    return _rows(encoded, spans.reshape(-1, 2))


def _encode_examples(tokenizer: Tokenizer, examples: Sequence[LabelledText], limit: Limit) -> list[Encoded]:
    if any(one.second is None for one in examples):
        if any(one.second is not None for one in examples):
            raise DanluError("some examples have a second text and some have none")
        return fitted(encode_all(tokenizer, [one.text for one in examples]), limit)
    return fitted(encode_all(tokenizer, [(one.text, one.second or "") for one in examples]), limit)


def _rows(encoded: list[Encoded], labels: npt.NDArray[np.int64] | npt.NDArray[np.float32] | Ragged) -> LabelledRows:
    types = Ragged.of([row.types for row in encoded]) if any(any(row.types) for row in encoded) else None
    return LabelledRows(Ragged.of([row.ids for row in encoded]), labels, types)


def _numbered(names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def _number(label: str, known: Mapping[str, int], where: str | None) -> int:
    if label not in known:
        raise DanluError(f"the label {label!r} is not known", where=where, fix=one_of(label, list(known)))
    return known[label]


def _value(example: LabelledText) -> float:
    try:
        value = float(example.label)
    except ValueError:
        value = float("nan")
    if not abs(value) <= float(np.finfo(np.float32).max):  # it is learned in fp32; nan is in no order
        what = f"the label {example.label!r} is no finite number"
        raise DanluError(what, where=example.where, fix="mend the row, or take it out")
    return value


def _tag(row: Encoded, words: Sequence[str], tags: list[int], gap: int) -> tuple[list[int], int]:
    """A label for each token of a row, -100 for those that learn none, and how many words got no token."""
    labels = [IGNORED] * len(row.ids)
    token, begin, lost = 0, 0, 0
    for word, tag in zip(words, tags, strict=True):
        while token < len(labels) and (row.sequences[token] is None or row.places[token][1] <= begin):
            token += 1
        end = begin + len(word)
        starts = token < len(labels) and begin - gap <= row.places[token][0] < end
        if starts and labels[token] == IGNORED:
            labels[token] = tag
        else:
            lost += 1
        begin = end + gap
    return labels, lost


def _span(row: Encoded, asked: Question) -> tuple[int, int]:
    """First and last token of an answer, (-100, -100) where the row does not hold all of it."""
    inside = [
        number
        for number, (sequence, (begin, end)) in enumerate(zip(row.sequences, row.places, strict=True))
        if sequence == 1 and end > asked.begin and begin < asked.end
    ]
    whole = inside and row.places[inside[-1]][1] >= asked.end and row.places[inside[0]][0] <= asked.begin
    return (inside[0], inside[-1]) if whole else (IGNORED, IGNORED)
