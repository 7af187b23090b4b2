"""How answers and errors are written: OpenAI's objects, whole or as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from danlu.console import complain
from danlu.serve.line import Job
from danlu.serve.ranked import Names, Ranked, chat_logprobs, text_logprobs
from danlu.serve.requests import ApiError, GenerationRequest
from danlu.serve.text import Backend, Piece, Sampling, answer


@dataclass(frozen=True)
class Shape:
    """How one of the two endpoints writes a choice: whole, or as the parts of a stream."""

    prefix: str
    whole_object: str
    part_object: str
    whole: Callable[[str], dict[str, Any]]
    part: Callable[[str], dict[str, Any]]
    opening: dict[str, Any] | None
    closing: dict[str, Any]
    logprobs: Callable[[Iterable[Ranked], Names], dict[str, Any]]


CHAT = Shape(
    prefix="chatcmpl",
    whole_object="chat.completion",
    part_object="chat.completion.chunk",
    whole=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    part=lambda text: {"delta": {"content": text}},
    opening={"delta": {"role": "assistant", "content": ""}},
    closing={"delta": {}},
    logprobs=chat_logprobs,
)
TEXT = Shape(
    prefix="cmpl",
    whole_object="text_completion",
    part_object="text_completion",
    whole=lambda text: {"text": text},
    part=lambda text: {"text": text},
    opening=None,
    closing={"text": ""},
    logprobs=text_logprobs,
)


@dataclass(frozen=True)
class Task:
    """A request made ready for the model.

    Attributes:
        shape: how the endpoint writes.
        choices: a prompt's token ids and how to sample, for every choice in order.
        prompt_tokens: each prompt counted once, however many choices are made of it.
        stops: strings that end a choice.
        ranking: against how many of the likeliest each token is rated; None for no `logprobs`.
        echo: choices begin with their prompt.
        names: how tokens are written in `logprobs`.
    """

    shape: Shape
    choices: list[tuple[list[int], Sampling]]
    prompt_tokens: int
    stops: list[str]
    ranking: int | None
    echo: bool
    names: Names

    def pieces(self, backend: Backend) -> Generator[tuple[int, Piece], None, None]:
        """One choice after the other: (its index, what one more token brought)."""
        for index, (prompt, sampling) in enumerate(self.choices):
            joined = self.shape is TEXT
            for piece in answer(backend, prompt, sampling, self.stops, joined, self.ranking, self.echo):
                yield index, piece

    def logprobs(self, ranked: list[Ranked]) -> dict[str, Any] | None:
        """A choice's object of that name, or that of a part of it; None where nothing is rated."""
        return self.shape.logprobs(ranked, self.names) if self.ranking is not None else None

    def usage(self, made: int) -> dict[str, int]:
        """The usage object for `made` tokens of answer."""
        total = self.prompt_tokens + made
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": made, "total_tokens": total}


Pieces = Job[tuple[int, Piece]]


class EventStream(StreamingResponse):
    """Server-sent events that end their job when the client goes, however far the response got."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], job: Pieces) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


def _head(asked: GenerationRequest, shape: Shape, kind: str) -> dict[str, Any]:
    """What every object of one answer begins with."""
    ident = f"{shape.prefix}-{uuid.uuid4().hex}"
    return {"id": ident, "object": kind, "created": int(time.time()), "model": asked.model}


async def whole_answer(asked: GenerationRequest, task: Task, job: Pieces) -> dict[str, Any]:
    """The answer as one object."""
    texts: dict[int, str] = defaultdict(str)
    ranked: dict[int, list[Ranked]] = defaultdict(list)
    last: dict[int, Piece] = {}
    async for index, piece in job:
        texts[index] += piece.text
        ranked[index] += piece.ranked
        last[index] = piece
    choices = [
        {
            "index": index,
            **task.shape.whole(texts[index]),
            "logprobs": task.logprobs(ranked[index]),
            "finish_reason": piece.finish,
        }
        for index, piece in last.items()
    ]
    usage = task.usage(sum(piece.tokens for piece in last.values()))
    return _head(asked, task.shape, task.shape.whole_object) | {"choices": choices, "usage": usage}


async def event_stream(asked: GenerationRequest, task: Task, job: Pieces) -> AsyncIterator[str]:
    """The answer as server-sent events, one for every piece of text; an engine's error is the last event.

    Ratings of tokens that give no text yet come with the next text, or with the end.
    """
    head = _head(asked, task.shape, task.shape.part_object)
    with_usage = asked.stream_options is not None and asked.stream_options.include_usage
    if with_usage:
        head["usage"] = None
    opened, made = set(), 0
    waiting: list[Ranked] = []

    def event(index: int, body: dict[str, Any], finish: str | None = None) -> str:
        logprobs = task.logprobs(waiting) if waiting else None
        waiting.clear()
        return _event(head | {"choices": [{"index": index, **body, "logprobs": logprobs, "finish_reason": finish}]})

    try:
        async for index, piece in job:
            if index not in opened and task.shape.opening is not None:
                yield event(index, task.shape.opening)
            opened.add(index)
            waiting += piece.ranked
            if piece.text:
                yield event(index, task.shape.part(piece.text))
            if piece.finish:
                made += piece.tokens
                yield event(index, task.shape.closing, piece.finish)
    except Exception as error:
        yield _event(failure(error).body())
        return
    if with_usage:
        yield _event(head | {"choices": [], "usage": task.usage(made)})
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def failure(error: Exception) -> ApiError:
    """What the client is told of a failure inside; the server's own output says the rest."""
    if isinstance(error, ApiError):
        return error
    complain(f"an answer failed: {error!r}")
    return ApiError(500, "the model failed to answer; the server's output says why", kind="server_error")


def error_response(error: ApiError) -> Response:
    """An error as OpenAI writes it, with the headers that HTTP asks for."""
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(error.status)
    return JSONResponse(error.body(), status_code=error.status, headers=headers)
