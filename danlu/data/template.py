"""Examples -> token ids and which of them are learned, with the checkpoint's own chat template.

What the model sees in training is what it will see when it serves: before each answer stand exactly the ids of
`encode(render(messages so far, generation_prompt=True))`, then come the answer's own ids and the token that ends it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from danlu.console import warn
from danlu.data.example import BadRow, Example, Message
from danlu.errors import DanluError
from danlu.tokenizer import Tokenizer

BEGIN, END = "⟦", "⟧"  # stand around what is learned where a document is shown
PROBE: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

# What can happen on the way, counted, and said once at the end.
CUT = "texts longer than the window, cut into windows"
SPLIT_TURNS = "chats made into several documents: earlier turns have other ids once later ones follow"
OPEN_PROMPT = "answers set directly after the prompt: the template writes a past turn otherwise than it opens a new one"
REWRITTEN = "answers the template changes: what is learned is what it makes of them"
ADDED_END = "answers ended by hand: the template puts no token at the end of a turn"


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens that attend to one another.

    Attributes:
        tokens: int32 [n].
        trained: bool [n], True where the token is one the model must learn to produce.
    """

    tokens: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tokens)


class Templater:
    """Turns examples into documents of at most `window` tokens.

    Attributes:
        notes: how often each of the things above happened.
    """

    def __init__(self, tokenizer: Tokenizer, window: int) -> None:
        self.notes: Counter[str] = Counter()
        self._tokenizer = tokenizer
        self._window = window
        probe = self._probe()
        stops = [number for number in probe if number in tokenizer.stop_ids]
        self._end_of_turn = stops[-1] if stops else tokenizer.eos_id
        self._forgeable = self._control_tokens({*probe, *tokenizer.stop_ids})
        if "strftime_now" in (tokenizer.chat_template or ""):
            warn("the chat template writes today's date into its prompts; served on another day they will differ")

    def documents(self, examples: Sequence[Example]) -> list[list[Document] | BadRow]:
        """The documents of each example, or why it makes none.

        A chat is one document as long as its ids only grow from turn to turn. Where they do not, as the template
        strips past thoughts or a token joins the prompt's end with the answer, a new document begins. A chat with a
        document longer than the window is refused; a plain text is cut into windows.
        Raises DanluError for a chat where the checkpoint has no chat template.
        """
        turns = [self._turns(example.messages) if example.is_chat else None for example in examples]
        texts = [text for pairs in turns if isinstance(pairs, list) for pair in pairs for text in pair]
        chats = iter(self._tokenizer.encode_batch(texts))
        plain = iter(self._tokenizer.encode_batch([one.text for one in examples if not one.is_chat], special=False))
        made: list[list[Document] | BadRow] = []
        for pairs in turns:
            if isinstance(pairs, BadRow):
                made.append(pairs)
            elif pairs is None:
                made.append(self._windows(next(plain)))
            else:
                made.append(self._chat([(next(chats), next(chats)) for _ in pairs]))
        return made

    def show(self, document: Document) -> str:
        """The document's text, what is learned between ⟦ and ⟧."""
        edges = np.flatnonzero(np.diff(document.trained, prepend=False, append=False)).tolist()
        pieces, last = [], 0
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            pieces += [self._text(document.tokens[last:begin]), BEGIN, self._text(document.tokens[begin:end]), END]
            last = end
        return "".join([*pieces, self._text(document.tokens[last:])])

    # --- Plain text -----------------------------------------------------------------------------------------------

    def _windows(self, ids: list[int]) -> list[Document]:
        """Every token but the first is learned once: each window begins with the last token of the one before."""
        begin = [self._tokenizer.bos_id] if self._tokenizer.adds_bos else []
        end = [] if self._tokenizer.eos_id is None else [self._tokenizer.eos_id]
        tokens = np.array([*begin, *ids, *end], dtype=np.int32)
        pieces = [tokens[at : at + self._window] for at in range(0, max(1, len(tokens) - 1), self._window - 1)]
        self.notes[CUT] += len(pieces) > 1
        return [Document(piece, np.arange(len(piece)) > 0) for piece in pieces]

    # --- Chats ----------------------------------------------------------------------------------------------------

    def _turns(self, messages: list[Message]) -> list[tuple[str, str]] | BadRow:
        """(prompt, answer with its end) for each of the assistant's turns."""
        for message in messages:
            forged = self._forgeable.search(message["content"]) if self._forgeable else None
            if forged:
                return BadRow(
                    "special token", f"the {message['role']}'s message holds {forged.group()}, which marks a turn"
                )
        answered = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        try:
            return [self._turn(messages[: number + 1]) for number in answered]
        except DanluError as error:
            if self._tokenizer.chat_template is None:
                raise
            return BadRow("refused by the chat template", error.what)

    def _turn(self, messages: list[Message]) -> tuple[str, str]:
        prompt = self._tokenizer.render(messages[:-1], generation_prompt=True)
        whole = self._tokenizer.render(messages)
        answer = messages[-1]["content"]
        if whole.startswith(prompt):
            self.notes[REWRITTEN] += answer not in whole[len(prompt) :]
            return prompt, whole[len(prompt) :]
        self.notes[OPEN_PROMPT] += 1
        end = "" if self._end_of_turn is None else self._text([self._end_of_turn])
        return prompt, answer[_overlap(prompt, answer) :] + end

    def _chat(self, turns: list[tuple[list[int], list[int]]]) -> list[Document] | BadRow:
        documents: list[Document] = []
        tokens: list[int] = []
        trained: list[bool] = []
        for prompt, answer in turns:
            if prompt[: len(tokens)] != tokens:
                documents.append(_document(tokens, trained))
                tokens, trained = [], []
            ended = self._ended(answer)
            trained += [False] * (len(prompt) - len(tokens)) + [True] * len(ended)
            tokens = prompt + ended
        documents.append(_document(tokens, trained))
        longest = max(map(len, documents))
        if longest > self._window:
            return BadRow("longer than the window", f"it has {longest:,} tokens, the window is {self._window:,}")
        self.notes[SPLIT_TURNS] += len(documents) > 1
        return documents

    def _ended(self, answer: list[int]) -> list[int]:
        """The answer up to and with the token that ends the turn; what a template adds after it opens the next turn."""
        stop = next((place for place, number in enumerate(answer) if number in self._tokenizer.stop_ids), None)
        if stop is not None:
            return answer[: stop + 1]
        self.notes[ADDED_END] += 1
        return answer if self._end_of_turn is None else [*answer, self._end_of_turn]

    # --- What the template is made of -----------------------------------------------------------------------------

    def _probe(self) -> list[int]:
        """The ids of the smallest chat; none where the checkpoint has no template or it refuses that chat."""
        try:
            return self._tokenizer.encode(self._tokenizer.render(PROBE))
        except DanluError:
            return []

    def _control_tokens(self, ids: set[int]) -> re.Pattern[str] | None:
        """Finds the special tokens that mark turns: text that holds one would forge a turn."""
        hidden = [number for number in ids if not self._tokenizer.decode([number])]
        texts = sorted({self._text([number]) for number in hidden} - {""})
        return re.compile("|".join(map(re.escape, texts))) if texts else None

    def _text(self, ids: Sequence[int] | npt.NDArray[np.int32]) -> str:
        return self._tokenizer.decode([int(number) for number in ids], skip_special=False)


def _document(tokens: list[int], trained: list[bool]) -> Document:
    return Document(np.array(tokens, dtype=np.int32), np.array(trained, dtype=bool))


def _overlap(prompt: str, answer: str) -> int:
    """How much of the answer's beginning already stands at the prompt's end, as `<think>` does in some templates."""
    return next(size for size in range(min(len(prompt), len(answer)), -1, -1) if prompt.endswith(answer[:size]))
