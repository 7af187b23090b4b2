"""What a client may ask, in OpenAI's words (platform.openai.com/docs/api-reference); the rest is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

MOST_CHOICES = 8
MOST_PROMPTS = 64
MOST_STOPS = 16
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
MOST_CHAT_RANKED = 20  # OpenAI's limit for a chat's top_logprobs
MOST_RANKED = 1024  # logprobs of /v1/completions: a teacher may be asked for more than OpenAI's 5

# Parameters that do not change the answer, and values of others that ask for nothing special.
HARMLESS = frozenset(
    {
        "include_obfuscation",
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "safety_identifier",
        "service_tier",
        "user",
    }
)
NEUTRAL: dict[str, tuple[object, ...]] = {
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "suffix": ("",),
}


class ApiError(Exception):
    """An error the client is told, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def _unsupported(name: str, value: object) -> bool:
    if value is None or name in HARMLESS:
        return False
    return not any(value == fine and type(value) is type(fine) for fine in NEUTRAL.get(name, ()))


def _off_is_none(value: object) -> object:
    """`logprobs: false` asks for none, also where a number is meant."""
    return None if value is False else value


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _is_prompt(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(type(item) is int for item in value))


def _as_prompts(value: object) -> object:
    """A text, a list of token ids, or a list of either -> a list."""
    if value and _is_prompt(value):
        return [value]
    if not isinstance(value, list) or not all(_is_prompt(item) for item in value):
        raise PydanticCustomError("prompt", "write a text, a list of token ids, or a list of these")
    return value


def _join_parts(value: object) -> object:
    """A message's content as one text; the parts of a list are lines, as other servers have it."""
    if not isinstance(value, list):
        return value
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise PydanticCustomError("part", "this model reads text parts only, not {kind}", {"kind": repr(kind)})
    return "\n".join(part["text"] for part in value)


class _Asked(BaseModel):
    """Strict about types, and about every name it does not know."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _refuse_what_would_be_ignored(self) -> _Asked:
        for name, value in (self.model_extra or {}).items():
            if _unsupported(name, value):
                raise PydanticCustomError("unsupported", "{name} is not supported here; leave it out", {"name": name})
        return self


class Message(_Asked):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_join_parts)]

    def plain(self) -> dict[str, str]:
        """For the chat template, which knows `system` and not OpenAI's newer name for it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class StreamOptions(_Asked):
    """What a stream shall hold besides the answer."""

    include_usage: bool = False


class GenerationRequest(_Asked):
    """What /v1/chat/completions and /v1/completions have in common."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]] | None, BeforeValidator(_as_list), Field(max_length=MOST_STOPS)
    ] = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_tokens_as_token_ids: bool | None = None

    @model_validator(mode="after")
    def _options_belong_to_something(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options needs stream: true")
        if self.return_tokens_as_token_ids and self.ranking is None:
            raise PydanticCustomError("as_ids", "return_tokens_as_token_ids needs logprobs")
        return self

    @property
    def limit(self) -> int | None:
        """The most tokens an answer may have, where the client set it."""
        return self.max_tokens

    @property
    def ranking(self) -> int | None:
        """Against how many of the likeliest tokens each one is rated; None for no `logprobs`."""
        return None

    @property
    def echoing(self) -> bool:
        """Whether the answer begins with the prompt."""
        return False


class ChatRequest(GenerationRequest):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_CHAT_RANKED)] | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise PydanticCustomError("limit", "set max_tokens or max_completion_tokens, not both")
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs: true")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def ranking(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    """The body of /v1/completions."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_as_prompts), Field(min_length=1, max_length=MOST_PROMPTS)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[
        Annotated[int, Field(ge=0, le=MOST_RANKED)] | None,
        BeforeValidator(_off_is_none),
    ] = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _something_to_answer(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("max_tokens", "max_tokens: 0 leaves nothing to answer without echo: true")
        return self

    @property
    def limit(self) -> int | None:
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def ranking(self) -> int | None:
        return self.logprobs

    @property
    def echoing(self) -> bool:
        return bool(self.echo)


Asked = TypeVar("Asked", bound=GenerationRequest)


def parse(kind: type[Asked], body: bytes) -> Asked:
    """Read a request's body; raises ApiError 400 naming the parameter that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=True)[0]
        if first["type"] == "json_invalid":
            raise ApiError(400, f"the body is not JSON: {first['ctx']['error']}") from None
        named = first.get("ctx", {}).get("name")
        path = [str(step) for step in first["loc"]] + ([named] if named else [])
        param = ".".join(path) or None
        raise ApiError(400, f"{param}: {first['msg']}" if param else first["msg"], param=param) from None
