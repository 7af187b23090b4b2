"""A model behind an OpenAI-compatible server that is asked, in a student's words, what it thinks of text.

What a server can do is found out by asking: whether it rates prompts, how it names tokens, and whether it must write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from danlu.compress.learning.endpoint import Endpoint, Refused
from danlu.compress.learning.reading import Reader, Said, other_words
from danlu.data.corpus import Crops
from danlu.errors import DanluError
from danlu.streaming import BROKEN

PROBED = 8  # tokens of the first question, which finds out what the server can do
PASSAGES = 8  # of the text that must come back in the student's tokens


@dataclass
class Teacher:
    """A model behind a server, asked in the words of a student.

    Attributes:
        endpoint: the server.
        reader: of its answers.
        most: of the likeliest tokens at each place.
        scores: whether it rates prompts; else it writes.
        options: what besides is said in each request.
        unplaced: tokens it named so far that could not be told.
    """

    endpoint: Endpoint
    reader: Reader
    most: int
    scores: bool
    options: dict[str, Any]
    unplaced: int = 0

    @classmethod
    def meet(cls, endpoint: Endpoint, reader: Reader, most: int, probe: list[int], writes: bool) -> Teacher:
        """Find out what the server can do, by asking about a few tokens.

        Args: writes: have it write in any case.

        Raises DanluError where it gives no log probabilities, with its own last words.
        """
        names: list[dict[str, Any]] = [{"return_tokens_as_token_ids": True}, {}]
        scoring = [(True, {"max_tokens": length} | name) for length in (0, 1) for name in names]
        ways = ([] if writes else scoring) + [(False, name) for name in names]
        last = "its answers have no logprobs"
        for scores, options in ways:
            teacher = cls(endpoint, reader, most, scores, options)
            wanted = len(probe) + options["max_tokens"] if scores else 1
            try:
                said = teacher.score([probe])[0] if scores else teacher.write([probe], 1, 0)[0]
            except Refused as refused:
                last = str(refused)
                continue
            if said is not None and len(said) >= wanted:
                return teacher
        fix = "take a server that answers /v1/completions with logprobs, and no more of them than it gives (--top)"
        raise DanluError(f"gives no log probabilities: {last}", where=endpoint.url, fix=fix)

    def score(self, prompts: Sequence[list[int] | str]) -> list[list[Said] | None]:
        """What it thinks of each prompt's tokens; None where it does not say."""
        answers = self._ask({"prompt": prompts, "echo": True, "temperature": 0.0}, len(prompts))
        return [self._read(answer) for answer in answers]

    def write(self, prompts: Sequence[list[int]], count: int, seed: int) -> list[list[Said] | None]:
        """What it goes on with, drawn from its own probabilities, at most `count` tokens; None as with `score`."""
        asked = {"prompt": prompts, "max_tokens": count, "temperature": 1.0, "seed": seed}
        answers = self._ask(asked, len(prompts))
        made = [self._read(answer) for answer in answers]
        for prompt, answer, said in zip(prompts, answers, made, strict=True):
            if said is not None:
                self._check_text(prompt, str(answer.get("text", "")), said)
        return made

    def _read(self, answer: dict[str, Any]) -> list[Said] | None:
        said = self.reader.read(answer)
        self.unplaced += sum(one.unplaced for one in said or ())
        return said

    def _ask(self, asked: dict[str, Any], count: int) -> list[dict[str, Any]]:
        answer = self.endpoint.post("completions", asked | {"logprobs": self.most} | self.options)
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != count:
            raise DanluError(f"does not answer each of {count} prompts", where=self.endpoint.url)
        return sorted(choices, key=lambda one: int(one.get("index", 0)))

    def _check_text(self, prompt: list[int], text: str, said: list[Said]) -> None:
        """What was written must be the text of its tokens; characters may begin in the prompt."""
        ids = [one.token for one in said if one.token is not None]
        whole = self.reader.tokenizer.decode([*prompt, *ids])
        if len(ids) == len(said) and text.strip().strip(BROKEN) not in whole:
            own = self.reader.tokenizer.decode(ids)
            raise other_words(self.endpoint.url, f"it wrote {text[:40]!r}, which the student reads as {own[:40]!r}")


def check_words(teacher: Teacher, rows: Crops) -> None:
    """Passages spread over a text must come back cut into the student's tokens.

    Raises DanluError where they do not.
    """
    tokenizer = teacher.reader.tokenizer
    numbers = np.unique(np.linspace(0, len(rows) - 1, PASSAGES).astype(np.int64))
    batch = rows.batch(numbers)
    held = [line[line_segments > 0].tolist() for line, line_segments in zip(batch.tokens, batch.segments, strict=True)]
    texts = [text for ids in held if (text := tokenizer.decode(ids).strip(BROKEN))]
    for text, said in zip(texts, teacher.score(texts), strict=True):
        wanted = tokenizer.encode(text)
        found = [one.token for one in said or ()][: len(said or ()) - int(teacher.options["max_tokens"])]
        begun = found[len(found) == len(wanted) + 1 :]  # a token that begins every text may stand before it
        if len(begun) != len(wanted) or any(one not in (None, own) for one, own in zip(begun, wanted, strict=True)):
            raise other_words(teacher.endpoint.url, f"it cuts {text[:40]!r} otherwise")
