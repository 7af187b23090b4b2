"""The OpenAI-compatible endpoints over one loaded model, as a Starlette application."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from danlu.data.token_bytes import TokenBytes
from danlu.errors import DanluError
from danlu.serve.guard import Guard
from danlu.serve.line import Full, Line
from danlu.serve.prompt import chat_prompt, room, text_prompt, with_system
from danlu.serve.ranked import Names
from danlu.serve.replies import (
    CHAT,
    TEXT,
    EventStream,
    Pieces,
    Shape,
    Task,
    error_response,
    event_stream,
    failure,
    whole_answer,
)
from danlu.serve.requests import ApiError, Asked, ChatRequest, CompletionRequest, GenerationRequest, parse
from danlu.serve.text import Backend, Sampling

BODY_LIMIT = 4 * 2**20  # bytes; far more text than a context holds
WAITING = 16  # requests that may wait their turn
MOST_RATINGS = 2**20  # tokens named in the logprobs of one answer: 30 MB of JSON
COLDEST = 1e-5  # below this temperature only the likeliest token is ever drawn, and dividing by it overflows


class Api:
    """The endpoints.

    Args:
        backend: the model; used by one request at a time.
        waiting: requests that may wait for their turn before the next one gets a 503.
    """

    def __init__(self, backend: Backend, waiting: int) -> None:
        self.backend, self.line, self.made = backend, Line(waiting), int(time.time())
        self.token_bytes = TokenBytes(backend.tokenizer)

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
        messages = with_system([message.plain() for message in asked.messages], self.backend.system)
        prompt = await _refusing("messages", chat_prompt, self.backend.tokenizer, messages)
        return await self._answer(request, asked, self._task(asked, CHAT, [prompt], "messages"))

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        asked = await self._read(request, CompletionRequest)
        prompts = [await _refusing("prompt", text_prompt, self.backend.tokenizer, text) for text in asked.prompt]
        return await self._answer(request, asked, self._task(asked, TEXT, prompts, "prompt"))

    def end(self) -> None:
        """End every answer, and tell its client."""
        self.line.end(ApiError(503, "the server has ended before the answer", kind="server_error", code="ended"))

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
            limit = self.backend.context if asked.limit is None else asked.limit
            try:
                most = min(room(self.backend, prompt, answer=min(limit, 1)), limit)
            except DanluError as error:
                raise ApiError(400, str(error), param=param, code="context_length_exceeded") from None
            choices += [(prompt, _sampling(asked, most, seed + number)) for number in range(asked.n or 1)]
        _check_ratings(asked, choices)
        names = Names(self.token_bytes, bool(asked.return_tokens_as_token_ids))
        return Task(shape, choices, sum(map(len, prompts)), asked.stop or [], asked.ranking, asked.echoing, names)

    async def _answer(self, request: Request, asked: GenerationRequest, task: Task) -> Response:
        try:
            job = self.line.join(lambda: task.pieces(self.backend))
        except Full:
            message = "too many requests are waiting for this model; try again later"
            raise ApiError(503, message, kind="server_error", code="overloaded") from None
        if asked.stream:
            return EventStream(event_stream(asked, task, job), job)
        watcher = asyncio.create_task(_cancel_when_gone(request, job))
        try:
            return JSONResponse(await whole_answer(asked, task, job))
        finally:
            watcher.cancel()
            job.cancel()


def _sampling(asked: GenerationRequest, most: int, seed: int) -> Sampling:
    """The client's wishes, with OpenAI's defaults."""
    temperature = 1.0 if asked.temperature is None else asked.temperature
    return Sampling(
        max_new_tokens=most,
        temperature=0.0 if temperature < COLDEST else temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        seed=seed % 2**31,
        frequency_penalty=asked.frequency_penalty or 0.0,
        presence_penalty=asked.presence_penalty or 0.0,
        rated=asked.ranking is not None,
    )


def _check_ratings(asked: GenerationRequest, choices: list[tuple[list[int], Sampling]]) -> None:
    """Refuse an answer whose `logprobs` would fill the memory of both sides."""
    if asked.ranking is None:
        return
    tokens = sum(sampling.max_new_tokens + len(prompt) * asked.echoing for prompt, sampling in choices)
    if tokens * (asked.ranking + 1) > MOST_RATINGS:
        message = f"{asked.ranking} alternatives to each of up to {tokens:,} tokens are more than {MOST_RATINGS:,}"
        raise ApiError(400, f"{message}; ask for fewer, or for fewer prompts at once", param="logprobs")


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


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # no such path, or not with this method
        error = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return error_response(failure(error))


def make_app(backend: Backend, *, token: str | None = None, waiting: int = WAITING) -> Starlette:
    """The application over a loaded model; its `state.api` is the Api.

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

    app = Starlette(
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
    app.state.api = api
    return app
