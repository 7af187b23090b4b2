"""Several tokens a step in the engine: cheap guesses, which the model then checks all at once (arXiv:2211.17192).

Greedy only: a guess is kept where it is the model's own likeliest token, so the text is the one that the model writes
alone. What is guessed from is a `Draft`: the text so far, in which phrases come again, or a smaller model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from danlu.device.engine import SCORED, Engine, common_prefix
from danlu.errors import DanluError

MOST = 48  # guesses a step: what checking them takes grows with their number
COUNTS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)  # guesses a step that are weighed against each other
REPEATS = 3  # steps of each that are timed; the fastest counts
FORGETTING = 0.9  # what a step's guesses count for after the next one


class Draft(Protocol):
    """Where guesses come from."""

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens that may follow; none is an answer, too."""
        ...


@dataclass
class Lookup:
    """Guesses what followed the same few tokens the last time they came in this text (arXiv:2304.04487).

    For one text: the tokens of a call begin with those of the call before.

    Attributes:
        longest, shortest: tokens that must have come before; the longest that has is taken.
    """

    longest: int = 4
    shortest: int = 2
    _behind: dict[tuple[int, ...], int] = field(default_factory=dict)  # some tokens -> the place behind their last time
    _noted: int = 0  # places whose endings are in there

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        """See `Draft.guess`."""
        for place in range(self._noted + 1, len(tokens)):
            for length in range(self.shortest, min(self.longest, place) + 1):
                self._behind[tuple(tokens[place - length : place])] = place
        self._noted = max(len(tokens) - 1, self._noted)
        for length in range(min(self.longest, len(tokens)), self.shortest - 1, -1):
            behind = self._behind.get(tuple(tokens[len(tokens) - length :]))
            if behind is not None:
                return list(tokens[behind : behind + count])
        return []


class Smaller:
    """Guesses what a smaller model says.

    Raises DanluError where it has not as many words as the one that checks.
    """

    def __init__(self, engine: Engine, checker: Engine) -> None:
        if engine.vocab_size != checker.vocab_size:
            what = f"a model of {engine.vocab_size:,} words cannot guess for one of {checker.vocab_size:,}"
            raise DanluError(what, where=engine.path, fix="take a smaller model with the same vocabulary")
        self.engine = engine

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        """See `Draft.guess`; none where its context is full."""
        room = min(count, self.engine.context - len(tokens))
        return list(self.engine.generate(tokens, max_new_tokens=room)) if room > 0 else []


@dataclass
class Tally:
    """What guessing was good for.

    Attributes:
        steps: of the model that checks, the prompt's included.
        tokens: that came out of them.
        guessed, kept: guesses that were checked, and those that were right.
    """

    steps: int = 0
    tokens: int = 0
    guessed: int = 0
    kept: int = 0

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values."""
        rates = {"tokens_per_step": self.tokens / max(self.steps, 1), "kept_share": self.kept / max(self.guessed, 1)}
        return vars(self) | rates


@dataclass(frozen=True)
class Costs:
    """What steps take on this machine.

    Attributes:
        seconds: of a step that checks so many guesses, by their number; 0, which every step can do, is among them.
    """

    seconds: dict[int, float]

    @classmethod
    def measure(cls, engine: Engine, tokens: Sequence[int], guess: float = 0.0) -> Costs:
        """Time steps behind a text; what they say is forgotten. It takes a few seconds.

        The machine and the file's number format decide: where one token's step waits for memory, checking guesses is
        nearly free; where it is bound by computing, each costs as much again.

        Args:
            tokens: of the text, at least one.
            guess: seconds that a guess takes to be made.
        """
        found = {}
        for count in (each for each in COUNTS if len(tokens) + each < engine.context):
            guesses = [tokens[place % len(tokens)] for place in range(count)]
            taken = []
            for _ in range(REPEATS):
                engine.likeliest(tokens, 1)  # leaves these alone in the cache
                begun = time.perf_counter()
                engine.likeliest([*tokens, *guesses, tokens[0]], count + 1)
                taken.append(time.perf_counter() - begun)
            found[count] = min(taken) + guess * count
        return cls(found)

    def best(self, chance: float, most: int) -> int:
        """How many guesses bring most tokens a second, where each is right by so much chance if those before it are."""

        def rate(count: int) -> float:
            return sum(chance**number for number in range(count + 1)) / self.seconds[count]

        return max((count for count in self.seconds if count <= most), key=rate)


class _Chance:
    """How often guesses were right of late, those of a step less with every further one."""

    def __init__(self) -> None:
        self._right = self._wrong = 1.0

    @property
    def value(self) -> float:
        return self._right / (self._right + self._wrong)

    def see(self, right: int, missed: bool) -> None:
        self._right = FORGETTING * self._right + right
        self._wrong = FORGETTING * self._wrong + missed


def speculate(
    engine: Engine,
    prompt: Sequence[int],
    draft: Draft,
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    costs: Costs | None = None,
    most: int = MOST,
    tally: Tally | None = None,
) -> Iterator[int]:
    """Yield greedy token ids as `Engine.generate` does.

    Sums over several tokens at once may be rounded otherwise than over one, so where two tokens are as likely but for
    a rounding the texts may part.

    Args:
        engine: the model that checks.
        draft: guesses; made for this text.
        max_new_tokens, stop_ids: see `Engine.generate`.
        costs: of this engine on this machine: as many guesses are checked as pay, by how often they were right of late.
            None where checking them is free: then as many as can be had.
        most: guesses a step, at most.
        tally: where it is counted.

    Raises DanluError where the prompt is empty or leaves no room in the context.
    """
    if not prompt or len(prompt) >= engine.context:
        what = "the prompt is empty" if not prompt else f"a prompt of {len(prompt):,} tokens leaves no room to answer"
        raise DanluError(what, where=engine.path, fix=f"the context is {engine.context:,} tokens")
    if not 1 <= most < SCORED:
        raise DanluError(f"{most} guesses a step", where="speculation", fix=f"take 1 to {SCORED - 1}")
    return _speculate(engine, list(prompt), draft, max_new_tokens, stop_ids, costs, most, tally or Tally())


def _speculate(
    engine: Engine,
    tokens: list[int],
    draft: Draft,
    count: int,
    stop_ids: frozenset[int],
    costs: Costs | None,
    most: int,
    tally: Tally,
) -> Iterator[int]:
    end = min(len(tokens) + count, engine.context)
    chance = _Chance()
    while len(tokens) < end:
        room = min(most, end - len(tokens) - 1)
        wanted = room if costs is None else costs.best(chance.value, room)
        # One more than is checked: whether it would have been right costs nothing to know.
        guesses = draft.guess(tokens, wanted + 1)
        checked = guesses[:wanted]
        said = engine.likeliest([*tokens, *checked], len(checked) + 1)
        agreed = common_prefix(guesses, said)
        chance.see(agreed, missed=agreed < min(len(guesses), len(said)))
        right = min(agreed, len(checked))
        tally.steps += 1
        tally.guessed += len(checked)
        tally.kept += right
        for token in said[: right + 1]:
            if token in stop_ids:
                return
            tokens.append(token)
            tally.tokens += 1
            yield token
