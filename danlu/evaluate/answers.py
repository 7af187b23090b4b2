"""Questions drawn from the held-out examples, and what a model answers to them."""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danlu.console import progress, say
from danlu.data.example import Example
from danlu.evaluate.metrics import exact_match, rouge_l
from danlu.model.generate import generate_batch
from danlu.model.transformer import Decoder
from danlu.tokenizer import Tokenizer


@dataclass(frozen=True)
class Question:
    """A held-out conversation up to its last answer.

    Attributes:
        messages: the turns before that answer.
        prompt: the same as token ids, rendered by the checkpoint's template.
        reference: the answer that was held out.
        origin: file, line and group of the example.
    """

    messages: list[dict[str, str]]
    prompt: list[int]
    reference: str
    origin: dict[str, Any]

    @property
    def group(self) -> str:
        """What this question shares with others that are no independent evidence."""
        return self.origin["group"] or f"{self.origin['file']}:{self.origin['line']}"


@dataclass(frozen=True)
class Answer:
    """What a model said, and how near it is to the reference.

    Attributes:
        text: the answer, special tokens left out.
        cut: whether it reached the length limit.
        rouge: ROUGE-L F.
        exact: whether it is the reference, but for form.
    """

    text: str
    cut: bool
    rouge: float
    exact: bool


def draw_questions(path: Path, tokenizer: Tokenizer, count: int, longest: int, seed: int) -> list[Question]:
    """Draw `count` conversations from a heldout.jsonl by the seed, in one pass and constant memory.

    Plain texts hold no question and are passed over. A drawn conversation whose prompt has more than `longest` tokens
    is left out, and said to be.
    """
    if count == 0:
        return []
    order = random.Random(seed)
    with path.open(encoding="utf-8") as lines:
        chats = ((order.random(), number, line) for number, line in enumerate(lines) if '"messages"' in line)
        drawn = heapq.nsmallest(count, chats)
    questions = [_question(Example.read(line), tokenizer) for _, _, line in drawn]
    fitting = [question for question in questions if len(question.prompt) <= longest]
    if len(fitting) < len(questions):
        left = f"{len(questions) - len(fitting)} of {len(questions)} drawn prompts"
        say(f"evaluate: {left} have more than {longest:,} tokens and are not answered")
    if not questions:
        say("evaluate: the held-out data holds plain texts only: no answers are generated")
    return fitting


def _question(example: Example, tokenizer: Tokenizer) -> Question:
    *messages, last = example.messages
    prompt = tokenizer.encode(tokenizer.render(messages, generation_prompt=True))
    return Question(messages, prompt, last["content"], example.origin.plain())


def answer_all(
    model: Decoder, tokenizer: Tokenizer, questions: Sequence[Question], max_new_tokens: int, batch: int, label: str
) -> list[Answer]:
    """Answer every question greedily, `batch` at a time, those of like length together; results in the given order."""
    by_length = sorted(range(len(questions)), key=lambda place: len(questions[place].prompt))
    answers: dict[int, Answer] = {}
    with progress(label, len(questions), "answers") as tick:
        for start in range(0, len(by_length), batch):
            places = by_length[start : start + batch]
            prompts = [questions[place].prompt for place in places]
            said = generate_batch(model, prompts, max_new_tokens=max_new_tokens, stop_ids=tokenizer.stop_ids)
            for place, ids in zip(places, said, strict=True):
                answers[place] = _score(questions[place], ids, tokenizer, max_new_tokens)
            tick.advance(len(places))
    return [answers[place] for place in range(len(questions))]


def _score(question: Question, ids: list[int], tokenizer: Tokenizer, max_new_tokens: int) -> Answer:
    text = tokenizer.decode(ids).strip()
    return Answer(
        text, len(ids) == max_new_tokens, rouge_l(question.reference, text).f, exact_match(question.reference, text)
    )
