"""How often long answers end in a loop, saying the same words over and over: few bits do so where losses look fine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from danlu.device.engine import CACHES, Engine
from danlu.evaluate.bootstrap import Interval, proportion

TURNS = 3  # times that a cycle must have come at the end
LEAST = 24  # tokens that they must take, so that a short word said thrice is none


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether an answer ends in a cycle of any length, said at least three times and over at least 24 tokens."""
    for period in range(1, len(tokens) // TURNS + 1):
        length = max(TURNS * period, LEAST)
        if length <= len(tokens) and all(
            tokens[-place] == tokens[-place - period] for place in range(1, length - period + 1)
        ):
            return True
    return False


def loop_rate(
    path: Path,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    *,
    threads: int | None = None,
    cache: str = CACHES[0],
    mapped: bool = False,
) -> Interval:
    """The share of greedy answers of so many tokens that end in a loop, with its 95 % interval.

    Answers go on past stop tokens: what is asked is whether the text keeps moving.

    Args: threads, cache, mapped: see Engine.

    Raises DanluError where a prompt and its answer do not fit in the model's context.
    """
    longest = max(len(prompt) for prompt in prompts) + tokens
    with Engine(path, context=longest, threads=threads, cache=cache, mapped=mapped) as engine:
        answers = engine.generate_batch(prompts, max_new_tokens=tokens)
    return proportion(sum(map(ends_in_loop, answers)), len(answers))
