"""Every wrong or unknown parameter is refused by name, before any work."""

from __future__ import annotations

import json
from typing import Any

import pytest

from danlu.serve.requests import ApiError, ChatRequest, CompletionRequest, parse

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}


def refused(kind: type[ChatRequest] | type[CompletionRequest], body: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(kind, body)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": True}, "n"),
        ({"n": 99}, "n"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"seed": "a"}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"logit_bias": {"5": 100}}, "logit_bias"),
        ({"logprobs": 5}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"echo": True}, "echo"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_k": 5}, "top_k"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x", "name": "bob"}]}, "messages.0.name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"stream": True, "stream_options": {"more": 1}}, "stream_options.more"),
    ],
)
def test_wrong_chat_parameters_are_named(change: dict[str, Any], param: str) -> None:
    assert refused(ChatRequest, json.dumps(CHAT | change).encode()).param == param


@pytest.mark.parametrize("prompt", [[], [True], 3, None, [1, "a"], [[1.5]], {}])
def test_wrong_prompts(prompt: object) -> None:
    assert refused(CompletionRequest, json.dumps(TEXT | {"prompt": prompt}).encode()).param == "prompt"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"model": "\xff"}', b'{"a": "\\ud800"}', b"[" * 100_000])
def test_what_is_no_request(body: bytes) -> None:
    assert refused(ChatRequest, body).param is None


@pytest.mark.parametrize(
    ("change", "param"),
    [({"logprobs": True}, "logprobs"), ({"logprobs": -1}, "logprobs"), ({"logprobs": 1025}, "logprobs"),
     ({"top_logprobs": 2}, "top_logprobs"), ({"echo": 1}, "echo"), ({"max_tokens": -1}, "max_tokens")],
)  # fmt: skip
def test_wrong_completion_parameters_are_named(change: dict[str, Any], param: str) -> None:
    assert refused(CompletionRequest, json.dumps(TEXT | change).encode()).param == param


def test_what_needs_something_else_is_refused_without_it() -> None:
    assert "needs logprobs" in str(refused(ChatRequest, json.dumps(CHAT | {"top_logprobs": 3}).encode()))
    assert "echo: true" in str(refused(CompletionRequest, json.dumps(TEXT | {"max_tokens": 0}).encode()))
    for kind, body in ((ChatRequest, CHAT), (CompletionRequest, TEXT)):
        asked = json.dumps(body | {"return_tokens_as_token_ids": True}).encode()
        assert "needs logprobs" in str(refused(kind, asked))


def test_two_limits_or_options_without_a_stream_are_refused() -> None:
    refused(ChatRequest, json.dumps(CHAT | {"max_tokens": 3, "max_completion_tokens": 4}).encode())
    refused(ChatRequest, json.dumps(CHAT | {"stream_options": {"include_usage": True}}).encode())


def test_nan_is_no_temperature() -> None:
    assert (
        refused(ChatRequest, b'{"model": "m", "prompt": "x", "messages": [], "temperature": NaN}').param
        == "temperature"
    )


def test_what_asks_for_nothing_special_is_taken() -> None:
    nothing = {"user": "u", "logprobs": False, "tools": [], "logit_bias": {}, "response_format": {"type": "text"}}
    taken = parse(ChatRequest, json.dumps(CHAT | nothing | {"stop": "END", "temperature": 1}).encode())
    assert (taken.stop, taken.temperature, taken.limit, taken.ranking) == (["END"], 1.0, None, None)
    plain = parse(CompletionRequest, json.dumps(TEXT | {"logprobs": False, "echo": False}).encode())
    assert (plain.ranking, plain.echoing) == (None, False)


def test_content_parts_and_the_developer_role() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = {"role": "developer", "content": parts, "refusal": None, "tool_calls": None}
    taken = parse(ChatRequest, json.dumps(CHAT | {"messages": [message]}).encode())
    assert taken.messages[0].plain() == {"role": "system", "content": "a\nb"}


@pytest.mark.parametrize(
    ("prompt", "read"), [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])]
)
def test_four_kinds_of_prompt(prompt: object, read: object) -> None:
    taken = parse(CompletionRequest, json.dumps(TEXT | {"prompt": prompt}).encode())
    assert (taken.prompt, taken.limit) == (read, 16)
