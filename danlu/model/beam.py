"""Beam search: the best answer among several that are followed at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from danlu.errors import DanluError
from danlu.model.allowed import Allowed, Place, only
from danlu.model.generate import check_answers, check_prompts
from danlu.model.sampling import no_numbers
from danlu.model.writer import Writer, Writing


def beam_search(
    model: Writing,
    prompts: Sequence[list[int]],
    *,
    beams: int,
    max_new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    allowed: Allowed | None = None,
) -> list[list[int]]:
    """The best answer to each prompt that beam search finds, without its stop id; prompts may be of any lengths.

    Answers are compared by the sum of their tokens' log-probabilities over length ** length_penalty, a stop id counted.
    (arXiv:1609.08144 has another function of the length; this one and all details are as in Hugging Face's library.)

    Args:
        model, max_new_tokens, stop_ids, allowed: see `danlu.model.generate.generate`.
        beams: answers followed at once; 1 is greedy search.
        length_penalty: above 0 longer answers gain, below 0 shorter ones; 0 compares sums.
        early_stopping: end once `beams` answers are complete. Otherwise go on while the best of those under way is
            better, as it stands, than the worst of those complete.

    Raises DanluError where a prompt is empty or does not fit in the context together with its answer, where not every
    allowed answer can be written, or where the model's logits are not numbers.
    """
    if beams < 1 or not -10 <= length_penalty <= 10:
        what = f"beams is {beams} and length_penalty {length_penalty}; they must be at least 1, and from -10 to 10"
        raise DanluError(what, where="generate")
    check_prompts(model, prompts, max_new_tokens)
    check_answers(model, max_new_tokens, stop_ids, allowed)
    if not prompts or max_new_tokens == 0:
        return [[] for _ in prompts]
    first = _Beam([], 0.0, 0, None if allowed is None else allowed.start)
    searches = [_Search(beams, length_penalty, early_stopping, stop_ids, [first]) for _ in prompts]
    writer = Writer(model, prompts, max_new_tokens)
    # So many that enough are left to go on with even where each beam's likeliest tokens are all the stop ids.
    width = beams * max(2, 1 + len(stop_ids))
    for length in range(1, max_new_tokens + 1):
        under_way = [beam for search in searches for beam in search.live]
        found = _continuations(writer.logits, under_way, width, stop_ids)
        for search in searches:
            best = sorted((one for _ in search.live for one in next(found)), key=lambda one: -one[0])
            search.step([_longer(under_way, *one) for one in best[:width]], length, length == max_new_tokens)
        under_way = [beam for search in searches for beam in search.live]
        if not under_way:
            break
        writer.keep([beam.row for beam in under_way])
        writer.write(torch.tensor([beam.ids[-1] for beam in under_way], device=model.device))
    if not all(search.complete for search in searches):
        raise no_numbers()
    return [search.complete[0][1] for search in searches]


@dataclass(frozen=True, slots=True)
class _Beam:
    """An answer under way.

    Attributes:
        ids: its tokens.
        score: the sum of their log-probabilities.
        row: of the writer that it continues.
        place: what it may become, where not every answer is allowed.
    """

    ids: list[int]
    score: float
    row: int
    place: Place | None


@dataclass
class _Search:
    """The answers to one prompt, the best first.

    Attributes:
        beams, length_penalty, early_stopping, stop_ids: see `beam_search`.
        live: those under way, at most `beams`.
        complete: scores and tokens of those that have ended, at most `beams`.
    """

    beams: int
    length_penalty: float
    early_stopping: bool
    stop_ids: frozenset[int]
    live: list[_Beam]
    complete: list[tuple[float, list[int]]] = field(default_factory=list)

    def step(self, found: Sequence[_Beam], length: int, last: bool) -> None:
        """Go on to the best continuations, all of `length` tokens. Those past the first `beams` cannot be complete:
        they are there so that as many stay under way."""
        if not self.live:
            return
        self.live = []
        for rank, beam in enumerate(found):
            stopped = beam.ids[-1] in self.stop_ids
            if not (stopped or last or (beam.place is not None and not beam.place.after)):
                self.live.append(beam)
            elif rank < self.beams:
                self.complete.append((self._normed(beam, length), beam.ids[:-1] if stopped else beam.ids))
        self.live = self.live[: self.beams]
        self.complete = sorted(self.complete, key=lambda one: -one[0])[: self.beams]
        if len(self.complete) == self.beams and self.live:
            worst = self.complete[-1][0]
            if self.early_stopping or self._normed(self.live[0], length) <= worst:
                self.live = []

    def _normed(self, beam: _Beam, length: int) -> float:
        return beam.score / length**self.length_penalty


def _continuations(
    logits: Tensor, beams: Sequence[_Beam], width: int, stop_ids: frozenset[int]
) -> Iterator[list[tuple[float, int, int]]]:
    """Of each row of logits [rows, vocab] its best `width` continuations: the score then, the row, the token.

    Args: beams: those that the rows belong to.
    """
    scores = logits.float().log_softmax(-1)
    places = [beam.place for beam in beams if beam.place is not None]
    if places:
        scores = only(scores, places, stop_ids)
    scores = scores + torch.tensor([beam.score for beam in beams], device=scores.device)[:, None]
    values, tokens = scores.topk(min(width, scores.shape[-1]))
    for row, (some, ids) in enumerate(zip(values.tolist(), tokens.tolist(), strict=True)):
        yield [(score, row, token) for score, token in zip(some, ids, strict=True) if score > -math.inf]


def _longer(beams: Sequence[_Beam], score: float, row: int, token: int) -> _Beam:
    """The beam of a row with one more token."""
    ids, place = beams[row].ids, beams[row].place
    return _Beam([*ids, token], score, row, None if place is None else place.after.get(token))
