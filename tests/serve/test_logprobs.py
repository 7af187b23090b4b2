"""What the model thought of each token is what its own logits say, in OpenAI's shape, of answers and of prompts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
from openai import OpenAI
from starlette.testclient import TestClient

from danlu.data.corpus_settings import VocabularySettings
from danlu.data.token_bytes import TokenBytes
from danlu.data.vocabulary import learn_vocabulary
from danlu.model.checkpoint import save_checkpoint
from danlu.model.config import ModelConfig
from danlu.model.transformer import Decoder
from danlu.serve.app import make_app
from danlu.serve.backend import GGUFBackend, TorchBackend
from danlu.serve.prompt import chat_prompt
from danlu.serve.ranked import LOWEST, Names, log_softmax, text_logprobs
from danlu.serve.ranked import rank as ranking
from danlu.serve.text import Sampling, answer
from tests.serve.conftest import CONTEXT

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def engine_s_own(backend: GGUFBackend, ids: list[int], first: int) -> np.ndarray:
    """Log probabilities behind each token from `first` on, [n, vocab]."""
    wanted = np.arange(len(ids)) >= first
    return np.concatenate([log_softmax(part) for _, part in backend._engine.scored(np.array(ids), wanted)])


def test_a_chat_s_logprobs_are_the_engine_s(client: OpenAI, backend: GGUFBackend) -> None:
    asked = {"model": backend.name, "messages": QUESTION, "max_tokens": 12, "logprobs": True, "top_logprobs": 4}
    made = client.chat.completions.create(**asked, temperature=0).choices[0]
    assert made.logprobs is not None and made.logprobs.content is not None
    prompt = chat_prompt(backend.tokenizer, QUESTION)
    ids = list(backend.generate(prompt, Sampling(max_new_tokens=12)))
    assert bytes(byte for one in made.logprobs.content for byte in one.bytes or ()).decode() == made.message.content
    known = engine_s_own(backend, prompt + ids[:-1], len(prompt) - 1)
    assert len(known) == len(made.logprobs.content) == len(ids)
    for row, one, token in zip(known, made.logprobs.content, ids, strict=True):
        assert one.logprob == pytest.approx(row[token], abs=2e-3)  # one token a step or many: other sums
        best = np.argsort(-row)[:4]
        assert [other.logprob for other in one.top_logprobs] == pytest.approx(row[best].tolist(), abs=2e-3)
        assert one.top_logprobs[0].token == one.token  # temperature 0 takes the likeliest
        assert one.token == backend.tokenizer.decode([token])


def test_temperature_is_not_in_them_and_a_stream_has_the_same(client: OpenAI, backend: GGUFBackend) -> None:
    messages = [{"role": "user", "content": "请用表情符号🙂介绍北京。"}]
    asked = {"model": backend.name, "messages": messages, "max_tokens": 16, "logprobs": True, "seed": 3}
    whole = client.chat.completions.create(**asked, temperature=1.5, top_logprobs=2).choices[0].logprobs
    chunks = list(client.chat.completions.create(**asked, temperature=1.5, top_logprobs=2, stream=True))
    assert whole is not None and whole.content is not None
    parts = [one for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content or ()]
    assert [one.token for one in parts] == [one.token for one in whole.content]
    for part, one in zip(parts, whole.content, strict=True):
        assert part.logprob == pytest.approx(one.logprob, abs=2e-3)
        assert all(other.logprob <= 0 for other in part.top_logprobs) and len(part.top_logprobs) == 2
    # The first token's chance at temperature 1, not at 1.5.
    first = engine_s_own(backend, chat_prompt(backend.tokenizer, messages), 0)[-1]
    assert whole.content[0].top_logprobs[0].logprob == pytest.approx(first.max(), abs=2e-3)


@pytest.mark.parametrize("text", ["The furnace turns lead into gold.", "丹炉里的火🙂，烧了七七四十九天。"])
def test_a_prompt_is_scored(client: OpenAI, backend: GGUFBackend, text: str) -> None:
    ids = backend.tokenizer.encode(text)
    asked = {"model": backend.name, "max_tokens": 0, "echo": True, "logprobs": 3}
    made = client.completions.create(**asked, prompt=text)
    said = made.choices[0].logprobs
    assert made.choices[0].text == text and made.choices[0].finish_reason == "length"
    assert made.usage is not None and (made.usage.prompt_tokens, made.usage.completion_tokens) == (len(ids), 0)
    assert said is not None and said.tokens and said.token_logprobs and said.top_logprobs and said.text_offset
    assert said.token_logprobs[0] is None and said.top_logprobs[0] is None
    known = engine_s_own(backend, ids, 0)[:-1]
    own = [row[token] for row, token in zip(known, ids[1:], strict=True)]
    assert said.token_logprobs[1:] == pytest.approx(own, abs=2e-3)
    by_ids = client.completions.create(**asked, prompt=[ids], extra_body={"return_tokens_as_token_ids": True})
    named = by_ids.choices[0].logprobs
    assert named is not None and named.tokens == [f"token_id:{token}" for token in ids] and named.top_logprobs
    for row, tops, token in zip(known, named.top_logprobs[1:], ids[1:], strict=True):
        best = {f"token_id:{one}" for one in np.argsort(-row)[:3]}
        assert best | {f"token_id:{token}"} == set(tops)
    places = [text[start:end] for start, end in zip(said.text_offset, [*said.text_offset[1:], len(text)], strict=True)]
    assert "".join(places) == text
    whole = [(token, part) for token, part in zip(said.tokens, places, strict=True) if not token.startswith("bytes:")]
    assert all(token == part for token, part in whole if part)


def test_an_echo_goes_on_with_the_answer(client: OpenAI, backend: GGUFBackend) -> None:
    asked = {"model": backend.name, "prompt": "1, 2, 3, 4,", "temperature": 0, "max_tokens": 5}
    plain = client.completions.create(**asked).choices[0]
    both = client.completions.create(**asked, echo=True, logprobs=0)
    said = both.choices[0].logprobs
    assert both.choices[0].text == asked["prompt"] + plain.text
    assert said is not None and said.tokens and said.text_offset and "".join(said.tokens) == both.choices[0].text
    assert [both.choices[0].text[place] for place in said.text_offset] == [token[0] for token in said.tokens]
    streamed = list(client.completions.create(**asked, echo=True, logprobs=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == both.choices[0].text
    tokens = [token for chunk in streamed if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.tokens]
    assert tokens == said.tokens


def test_what_would_be_too_much_is_refused(client: OpenAI, backend: GGUFBackend) -> None:
    asked = {"model": backend.name, "echo": True, "max_tokens": 0}
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**asked, prompt=[[1] * 100] * 20, logprobs=1024)
    assert caught.value.param == "logprobs" and "ask for fewer" in caught.value.message
    whole = client.completions.create(**asked, prompt=[[1] * CONTEXT], logprobs=1)  # no room for an answer is needed
    assert whole.usage is not None and whole.usage.prompt_tokens == CONTEXT
    with pytest.raises(openai.BadRequestError, match=f"context holds {CONTEXT}"):
        client.completions.create(**asked, prompt=[[1] * (CONTEXT + 1)], logprobs=1)


def test_pytorch_says_what_its_own_logits_say(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"layers": 2, "heads": 2, "kv_heads": 1, "head_width": 8, "feedforward_width": 32, "width": 16}
    tokenizer = learn_vocabulary(VocabularySettings(kind="bytes"), [])
    model = Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, context=96, tied=True, **shape)).eval()
    save_checkpoint(model, tokenizer, tmp_path / "model")
    prompt = tokenizer.encode("丹炉 and gold, " * 4)  # more tokens than are scored at once
    with TestClient(make_app(TorchBackend(tmp_path / "model", "m")), base_url="http://localhost") as asking:
        asked = {"model": "m", "prompt": prompt, "echo": True, "max_tokens": 3, "logprobs": 257, "temperature": 0,
                 "return_tokens_as_token_ids": True}  # fmt: skip
        said = asking.post("/v1/completions", json=asked).json()["choices"][0]["logprobs"]
    ids = [int(token.removeprefix("token_id:")) for token in said["tokens"]]
    assert ids[: len(prompt)] == prompt and len(ids) == len(prompt) + 3
    with torch.inference_mode():
        known = model.logits(model(torch.tensor([ids])))[0].log_softmax(-1)
    for row, tops, token in zip(known, said["top_logprobs"][1:], ids[1:], strict=False):
        assert len(tops) == tokenizer.vocab_size
        assert tops[f"token_id:{token}"] == pytest.approx(float(row[token]), abs=1e-5)
        assert math.fsum(map(math.exp, tops.values())) == pytest.approx(1)


def test_bytes_of_tokens_add_up_to_any_text(backend: GGUFBackend) -> None:
    text = "炼大模型👩‍🔬 naïve  café\n\t龘𠮷<|im_end|>x"
    known = TokenBytes(backend.tokenizer)
    ids = backend.tokenizer.encode(text)
    assert b"".join(known.of(token) or b"" for token in ids).decode() == text
    assert [known.ids[made] for token in ids if (made := known.of(token)) is not None] == ids
    assert known.of(backend.tokenizer.vocab_size) is None
    assert all(known.of(token) == backend._engine.detokenize([token], special=True) for token in range(2000))


def test_parts_of_characters_and_the_impossible_can_be_written(backend: GGUFBackend) -> None:
    half = backend.tokenizer.encode("龘")[0]
    logits = np.zeros((1, backend.tokenizer.vocab_size), np.float32)
    logits[0, 5] = -np.inf
    [one] = ranking(logits, [5], [0], 0)
    assert one.logprob == LOWEST
    written = text_logprobs(ranking(logits, [half], [0], 0), Names(TokenBytes(backend.tokenizer)))
    assert written["tokens"][0].startswith(r"bytes:\xe9") and list(written["top_logprobs"][0]) == written["tokens"]


def test_tokens_are_not_rated_where_nobody_asks(backend: GGUFBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GGUFBackend, "logits", None)
    pieces = list(answer(backend, backend.tokenizer.encode("Hi"), Sampling(max_new_tokens=2)))
    assert not any(piece.ranked for piece in pieces)
