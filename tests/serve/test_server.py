"""The official client and plain HTTP against a real server with a real model."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI

from danlu.errors import DanluError
from danlu.serve.backend import GGUFBackend
from danlu.serve.prompt import chat_prompt, text_prompt
from danlu.serve.server import listen, run_server
from danlu.serve.text import Sampling
from tests.serve.conftest import CONTEXT, Server

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
LONG = [{"role": "user", "content": "Write a very long story about a river, with many chapters."}]


def test_models_and_health(client: OpenAI, server: Server, backend: GGUFBackend) -> None:
    assert [model.id for model in client.models.list()] == [backend.name]
    assert client.models.retrieve(backend.name).id == backend.name
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_greedy_chat_is_the_engine_s_own(client: OpenAI, backend: GGUFBackend) -> None:
    made = client.chat.completions.create(model=backend.name, messages=QUESTION, temperature=0, max_tokens=24)
    prompt = chat_prompt(backend.tokenizer, QUESTION)
    ids = list(backend.generate(prompt, Sampling(max_new_tokens=24)))
    assert made.choices[0].message.content == backend.tokenizer.decode(ids)
    assert made.choices[0].message.role == "assistant"
    assert made.choices[0].finish_reason == ("length" if len(ids) == 24 else "stop")
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (len(prompt), len(ids))
    assert made.usage.total_tokens == len(prompt) + len(ids)


def test_greedy_completion_is_the_engine_s_own(client: OpenAI, backend: GGUFBackend) -> None:
    text = "Once upon a time"
    ids = list(backend.generate(text_prompt(backend.tokenizer, text), Sampling(max_new_tokens=16)))
    said = client.completions.create(model=backend.name, prompt=text, temperature=0)
    assert said.choices[0].text == backend.tokenizer.decode(ids)
    assert said.choices[0].finish_reason == "length"
    by_ids = client.completions.create(model=backend.name, prompt=backend.tokenizer.encode(text), temperature=0)
    assert by_ids.choices[0].text == said.choices[0].text


@pytest.mark.parametrize("content", ["Say hello.", "请用中文介绍北京，并用表情符号🙂。"])
def test_a_stream_is_the_same_answer(client: OpenAI, backend: GGUFBackend, content: str) -> None:
    messages = [{"role": "user", "content": content}]
    asked = {"model": backend.name, "messages": messages, "temperature": 0, "max_tokens": 32}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1
    assert len(chunks) > 8
    assert not any("\ufffd" in (c.choices[0].delta.content or "") for c in chunks if c.choices)


def test_a_streamed_completion(client: OpenAI, backend: GGUFBackend) -> None:
    asked = {"model": backend.name, "prompt": "1, 2, 3, 4,", "temperature": 0, "max_tokens": 8}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_stop_strings_end_and_are_not_shown(client: OpenAI, backend: GGUFBackend) -> None:
    asked = {"model": backend.name, "prompt": "1, 2, 3, 4,", "temperature": 0, "max_tokens": 30}
    free = client.completions.create(**asked).choices[0].text
    stop = free[9:13]  # starts and ends wherever tokens do
    cut = client.completions.create(**asked, stop=[stop, "never said"])
    assert cut.choices[0].text == free[: free.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    streamed = client.completions.create(**asked, stop=stop, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == cut.choices[0].text


def test_sampling_follows_the_seed(client: OpenAI, backend: GGUFBackend) -> None:
    def story(seed: int, **more: float) -> str:
        made = client.completions.create(
            model=backend.name, prompt="The", temperature=1.5, seed=seed, max_tokens=12, **more
        )
        return made.choices[0].text

    assert story(1) == story(1)
    assert story(1) != story(2)
    assert story(1, top_p=1e-6) == story(2, top_p=1e-6)  # only the likeliest token is left


def test_penalties_change_the_answer(client: OpenAI, backend: GGUFBackend) -> None:
    asked = {"model": backend.name, "prompt": "ha ha ha ha ha", "temperature": 0, "max_tokens": 16}
    free = client.completions.create(**asked).choices[0].text
    assert client.completions.create(**asked, frequency_penalty=2, presence_penalty=2).choices[0].text != free


def test_several_choices_and_prompts(client: OpenAI, backend: GGUFBackend) -> None:
    asked = {"model": backend.name, "max_tokens": 4, "temperature": 1.5, "seed": 5}
    made = client.completions.create(**asked, prompt=["Red", "Blue"], n=2)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    alone = client.completions.create(**asked, prompt="Blue", n=2)
    assert [c.text for c in made.choices[2:]] == [c.text for c in alone.choices]
    assert made.usage is not None
    assert made.usage.completion_tokens == 16
    assert made.usage.prompt_tokens == sum(len(backend.tokenizer.encode(text)) for text in ("Red", "Blue"))


def test_a_prompt_too_long_names_both_numbers(client: OpenAI, backend: GGUFBackend) -> None:
    words = "word " * 2 * CONTEXT
    count = len(backend.tokenizer.encode(words))
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=backend.name, prompt=words)
    assert str(CONTEXT) in caught.value.message
    assert str(count) in caught.value.message
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


def test_the_context_ends_an_answer(client: OpenAI, backend: GGUFBackend) -> None:
    prompt = backend.tokenizer.encode("word " * CONTEXT)[: CONTEXT - 3]
    made = client.completions.create(model=backend.name, prompt=prompt, max_tokens=100, temperature=0)
    assert made.usage is not None
    assert (made.usage.completion_tokens, made.choices[0].finish_reason) == (3, "length")


def test_errors_have_openai_s_shape(client: OpenAI, server: Server, backend: GGUFBackend) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-5", messages=QUESTION)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as caught_bad:
        client.chat.completions.create(model=backend.name, messages=QUESTION, logit_bias={"1": 5})
    assert caught_bad.value.param == "logit_bias"
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=backend.name, prompt=[backend.tokenizer.vocab_size])
    assert httpx.get(f"{server.url}/v1/models", headers={"Host": "[::1]:8000"}).status_code == 200
    url = f"{server.url}/v1/chat/completions"
    json_type = {"Content-Type": "application/json"}
    for answer, status in (
        (httpx.post(url, content=b"{", headers=json_type), 400),
        (httpx.post(url, content=b"{}", headers={"Content-Type": "text/plain"}), 415),
        (httpx.post(url, content=b" " * (5 * 2**20), headers=json_type), 413),
        (httpx.get(url), 405),
        (httpx.get(f"{server.url}/v2"), 404),
        (httpx.get(f"{server.url}/v1/models", headers={"Host": "evil.example"}), 403),
        (httpx.get(f"{server.url}/v1/models", headers={"Host": "[::1"}), 403),
    ):
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_requests_at_once_are_answered_in_turn(client: OpenAI, backend: GGUFBackend) -> None:
    def ask(number: int) -> str | None:
        messages = [{"role": "user", "content": f"Count up from {number}."}]
        made = client.chat.completions.create(model=backend.name, messages=messages, temperature=0, max_tokens=12)
        return made.choices[0].message.content

    alone = [ask(number) for number in range(3)]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ask, range(3))) == alone


def test_a_full_line_refuses_and_a_client_that_leaves_frees_its_place(client: OpenAI, backend: GGUFBackend) -> None:
    asked = {"model": backend.name, "messages": LONG, "temperature": 0, "n": 8}  # minutes of work, if nobody stops it
    streams = [client.chat.completions.create(**asked, stream=True) for _ in range(3)]  # one at work, two waiting
    next(iter(streams[0]))
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(**asked, max_tokens=1)
    assert caught.value.status_code == 503
    for stream in streams:
        stream.close()
    started = time.monotonic()
    while True:
        try:
            client.chat.completions.create(**asked, max_tokens=1)
            break
        except openai.InternalServerError:
            assert time.monotonic() - started < 10, "answers nobody reads go on"
            time.sleep(0.02)


def test_an_unstreamed_answer_stops_when_its_client_leaves(
    client: OpenAI, server: Server, backend: GGUFBackend
) -> None:
    body = json.dumps({"model": backend.name, "messages": LONG, "temperature": 0, "n": 8})
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/v1/chat/completions",
            content=body,
            headers={"Content-Type": "application/json"},
            timeout=httpx.Timeout(5, read=0.3),
        )
    started = time.monotonic()
    client.chat.completions.create(model=backend.name, messages=QUESTION, max_tokens=1)
    assert time.monotonic() - started < 10


def test_a_token_is_checked_and_sigterm_ends_cleanly(gguf: Path) -> None:
    server = Server(gguf, DANLU_TOKEN="丹炉-secret")
    url = f"{server.url}/v1/models"
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert httpx.get(url, headers={"Authorization": "丹炉-secret".encode()}).status_code == 401
    right = {"Authorization": "Bearer 丹炉-secret".encode(), "Host": "evil.example"}
    assert httpx.get(url, headers=right).status_code == 200
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert server.end(signal.SIGTERM) == 0
    assert "ended" in server.said[-1]


def test_ctrl_c_lets_an_answer_finish(gguf: Path) -> None:
    server = Server(gguf)
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        asked = {"model": gguf.stem, "messages": LONG, "temperature": 0, "max_tokens": 24}
        stream = iter(client.chat.completions.create(**asked, stream=True))
        next(stream)
        ended = threading.Thread(target=server.end, args=(signal.SIGINT,))
        ended.start()
        assert list(stream)[-1].choices[0].finish_reason == "length"
        ended.join()
    assert server.process.returncode == 0


def test_answers_that_outlast_the_grace_end_with_an_error(gguf: Path) -> None:
    server = Server(gguf, grace=0.2)
    asked = {"model": gguf.stem, "messages": LONG, "temperature": 0, "n": 8}
    url = f"{server.url}/v1/chat/completions"
    with ThreadPoolExecutor(3) as pool:
        streamed = pool.submit(httpx.post, url, json=asked | {"stream": True}, timeout=30)
        whole = [pool.submit(httpx.post, url, json=asked, timeout=30) for _ in range(2)]
        time.sleep(1)
        assert server.end(signal.SIGTERM) == 0
        assert '"code":"ended"' in streamed.result().text.split("\n\n")[-2]
        assert [answer.result().status_code for answer in whole] == [503, 503]
    assert not any("Traceback" in line for line in server.said)


def test_a_token_is_required_off_loopback(monkeypatch: pytest.MonkeyPatch, gguf: Path) -> None:
    monkeypatch.delenv("DANLU_TOKEN", raising=False)
    for host in ("0.0.0.0", "::"):
        with pytest.raises(DanluError, match="token is needed"):
            run_server(gguf, host=host, port=0)
    listen("0.0.0.0", 0, "a token").close()


def test_a_busy_port_and_a_foreign_address(gguf: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(DanluError, match="in use"):
        run_server(gguf, port=taken.getsockname()[1])
    with pytest.raises(DanluError, match="no address"):
        run_server(gguf, host="no.such.host.invalid")
    with pytest.raises(DanluError, match="cannot listen"):
        listen("192.0.2.1", 0, "a token")
    with pytest.raises(DanluError, match="is no port"):
        listen("127.0.0.1", 99999, None)
