"""Answers from a set: always one of it, whichever way it is searched."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from danlu.errors import DanluError
from danlu.model.allowed import Allowed
from danlu.model.beam import beam_search
from danlu.model.generate import generate, generate_batch
from danlu.model.sampling import Choice
from danlu.model.transformer import Decoder, EncoderDecoder
from tests.model.test_generate import lively, made
from tests.model.tiny import tiny_tokenizer

# [10] and [10, 11] begin others; all after [30] is one way.
ANSWERS = [[10], [10, 11], [10, 11, 12], [10, 20], [20, 21, 22], [20, 21, 23], [30, 31, 32, 33]]
STOPS = frozenset({2, 3, 200})  # the last is none of the model's
PROMPTS = [[5, 6, 7], [8], [40, 41, 42, 43, 44], [9, 9], [50], [51], [52], [53]]


@pytest.fixture(scope="module")
def model() -> Decoder:
    return made()


def log_chances(model: Decoder | EncoderDecoder, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Of the token after each beginning of an answer, fp32 [len(answer) + 1, vocab]."""
    with torch.no_grad():
        if isinstance(model, Decoder):
            hidden = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 :]
        else:
            hidden = model(torch.tensor([prompt]), torch.tensor([[model.config.start, *answer]]))[0]
        return model.logits(hidden).log_softmax(-1)


def test_greedy_search_takes_the_likeliest_token_of_those_allowed(model: Decoder) -> None:
    found = generate_batch(model, PROMPTS, max_new_tokens=5, stop_ids=STOPS, allowed=Allowed(ANSWERS))
    for prompt, answer in zip(PROMPTS, found, strict=True):
        expected: list[int] = []
        while True:
            after = {one[len(expected)] for one in ANSWERS if one[: len(expected)] == expected and one != expected}
            if expected in ANSWERS:
                after |= {2, 3} if after else set()
            if not after:
                break
            scores = log_chances(model, prompt, expected)[-1]
            token = max(after, key=lambda one: scores[one].item())
            if token in STOPS:
                break
            expected.append(token)
        assert answer == expected
        assert list(generate(model, prompt, max_new_tokens=4, stop_ids=STOPS, allowed=Allowed(ANSWERS))) == answer
    assert len({tuple(answer) for answer in found}) > 2


def test_every_answer_is_one_of_the_set_and_every_one_can_come(model: Decoder) -> None:
    found: set[tuple[int, ...]] = set()
    for seed in range(40):
        choice = Choice(temperature=30.0, top_p=0.999, seed=seed)
        drawn = generate_batch(
            model, PROMPTS, max_new_tokens=5, stop_ids=STOPS, choice=choice, allowed=Allowed(ANSWERS)
        )
        found |= {tuple(answer) for answer in drawn}
    assert found == {tuple(answer) for answer in ANSWERS}


@pytest.mark.parametrize("case", ["llama", "flan-t5"])
def test_a_wide_beam_finds_the_best_of_the_set(case: str, tmp_path: Path) -> None:
    model = lively(case, tmp_path).ours.eval()
    assert isinstance(model, Decoder | EncoderDecoder)
    for length_penalty in (0.0, 1.0):
        found = beam_search(
            model,
            PROMPTS,
            beams=8,
            max_new_tokens=4,
            stop_ids=STOPS,
            allowed=Allowed(ANSWERS),
            length_penalty=length_penalty,
        )
        for prompt, answer in zip(PROMPTS, found, strict=True):
            scores = []
            for one in ANSWERS:
                steps = log_chances(model, prompt, one)
                chances = [steps[place, token].item() for place, token in enumerate(one)]
                if any(other[: len(one)] == one for other in ANSWERS if other != one):
                    chances.append(max(steps[-1, 2].item(), steps[-1, 3].item()))
                scores.append(math.fsum(chances) / len(chances) ** length_penalty)
            assert answer == ANSWERS[scores.index(max(scores))]


def test_texts_are_allowed_as_the_tokenizer_cuts_them() -> None:
    tokenizer, model = tiny_tokenizer(), made(vocab=260)
    texts = ["是", "不是", "不知道", "the <|im_end|>"]  # a control token's text is text here
    allowed = Allowed.texts(tokenizer, texts)
    found = []
    for choice in (Choice(), Choice(20.0, seed=1)):
        found += generate_batch(model, [[5], [6, 7], [8]] * 3, max_new_tokens=20, allowed=allowed, choice=choice)
    said = {tokenizer.decode(answer) for answer in found}
    assert len(said) > 2 and said <= set(texts)


def test_sets_that_cannot_be_written_are_refused(model: Decoder) -> None:
    for answers, match in (([], "there are none"), ([[1], []], "an answer is empty")):
        with pytest.raises(DanluError, match=match):
            Allowed(answers)
    for answers, match in (
        ([[10, 11, 12]], "the longest has 3 tokens, but there is room for 2"),
        ([[10, 97]], "they hold id 97; the model's vocabulary has 97"),
        ([[10, 3]], "they hold the stop id 3"),
    ):
        with pytest.raises(DanluError, match=match):
            generate(model, [1], max_new_tokens=2, stop_ids=STOPS, allowed=Allowed(answers))
        with pytest.raises(DanluError, match=match):
            beam_search(model, [[1]], beams=2, max_new_tokens=2, stop_ids=STOPS, allowed=Allowed(answers))
    for stops in (frozenset(), frozenset({200})):
        with pytest.raises(DanluError, match="one is the beginning of another"):
            generate_batch(model, [[1]], max_new_tokens=4, stop_ids=stops, allowed=Allowed(ANSWERS))
