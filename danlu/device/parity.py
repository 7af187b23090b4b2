"""Train = export = serve: the same prompts give the same token ids everywhere, and the same greedy answers.

What serves is llama.cpp reading an exported file; what was trained is our own model. Everything between them - chat
template, tokenizer, weights, rotary positions, norms - must agree, or the model that answers is not the one measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from danlu.artifact import figure
from danlu.console import say, warn
from danlu.data.example import Example
from danlu.data.stream import Rows
from danlu.device.engine import Engine, common_prefix
from danlu.evaluate.answers import draw_questions
from danlu.model.generate import generate_batch
from danlu.model.gguf import write_gguf
from danlu.model.transformer import Decoder
from danlu.tokenizer import Tokenizer

TEXT = 100  # characters of a plain text that serve as a prompt


@dataclass(frozen=True)
class Prompt:
    """One prompt on its way: rendered text, and the ids that training's own path makes of it.

    Attributes:
        messages: of a chat; empty for a plain text.
        text: rendered by the checkpoint's template, up to where the answer begins; or the plain text.
        ids: by the tuned checkpoint's tokenizer.
    """

    messages: list[dict[str, str]]
    text: str
    ids: list[int]


def draw_prompts(data: Path, tokenizer: Tokenizer, count: int, longest: int, seed: int) -> list[Prompt]:
    """Held-out prompts of at most `longest` tokens: chats drawn by the seed, or else beginnings of plain texts."""
    questions = draw_questions(data / "heldout.jsonl", tokenizer, count, longest, seed)
    if questions:
        return [
            Prompt(each.messages, tokenizer.render(each.messages, generation_prompt=True), each.prompt)
            for each in questions
        ]
    with (data / "heldout.jsonl").open(encoding="utf-8") as lines:
        texts = [Example.read(line).text[:TEXT] for line in islice(lines, count)]
    prompts = [Prompt([], text, tokenizer.encode(text, special=False)) for text in texts]
    fitting = [prompt for prompt in prompts if len(prompt.ids) <= longest]
    if len(fitting) < len(prompts):
        say(f"{len(prompts) - len(fitting)} held-out texts begin with more than {longest} tokens and are not compared")
    return fitting


def compare_ids(prompts: Sequence[Prompt], served: Path, threads: int | None) -> list[str]:
    """Where the served file disagrees with training about a prompt's ids: one sentence each, none where all agree.

    Two ways are compared with the tuned checkpoint's: the file's own template and tokenizer, which chat and server
    use, and llama.cpp's tokenizer.
    """
    tokenizer, found = Tokenizer.load(served), []
    with Engine(served, context=64, threads=threads) as engine:
        for number, prompt in enumerate(prompts, 1):
            text = tokenizer.render(prompt.messages, generation_prompt=True) if prompt.messages else prompt.text
            special = bool(prompt.messages)
            ways = {
                "the file's tokenizer": tokenizer.encode(text, special),
                "llama.cpp": engine.tokenize(text, special),
            }
            for name, ids in ways.items():
                if ids != prompt.ids:
                    place = common_prefix(ids, prompt.ids)
                    found.append(f"prompt {number}: {name} differs from token {place} on")
    return found


def count_trained(prompts: Sequence[Prompt], rows: Rows) -> int:
    """How many of the chats begin a packed document token for token: the ids that training and scoring read."""
    before = np.zeros_like(rows.segments)
    before[:, 1:] = rows.segments[:, :-1]
    starts = np.argwhere((rows.segments > 0) & (rows.segments != before))
    return sum(_begins(prompt.ids, rows.tokens, starts) for prompt in prompts if prompt.messages)


def _begins(ids: list[int], tokens: NDArray[np.int32], starts: NDArray[np.int64]) -> bool:
    """Whether one of the places [n, (row, column)] begins with these ids."""
    row, column = starts[starts[:, 1] + len(ids) <= tokens.shape[1]].T
    for step, token in enumerate(ids):
        alike = tokens[row, column + step] == token
        row, column = row[alike], column[alike]
    return bool(row.size)


def compare_answers(
    model: Decoder, tokenizer: Tokenizer, prompts: Sequence[Prompt], tokens: int, work: Path, threads: int | None
) -> list[str]:
    """Where llama.cpp's greedy answers differ from our own model's: one sentence each, none where all are equal.

    The model is exported in fp32 for this and the file removed. Both compute in fp32, so that only a near tie, told by
    the gap between the two logits, can tell them apart.

    Args:
        model: fp32.
        tokenizer: goes into the exported file.
        prompts: answered with exactly `tokens` tokens, past any stop token.
        work: a directory for the file.
    """
    ids = [prompt.ids for prompt in prompts]
    ours = generate_batch(model, ids, max_new_tokens=tokens)
    export = work / "parity.f32.gguf"
    try:
        write_gguf(model, tokenizer, export, "f32")
        with Engine(export, context=max(map(len, ids)) + tokens, threads=threads, exact=True) as engine:
            theirs = engine.generate_batch(ids, max_new_tokens=tokens)
            pairs = zip(ids, ours, theirs, strict=True)
            differences = [_difference(engine, prompt, mine, its) for prompt, mine, its in pairs]
    finally:
        export.unlink(missing_ok=True)
    return [f"prompt {number}: {words}" for number, words in enumerate(differences, 1) if words]


def _difference(engine: Engine, prompt: list[int], ours: list[int], theirs: list[int]) -> str:
    """The first token where two answers part, and how near the engine's choice was; empty where they are equal."""
    if ours == theirs:
        return ""
    place = common_prefix(ours, theirs)
    logits = engine.next_logits(prompt + ours[:place])
    gap = logits[theirs[place]] - logits[ours[place]]
    return f"answers part at token {place}: ours {ours[place]}, the engine's {theirs[place]}, logit gap {gap:.2e}"


@dataclass(frozen=True)
class Parity:
    """What the comparison found.

    Attributes:
        prompts, chats: compared, and how many of them are conversations.
        trained: chats whose ids stand at the beginning of a packed held-out document.
        other_ids, other_answers: the disagreements in words; none where all is equal.
        tokens: of each compared answer.
    """

    prompts: int
    chats: int
    trained: int
    tokens: int
    other_ids: list[str]
    other_answers: list[str]

    @property
    def same_ids(self) -> int:
        """Prompts whose ids agree everywhere."""
        return self.prompts - len({words.partition(":")[0] for words in self.other_ids})

    def figures(self) -> dict[str, Any]:
        """As in a certificate."""
        ways = "the tuned checkpoint's template and tokenizer, the exported file's, and llama.cpp's own tokenizer"
        answers = f"greedy, {self.tokens} tokens, fp32: llama.cpp on the exported weights against Danlu's model"
        return {
            "prompts": figure(self.prompts, "prompts"),
            "same_ids": figure(self.same_ids, "prompts", by=ways),
            "same_as_trained": figure(
                self.trained, "prompts", by=f"of {self.chats} chats, in the packed held-out rows"
            ),
            "same_answers": figure(self.prompts - len(self.other_answers), "prompts", by=answers),
        }


def prove(
    model: Decoder,
    tokenizer: Tokenizer,
    served: Path,
    data: Path,
    *,
    prompts: int,
    tokens: int,
    work: Path,
    threads: int | None,
    seed: int,
) -> Parity:
    """Compare training, export and serving on held-out prompts; disagreements are warned of.

    Args:
        model, tokenizer: the tuned checkpoint, in fp32.
        served: the GGUF that answers.
        data: a data artifact.
        prompts, tokens: how many prompts, and how long an answer.
        work: a directory for the fp32 export.
    """
    drawn = draw_prompts(data, tokenizer, prompts, model.config.context - tokens, seed)
    if not drawn:
        warn("no held-out prompt is short enough to compare training with serving")
        return Parity(0, 0, 0, tokens, [], [])
    other_ids = compare_ids(drawn, served, threads)
    other_answers = compare_answers(model, tokenizer, drawn, tokens, work, threads)
    for words in other_ids + other_answers:
        warn(words)
    chats = sum(bool(prompt.messages) for prompt in drawn)
    return Parity(
        len(drawn), chats, count_trained(drawn, Rows.open(data / "heldout")), tokens, other_ids, other_answers
    )
