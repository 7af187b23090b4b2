"""The OpenAI-compatible endpoints over one loaded model, as a Starlette application."""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from danlu.console import complain
from danlu.errors import DanluError
from danlu.serve.line import Full, Job, Line
from danlu.serve.prompt import chat_prompt, room, text_prompt
from danlu.serve.requests import ApiError, Asked, ChatRequest, CompletionRequest, GenerationRequest, parse
from danlu.serve.text import Backend, Piece, Sampling, answer

BODY_LIMIT = 4 * 2**20  # bytes; far more text than a context holds
WAITING = 16  # requests that may wait their turn


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


CHAT = Shape(
    prefix="chatcmpl",
    whole_object="chat.completion",
    part_object="chat.completion.chunk",
    whole=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    part=lambda text: {"delta": {"content": text}},
    opening={"delta": {"role": "assistant", "content": ""}},
    closing={"delta": {}},
)
TEXT = Shape(
    prefix="cmpl",
    whole_object="text_completion",
    part_object="text_completion",
    whole=lambda text: {"text": text},
    part=lambda text: {"text": text},
    opening=None,
    closing={"text": ""},
)


@dataclass(frozen=True)
class Task:
    """A request made ready for the model.

    Attributes:
        shape: how the endpoint writes.
        choices: a prompt's token ids and how to sample, for every choice in order.
        prompt_tokens: each prompt counted once, however many choices are made of it.
        stops: strings that end a choice.
    """

    shape: Shape
    choices: list[tuple[list[int], Sampling]]
    prompt_tokens: int
    stops: list[str]

    def pieces(self, backend: Backend) -> Generator[tuple[int, Piece], None, None]:
        """One choice after the other: (its index, what one more token brought)."""
        for index, (prompt, sampling) in enumerate(self.choices):
            for piece in answer(backend, prompt, sampling, self.stops, joined=self.shape is TEXT):
                yield index, piece

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


class Api:
    """The endpoints.

    Args:
        backend: the model; used by one request at a time.
        waiting: requests that may wait for their turn before the next one gets a 503.
    """

    def __init__(self, backend: Backend, waiting: int) -> None:
        self.backend, self.line, self.made = backend, Line(waiting), int(time.time())

    async def health(self, request: Request) -> Response:
        """GET /health: the model is loaded and requests are taken."""
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        """GET /v1/models: the one model there is."""
        return JSONResponse({"object": "list", "data": [self._about()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{name}."""
        self._check_name(request.path_params["name"])
        return JSONResponse(self._about())

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        asked = await self._read(request, ChatRequest)
        messages = [message.plain() for message in asked.messages]
        prompt = await _refusing("messages", chat_prompt, self.backend.tokenizer, messages)
        return await self._answer(request, asked, self._task(asked, CHAT, [prompt], "messages"))

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        asked = await self._read(request, CompletionRequest)
        prompts = [await _refusing("prompt", text_prompt, self.backend.tokenizer, text) for text in asked.prompt]
        return await self._answer(request, asked, self._task(asked, TEXT, prompts, "prompt"))

    def _about(self) -> dict[str, Any]:
        about = {"id": self.backend.name, "object": "model", "created": self.made, "owned_by": "danlu"}
        return about | {"max_model_len": self.backend.context}

    def _check_name(self, name: str) -> None:
        if name != self.backend.name:
            message = f"there is no model {name!r} here; this server has {self.backend.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def _read(self, request: Request, kind: type[Asked]) -> Asked:
        asked = parse(kind, await _body(request))
        self._check_name(asked.model)
        if not self.backend.penalties:
            for name in ("frequency_penalty", "presence_penalty"):
                if getattr(asked, name):
                    raise ApiError(400, f"{name} needs a GGUF model; leave it out", param=name)
        return asked

    def _task(self, asked: GenerationRequest, shape: Shape, prompts: list[list[int]], param: str) -> Task:
        """Give every choice its seed and as many tokens as the context has left; raises ApiError 400 where none is."""
        seed = secrets.randbits(31) if asked.seed is None else asked.seed
        choices = []
        for prompt in prompts:
            try:
                most = min(room(self.backend, prompt), asked.limit or self.backend.context)
            except DanluError as error:
                raise ApiError(400, str(error), param=param, code="context_length_exceeded") from None
            choices += [(prompt, _sampling(asked, most, seed + number)) for number in range(asked.n or 1)]
        return Task(shape, choices, sum(map(len, prompts)), asked.stop or [])

    async def _answer(self, request: Request, asked: GenerationRequest, task: Task) -> Response:
        try:
            job = self.line.join(lambda: task.pieces(self.backend))
        except Full:
            message = "too many requests are waiting for this model; try again later"
            raise ApiError(503, message, kind="server_error", code="overloaded") from None
        if asked.stream:
            return EventStream(_events(asked, task, job), job)
        watcher = asyncio.create_task(_cancel_when_gone(request, job))
        try:
            return JSONResponse(await _whole(asked, task, job))
        finally:
            watcher.cancel()
            job.cancel()


def _sampling(asked: GenerationRequest, most: int, seed: int) -> Sampling:
    """The client's wishes, with OpenAI's defaults."""
    return Sampling(
        max_new_tokens=most,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        seed=seed % 2**31,
        frequency_penalty=asked.frequency_penalty or 0.0,
        presence_penalty=asked.presence_penalty or 0.0,
    )


async def _refusing(param: str, make: Callable[..., list[int]], *args: object) -> list[int]:
    """Make a prompt beside the event loop; what cannot be made is the client's mistake."""
    try:
        return await asyncio.to_thread(make, *args)
    except DanluError as error:
        raise ApiError(400, str(error), param=param) from None


async def _body(request: Request) -> bytes:
    """The request's body, refused where it is no JSON by its own word, or too long."""
    # A web page can send a form or plain text to any server its reader can reach, but JSON only with leave.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send the body with Content-Type: application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_LIMIT:
            raise ApiError(413, f"the body is longer than {BODY_LIMIT} bytes")
    return bytes(body)


async def _cancel_when_gone(request: Request, job: Pieces) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.cancel()


def _head(asked: GenerationRequest, shape: Shape, kind: str) -> dict[str, Any]:
    """What every object of one answer begins with."""
    ident = f"{shape.prefix}-{uuid.uuid4().hex}"
    return {"id": ident, "object": kind, "created": int(time.time()), "model": asked.model}


async def _whole(asked: GenerationRequest, task: Task, job: Pieces) -> dict[str, Any]:
    """The answer as one object."""
    texts: dict[int, str] = defaultdict(str)
    last: dict[int, Piece] = {}
    async for index, piece in job:
        texts[index] += piece.text
        last[index] = piece
    choices = [
        {"index": index, **task.shape.whole(texts[index]), "logprobs": None, "finish_reason": piece.finish}
        for index, piece in last.items()
    ]
    usage = task.usage(sum(piece.tokens for piece in last.values()))
    return _head(asked, task.shape, task.shape.whole_object) | {"choices": choices, "usage": usage}


async def _events(asked: GenerationRequest, task: Task, job: Pieces) -> AsyncIterator[str]:
    """The answer as server-sent events, one for every piece of text; an engine's error is the last event."""
    head = _head(asked, task.shape, task.shape.part_object)
    with_usage = asked.stream_options is not None and asked.stream_options.include_usage
    if with_usage:
        head["usage"] = None
    opened, made = set(), 0

    def event(index: int, body: dict[str, Any], finish: str | None = None) -> str:
        return _event(head | {"choices": [{"index": index, **body, "logprobs": None, "finish_reason": finish}]})

    try:
        async for index, piece in job:
            if index not in opened and task.shape.opening is not None:
                yield event(index, task.shape.opening)
            opened.add(index)
            if piece.text:
                yield event(index, task.shape.part(piece.text))
            if piece.finish:
                made += piece.tokens
                yield event(index, task.shape.closing, piece.finish)
    except Exception as error:
        yield _event(_failed(error).body())
        return
    if with_usage:
        yield _event(head | {"choices": [], "usage": task.usage(made)})
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _failed(error: Exception) -> ApiError:
    """What the client is told of a failure inside; the server's own output says the rest."""
    complain(f"an answer failed: {error!r}")
    return ApiError(500, "the model failed to answer; the server's output says why", kind="server_error")


class Guard:
    """Lets in who may ask: by token where one is set, else only who calls this machine by a loopback name.

    The second keeps out web pages whose server gave itself this machine's address (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health" and (error := self._refusal(Headers(scope=scope))):
            await _say_error(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, headers: Headers) -> ApiError | None:
        if self._token is None:
            if is_loopback(urlsplit(f"//{headers.get('host', '')}").hostname or ""):
                return None
            return ApiError(403, "this server answers loopback names only; start it with a token to use another")
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self._token.encode()):
            return None
        return ApiError(401, "send the server's token as Authorization: Bearer TOKEN", code="invalid_api_key")


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _say_error(error: ApiError) -> Response:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(error.status)
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # no such path, or not with this method
        error = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return _say_error(error if isinstance(error, ApiError) else _failed(error))


def make_app(backend: Backend, *, token: str | None = None, waiting: int = WAITING) -> Starlette:
    """The application over a loaded model.

    Args:
        backend: the model; closed with the application.
        token: what clients must send as `Authorization: Bearer`; None asks for none, and answers loopback names only.
        waiting: requests that may wait for their turn.
    """
    api = Api(backend, waiting)

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        yield
        api.line.close()
        backend.close()

    return Starlette(
        routes=[
            Route("/health", api.health),
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.model),
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/completions", api.complete, methods=["POST"]),
        ],
        middleware=[Middleware(Guard, token=token)],
        exception_handlers={ApiError: _on_error, HTTPException: _on_error, Exception: _on_error},
        lifespan=life,
    )
