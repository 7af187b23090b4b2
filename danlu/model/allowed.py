"""Answers from a given set only: at every step just the tokens that some answer of the set goes on with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from danlu.errors import DanluError
from danlu.tokenizer import Tokenizer

WHERE = "allowed answers"


@dataclass(slots=True)
class Place:
    """What a part of an answer may become.

    Attributes:
        after: token -> the place it leads to.
        whole: the part is itself an answer of the set.
    """

    after: dict[int, Place] = field(default_factory=dict)
    whole: bool = False


class Allowed:
    """A set of answers as a trie (arXiv:2010.00904). An answer ends once it is whole; one that is the beginning of
    another ends by a stop id, so that the model decides between the two.

    Args:
        answers: token ids of each, at least one; without stop ids.

    Attributes:
        start: the place of an empty answer.
        longest: tokens of the longest answer.

    Raises DanluError for an empty set or an empty answer.
    """

    def __init__(self, answers: Iterable[Sequence[int]]) -> None:
        self.start, self.longest = Place(), 0
        self._tokens: set[int] = set()
        for answer in answers:
            place = self.start
            for token in answer:
                place = place.after.setdefault(token, Place())
            place.whole = True
            self._tokens.update(answer)
            self.longest = max(self.longest, len(answer))
        if not self.start.after or self.start.whole:
            raise DanluError("an answer is empty" if self.start.whole else "there are none", where=WHERE)

    @classmethod
    def texts(cls, tokenizer: Tokenizer, texts: Sequence[str]) -> Allowed:
        """A set of texts, each as the tokenizer cuts it; a word amid a sentence begins with its space."""
        return cls(tokenizer.encode_batch(list(texts), special=False))

    def check(self, count: int, stop_ids: frozenset[int], vocab: int) -> None:
        """Raise DanluError where not every answer can be written.

        Args: count: tokens an answer may have; stop_ids: those that end answers; vocab: the model's.
        """
        if self.longest > count:
            raise DanluError(f"the longest has {self.longest:,} tokens, but there is room for {count:,}", where=WHERE)
        strange = sorted(token for token in self._tokens if not 0 <= token < vocab)
        if strange:
            raise DanluError(f"they hold id {strange[0]:,}; the model's vocabulary has {vocab:,}", where=WHERE)
        if self._tokens & stop_ids:
            what = f"they hold the stop id {min(self._tokens & stop_ids)}"
            raise DanluError(what, where=WHERE, fix="leave stop ids out: an answer ends by itself")
        if _forks(self.start) and not any(token < vocab for token in stop_ids):
            raise DanluError("one is the beginning of another", where=WHERE, fix="give a stop id to tell them apart")


def only(scores: Tensor, places: Sequence[Place], stop_ids: frozenset[int]) -> Tensor:
    """Scores [rows, vocab], -inf for every token that does not continue its row's place."""
    ends = [token for token in stop_ids if token < scores.shape[-1]]  # a tokenizer may know more than the model
    rows, tokens = [], []
    for row, place in enumerate(places):
        next_tokens = [*place.after, *(ends if place.whole else ())]
        rows += [row] * len(next_tokens)
        tokens += next_tokens
    kept = torch.full_like(scores, -torch.inf)
    kept[rows, tokens] = scores[rows, tokens]
    return kept


def _forks(start: Place) -> bool:
    """Whether an answer is the beginning of another."""
    waiting = [start]
    while waiting:
        place = waiting.pop()
        if place.whole and place.after:
            return True
        waiting += place.after.values()
    return False
