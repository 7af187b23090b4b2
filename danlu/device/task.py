"""The user's own task: questions with answers, asked of the original and of what was made of it, both in the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from danlu.console import progress, say
from danlu.data.example import Example
from danlu.data.formats import LOOKED_AT, detect
from danlu.data.settings import Source
from danlu.data.sources import read
from danlu.device.engine import CACHES, Engine
from danlu.errors import DanluError
from danlu.evaluate.bootstrap import interval, paired_change
from danlu.evaluate.metrics import exact_match, rouge_l
from danlu.tokenizer import Tokenizer

MOST = 64  # questions that are asked
LONGEST = 512  # tokens of a question
TOKENS = 96  # of an answer
TOGETHER = 16  # questions asked at once


@dataclass(frozen=True)
class Asked:
    """A question, its prompt's ids, and the answer that is right."""

    prompt: list[int]
    reference: str


def questions_of(path: Path, tokenizer: Tokenizer, context: int) -> list[Asked]:
    """The first questions of a file in any layout that the data stage reads: prompt and completion, chats, ...

    Args:
        context: of the model; a prompt that leaves no room for an answer there is left out, and said to be.

    Raises DanluError where there is no question.
    """
    longest = min(LONGEST, context - TOKENS)
    source, found = Source(path=str(path)), []
    for name, rows in read(source):
        listed = list(islice(rows, MOST))
        if listed:
            layout = detect(listed[:LOOKED_AT], source, name)
            found += [_asked(layout.example(row), tokenizer) for row in listed]
    fitting = [each for each in found if each is not None and len(each.prompt) <= longest][:MOST]
    if len(fitting) < min(len(found), MOST):
        say(f"{path}: {len(found) - len(fitting)} rows are no questions of at most {longest} tokens, and left out")
    if not fitting:
        what = f"holds no question with an answer whose prompt has at most {longest} tokens"
        raise DanluError(what, where=path, fix="write rows of prompt and completion, or chats")
    return fitting


def _asked(example: Example, tokenizer: Tokenizer) -> Asked | None:
    if not example.is_chat:
        return None
    *messages, last = example.messages
    return Asked(tokenizer.encode(tokenizer.render(messages, generation_prompt=True)), last["content"])


def task_figures(
    original: Path,
    candidate: Path,
    questions: Sequence[Asked],
    tokenizer: Tokenizer,
    *,
    threads: int | None = None,
    cache: str = CACHES[0],
    samples: int = 1000,
) -> dict[str, dict[str, Any]]:
    """ROUGE-L and exact matches of both files' greedy answers, and what changed, over questions resampled."""
    before = _scores(original, questions, tokenizer, threads, CACHES[0])
    after = _scores(candidate, questions, tokenizer, threads, cache)
    by = f"{len(questions)} questions of the task, which are resampled"
    figures = {}
    for name, one, other in zip(("rouge_l", "exact"), before.T, after.T, strict=True):
        figures[f"task_{name}_original"] = interval(one, samples=samples).figure("share", by)
        figures[f"task_{name}"] = interval(other, samples=samples).figure("share", by)
        change = paired_change(one, other, samples=samples).absolute
        figures[f"task_{name}_change"] = change.figure("share", f"paired; {by}")
    return figures


def _scores(
    path: Path, questions: Sequence[Asked], tokenizer: Tokenizer, threads: int | None, cache: str
) -> np.ndarray:
    """ROUGE-L and exactness of each answer, float64 [questions, 2]."""
    scores = []
    longest = max(len(each.prompt) for each in questions)
    with (
        Engine(path, context=longest + TOKENS, threads=threads, cache=cache) as engine,
        progress("task", len(questions), "answers") as tick,
    ):
        for start in range(0, len(questions), TOGETHER):
            part = questions[start : start + TOGETHER]
            said = engine.generate_batch(
                [each.prompt for each in part], max_new_tokens=TOKENS, stop_ids=tokenizer.stop_ids
            )
            for each, ids in zip(part, said, strict=True):
                text = tokenizer.decode(ids).strip()
                scores.append((rouge_l(each.reference, text).f, float(exact_match(each.reference, text))))
            tick.advance(len(part))
    return np.array(scores, np.float64)
