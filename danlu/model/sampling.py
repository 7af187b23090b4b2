"""How the next token is chosen from the logits: the likeliest, or drawn from a part of the likely ones."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from danlu.errors import DanluError

COLDEST = 1e-6  # of temperatures above 0: logits divided by less would leave the range of fp32
RANKED = 1024  # tokens among which top-p looks first; nearly always they are enough, and ranking all takes longer


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen. What is set takes effect in this order, which is that of Hugging Face.

    Attributes:
        repetition_penalty: logits of tokens that the answer or its prompt holds already are divided by it where they
            are positive, multiplied where negative (arXiv:1909.05858); 1 changes nothing. Of an encoder's prompt,
            which the answer does not continue, nothing counts.
        temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
        top_k: draw among the k likeliest, and those as likely as the last of them; 0 for all.
        top_p: draw among the likeliest that together reach this probability (arXiv:1904.09751).
        min_p: draw among those at least this share as likely as the likeliest (arXiv:2407.01082).
        seed: the same seed, prompt and model give the same draws. Each row of a batch has its own, seeded by its
            number too: what a row draws does not depend on the others.

    Raises DanluError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        greedy = self.temperature == 0
        for name, right, range_ in (
            ("temperature", greedy or COLDEST <= self.temperature < math.inf, f"0 or at least {COLDEST}"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
        ):
            if not right:
                raise DanluError(f"{name} is {getattr(self, name)}; it must be {range_}", where="generate")


GREEDY = Choice()


class Chooser:
    """Chooses the next token of each row of a batch.

    Args:
        choice: how.
        before: the tokens that each row begins with.
        vocab: logits a row.
        device: of the logits.
    """

    def __init__(self, choice: Choice, before: Sequence[list[int]], vocab: int, device: torch.device) -> None:
        self._choice = choice
        self._chances = [random.Random(f"{choice.seed} {row}") for row in range(len(before))]
        self._used: Tensor | None = None  # bool [rows, vocab]
        if choice.repetition_penalty != 1:
            self._used = torch.zeros(len(before), vocab, dtype=torch.bool, device=device)
            for used, tokens in zip(self._used, before, strict=True):
                used[tokens] = True

    @torch.inference_mode()
    def choose(self, logits: Tensor) -> Tensor:
        """[rows, vocab] -> int64 [rows]. Raises DanluError where tokens are drawn and the logits are not numbers."""
        if self._used is not None:
            logits = penalised(logits.float(), self._used, self._choice.repetition_penalty)
        if self._choice.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            tokens = draw(likely(logits.float(), self._choice), [chance.random() for chance in self._chances])
        if self._used is not None:
            self._used.scatter_(1, tokens[:, None], True)
        return tokens

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows, in this order."""
        self._chances = [self._chances[row] for row in rows]
        if self._used is not None:
            self._used = self._used[rows]


def penalised(scores: Tensor, used: Tensor, penalty: float) -> Tensor:
    """Scores [rows, vocab], less likely where `used`, bool of the same shape."""
    return torch.where(used, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def likely(scores: Tensor, choice: Choice) -> Tensor:
    """Scores [rows, vocab] over the temperature, -inf for tokens that are not drawn. The likeliest always stays."""
    scores = scores / choice.temperature
    if 0 < choice.top_k < scores.shape[-1]:
        scores = _at_least(scores, scores.topk(choice.top_k).values[:, -1:])
    if choice.top_p < 1:
        scores = _at_least(scores, _least_of_top_p(scores, choice.top_p))
    if choice.min_p > 0:
        scores = _at_least(scores, scores.amax(-1, keepdim=True) + math.log(choice.min_p))
    return scores


def draw(scores: Tensor, chances: list[float]) -> Tensor:
    """A token for each row of scores [rows, vocab], int64 [rows]: where its summed probabilities pass its chance.

    Args: chances: a number for each row, uniform in [0, 1).
    """
    sums = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
    if not sums[:, -1].isfinite().all():
        raise no_numbers()
    points = sums[:, -1:] * torch.tensor(chances, dtype=torch.float64, device=scores.device)[:, None]
    return torch.searchsorted(sums, points, right=True)[:, 0]


def no_numbers() -> DanluError:
    """The error for logits among which nothing can be chosen: not-a-number, or infinite."""
    return DanluError("the model's logits are not numbers", where="generate", fix="check its weights and its dtype")


def _at_least(scores: Tensor, least: Tensor) -> Tensor:
    return scores.masked_fill(scores < least, -torch.inf)


def _least_of_top_p(scores: Tensor, top_p: float) -> Tensor:
    """The lowest score [rows, 1] among the likeliest tokens that together reach a probability."""
    total = scores.logsumexp(-1, keepdim=True)
    count = min(RANKED, scores.shape[-1])
    while True:
        ranked = scores.topk(count).values
        chances = (ranked - total).double().exp()
        kept = chances.cumsum(-1) - chances < top_p  # what comes before a token has not reached it
        if count == scores.shape[-1] or not kept[:, -1].any():
            return ranked.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
        count = scores.shape[-1]
