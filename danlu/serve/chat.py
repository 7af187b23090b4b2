"""A conversation with a model: in the terminal, line by line through a pipe, or one question."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from danlu.console import complain, result, say, warn
from danlu.errors import DanluError
from danlu.serve.backend import Guesses, open_backend
from danlu.serve.prompt import chat_prompt, room
from danlu.serve.text import Backend, Sampling, answer

HELP = """\
/reset        forget the conversation
/system TEXT  set the instruction that stands before it; without TEXT, remove it
/exit         leave (or Ctrl-D); Ctrl-C stops an answer"""


@dataclass
class Turn:
    """One question and its answer, filled while the answer is made.

    Attributes:
        finish: "stop", "length", or "interrupted".
        waited: seconds until the first token, which needs the prompt to be read.
        lasted: seconds from the first token to the last.
    """

    question: str
    prompt_tokens: int
    answer: str = ""
    tokens: int = 0
    finish: str = "interrupted"
    waited: float = 0.0
    lasted: float = 0.0

    @property
    def speed(self) -> float | None:
        """Tokens a second after the first; None where there is no second one."""
        return (self.tokens - 1) / self.lasted if self.tokens > 1 and self.lasted else None

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return {
            "question": self.question,
            "answer": self.answer,
            "finish_reason": self.finish,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "first_token_seconds": round(self.waited, 3),
            "tokens_per_second": self.speed and round(self.speed, 1),
        }


@dataclass
class Conversation:
    """What was said so far, and how answers are made.

    Attributes:
        backend: the model.
        sampling: how tokens are chosen; `max_new_tokens` bounds an answer, as what is left of the context does.
        system: the instruction before the conversation; None leaves it to the chat template.
        messages: the user's and the assistant's, in turn.
    """

    backend: Backend
    sampling: Sampling
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, question: str) -> tuple[Turn, Generator[str, None, None]]:
        """Begin a turn: its record, and the answer's text as it is made. What was said is remembered, cut short or not.

        Raises DanluError where the conversation outgrows the context or is no proper text; the question is then not
        remembered.
        """
        asked = {"role": "user", "content": question}
        instruction = [{"role": "system", "content": self.system}] if self.system else []
        if not _is_text(f"{self.system}{question}"):
            raise DanluError("the question or instruction is not UTF-8 text")
        prompt = chat_prompt(self.backend.tokenizer, [*instruction, *self.messages, asked])
        try:
            most = min(room(self.backend, prompt), self.sampling.max_new_tokens)
        except DanluError as error:
            fix = "/reset forgets what was said" if self.messages else "shorten it, or choose a longer --context"
            raise DanluError(error.what, fix=fix) from None
        turn = Turn(question, len(prompt))
        return turn, self._stream(turn, asked, prompt, replace(self.sampling, max_new_tokens=most))

    def _stream(
        self, turn: Turn, asked: dict[str, str], prompt: list[int], sampling: Sampling
    ) -> Generator[str, None, None]:
        started = time.monotonic()
        try:
            with closing(answer(self.backend, prompt, sampling)) as pieces:
                for piece in pieces:
                    if piece.tokens > turn.tokens:
                        now = time.monotonic() - started
                        turn.waited = turn.waited or now
                        turn.tokens, turn.lasted = piece.tokens, now - turn.waited
                    turn.answer += piece.text
                    turn.finish = piece.finish or turn.finish
                    yield piece.text
        finally:
            self.messages += [asked, {"role": "assistant", "content": turn.answer}]


def _is_text(value: str) -> bool:
    """False where bytes that are no UTF-8 came from the command line or terminal: Python turns them into surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def chat(
    ref: str | Path,
    *,
    prompt: str | None = None,
    system: str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    max_tokens: int | None = None,
    context: int | None = None,
    threads: int | None = None,
    guesses: Guesses | None = None,
    as_json: bool = False,
) -> None:
    """Talk with a model on standard input and output.

    Args:
        ref: what `open_backend` takes: a run, an artifact, a GGUF, a Hugging Face directory or a hub id.
        prompt: one question; None holds a conversation, one line of standard input a turn.
        system: the instruction before the conversation; None: the one it was tuned with, or else the template's own.
        temperature, top_p, seed: how tokens are chosen (see Sampling); temperature 0 always takes the likeliest.
        max_tokens: the most tokens of one answer; None: what the context has left.
        context: tokens of the whole conversation; None leaves it to the model.
        threads: CPU threads; None leaves them to the engine.
        guesses: guess answers ahead; they are what they would be without.
        as_json: print each turn as one line of JSON when it is done.

    Raises DanluError where there is no model, or guesses and temperature are asked for; and, unless a person types,
    where the conversation outgrows the context.
    """
    if guesses is not None and temperature > 0:
        what = f"guesses are kept where they are the likeliest tokens, and temperature {temperature:g} draws others"
        raise DanluError(what, where="--guess", fix="leave out --guess, or --temperature")
    with closing(open_backend(ref, context=context, threads=threads, guesses=guesses)) as backend:
        sampling = Sampling(max_tokens or backend.context, temperature, top_p, seed)
        conversation = Conversation(backend, sampling, backend.system if system is None else system)
        if prompt is not None:
            _take_turn(conversation, prompt, as_json)
        elif sys.stdin.isatty():
            _talk(conversation, as_json)
        else:
            _read_lines(conversation, as_json)


def _read_lines(conversation: Conversation, as_json: bool) -> None:
    """Lines from a file or pipe; the first mistake ends it."""
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            raise DanluError("is not UTF-8 text", where=f"standard input, line {number}") from None
        if _leaves(conversation, text.strip(), as_json):
            return


def _talk(conversation: Conversation, as_json: bool) -> None:
    """A person types: mistakes are said, and the conversation goes on."""
    import readline  # noqa: F401  # gives input() its line editing and history

    say(f"talking with {conversation.backend.name} (context {conversation.backend.context:,} tokens); /help helps")
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            say("\n/exit or Ctrl-D leaves")
            continue
        try:
            if _leaves(conversation, line.strip(), as_json):
                return
        except KeyboardInterrupt:
            continue  # the answer stopped, and its turn's last line says so
        except DanluError as error:
            complain(str(error))


def _leaves(conversation: Conversation, line: str, as_json: bool) -> bool:
    """Obey a command or answer a question; True where the conversation is over."""
    command = re.fullmatch(r"(/[a-z]+)(?:\s+(.*))?", line)
    match command and command[1]:
        case None:
            if line:
                _take_turn(conversation, line, as_json)
        case "/exit":
            return True
        case "/reset":
            conversation.messages.clear()
            say("the conversation is forgotten")
        case "/system":
            conversation.system = command and command[2]
            say(
                f"the instruction is now: {conversation.system}"
                if conversation.system
                else "there is no instruction now"
            )
        case "/help":
            say(HELP)
        case unknown:
            raise DanluError(f"there is no command {unknown}", fix="/help shows them")
    return False


def _take_turn(conversation: Conversation, question: str, as_json: bool) -> None:
    """Print an answer while it is made, then what it took."""
    turn, stream = conversation.ask(question)
    try:
        with closing(stream):
            for text in stream:
                if not as_json:
                    print(text, end="", flush=True)
    finally:
        result(json.dumps(turn.plain(), ensure_ascii=False) if as_json else "")
        _say_what_it_took(turn, conversation.backend)


def _say_what_it_took(turn: Turn, backend: Backend) -> None:
    context, tally = backend.context, backend.tally
    used = turn.prompt_tokens + turn.tokens
    if turn.finish == "length":
        full = used >= context
        warn(
            "the context is full, the answer is cut; /reset forgets what was said"
            if full
            else "the answer is cut at --max-tokens"
        )
    speed = f", {turn.speed:,.1f} token/s" if turn.speed else ""
    stopped = ", interrupted" if turn.finish == "interrupted" else ""
    kept = "" if tally is None else f"; {tally.kept:,} of {tally.guessed:,} guesses were right"
    first = f"first after {turn.waited:.2f} s"
    say(f"[{turn.tokens:,} tokens{speed}, {first}{kept}; context {used:,} of {context:,}{stopped}]")
