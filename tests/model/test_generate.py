from __future__ import annotations

from pathlib import Path

import pytest
import torch

from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint
from danlu.model.config import ModelConfig
from danlu.model.generate import _sample, generate, generate_batch
from danlu.model.transformer import Decoder

SHAPE = {"vocab_size": 97, "width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 16}
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [5, 6, 7]]


@pytest.fixture(scope="module", params=[None, 6], ids=["full", "window"])
def model(request: pytest.FixtureRequest) -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(**SHAPE, feedforward_width=128, context=64, sliding_window=request.param)
    made = Decoder(config)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3)
    return made


def uncached(model: Decoder, prompt: list[int], count: int) -> list[int]:
    """The slow way: everything again for every token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model.logits(model(torch.tensor([ids])))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_the_cache_changes_nothing(model: Decoder) -> None:
    for prompt in PROMPTS:
        assert list(generate(model, prompt, max_new_tokens=30)) == uncached(model, prompt, 30)


def test_a_batch_of_ragged_prompts_equals_each_alone(model: Decoder) -> None:
    alone = [list(generate(model, prompt, max_new_tokens=30)) for prompt in PROMPTS]
    assert generate_batch(model, PROMPTS, max_new_tokens=30) == alone
    # Rows that end at different times: the others go on as if nothing had happened.
    stops = frozenset({alone[0][4], alone[2][9]})
    stopped = [list(generate(model, prompt, max_new_tokens=30, stop_ids=stops)) for prompt in PROMPTS]
    assert len({len(row) for row in stopped}) > 1
    assert generate_batch(model, PROMPTS, max_new_tokens=30, stop_ids=stops) == stopped


def test_stop_ids_and_limits_end_an_answer(model: Decoder) -> None:
    answer = list(generate(model, [5, 6, 7], max_new_tokens=12))
    first = answer.index(answer[5])
    assert list(generate(model, [5, 6, 7], max_new_tokens=12, stop_ids=frozenset({answer[5]}))) == answer[:first]
    assert list(generate(model, [5] * 60, max_new_tokens=100)) == uncached(model, [5] * 60, 4)
    assert generate_batch(model, [], max_new_tokens=3) == []
    assert generate_batch(model, [[1], [2]], max_new_tokens=0) == [[], []]


def test_sampling_is_repeatable_and_follows_the_chances(model: Decoder) -> None:
    def drawn(seed: int, **how: float) -> list[int]:
        return list(generate(model, [5, 6, 7], max_new_tokens=20, temperature=1.5, seed=seed, **how))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert drawn(3, top_k=1) == drawn(4, top_p=1e-6) == list(generate(model, [5, 6, 7], max_new_tokens=20))

    chances = torch.tensor([0.05, 0.5, 0.15, 0.3])
    generator = torch.Generator().manual_seed(0)
    for top_k, top_p, kept in ((0, 1.0, [0, 1, 2, 3]), (2, 1.0, [1, 3]), (0, 0.6, [1, 3]), (3, 0.9, [1, 2, 3])):
        counts = torch.zeros(4)
        for _ in range(2000):
            counts[_sample(chances.log(), top_k, top_p, generator)] += 1
        expected = torch.zeros(4).index_copy(0, torch.tensor(kept), chances[kept] / chances[kept].sum())
        assert torch.allclose(counts / 2000, expected, atol=0.04), (top_k, top_p)


def test_wrong_calls_are_refused_at_the_call(model: Decoder) -> None:
    with pytest.raises(DanluError, match="prompt is empty"):
        generate(model, [], max_new_tokens=1)
    with pytest.raises(DanluError, match="64 tokens leaves no room in the model's context of 64"):
        generate(model, [1] * 64, max_new_tokens=1)
    with pytest.raises(DanluError, match="60 tokens and an answer of 5 are more than the model's context of 64"):
        generate_batch(model, [[1], [1] * 60], max_new_tokens=5)
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}):
        with pytest.raises(DanluError, match="they must be"):
            generate(model, [1], max_new_tokens=1, **wrong)


def test_generation_leaves_no_inference_mode_behind(model: Decoder) -> None:
    tokens = generate(model, [5, 6, 7], max_new_tokens=3)
    next(tokens)
    assert not torch.is_inference_mode_enabled()
    assert torch.zeros(1, requires_grad=True).mul(2).requires_grad


def test_smollm2_answers(smollm2: Path) -> None:
    checkpoint = Checkpoint.open(smollm2)
    model, tokenizer = checkpoint.load(), checkpoint.tokenizer
    questions = ["What is the capital of France?", "What is 2+2? Answer with one number."]
    prompts = [tokenizer.encode(tokenizer.render([{"role": "user", "content": q}], True)) for q in questions]
    answers = generate_batch(model, prompts, max_new_tokens=10, stop_ids=tokenizer.stop_ids)
    assert tokenizer.decode(answers[0]) == "The capital of France is Paris."
    assert answers[1] == list(generate(model, prompts[1], max_new_tokens=10, stop_ids=tokenizer.stop_ids))
