"""Beam search: the same answers as transformers' own."""

from __future__ import annotations

import itertools

import pytest
import torch

from danlu.errors import DanluError
from danlu.model.beam import beam_search
from danlu.model.generate import generate_batch
from danlu.model.transformer import Decoder, EncoderDecoder
from tests.model.test_generate import lively, made
from tests.model.zoo import Twin

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [30, 31]]
COUNT = 12


@pytest.fixture(scope="module", params=["llama", "gpt2", "t5 uneven", "flan-t5"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twin:
    return lively(request.param, tmp_path_factory.mktemp("beam"))


def theirs(both: Twin, stops: list[int], **how: float) -> list[list[int]]:
    """Answers of transformers, without their stop ids."""
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        made = both.theirs.generate(
            ids, max_new_tokens=COUNT, do_sample=False, eos_token_id=stops, pad_token_id=stops[0], **how
        )
        answer = made[0, 1 if isinstance(both.ours, EncoderDecoder) else len(prompt) :].tolist()
        ends = [place for place, token in enumerate(answer) if token in stops]
        answers.append(answer[: ends[0] if ends else None])
    return answers


def test_transformers_finds_the_same(both: Twin) -> None:
    model = both.ours
    assert isinstance(model, Decoder | EncoderDecoder)
    free = beam_search(model, PROMPTS, beams=4, max_new_tokens=COUNT)
    stops = sorted({row[place] for row, place in zip(free, (2, 4, 6, 3), strict=True)})
    lengths = set()
    # With many stop ids nearly every step completes answers: when to end the search is what counts then.
    for some, beams in ((stops[:1], 2), (stops[:3], 5), ([*range(1, 96, 4)], 3)):
        for early, penalty in itertools.product((False, True), (-1.0, 0.0, 1.0, 2.0)):
            how = {"length_penalty": penalty, "early_stopping": early}
            ours = beam_search(model, PROMPTS, beams=beams, max_new_tokens=COUNT, stop_ids=frozenset(some), **how)
            assert ours == theirs(both, some, num_beams=beams, **how), (some, beams, how)
            lengths |= {len(answer) for answer in ours}
    assert COUNT in lengths and len(lengths) > 4  # answers that end early, and some that do not


def test_one_beam_is_greedy_search_and_more_find_likelier_answers() -> None:
    model = made()
    free = generate_batch(model, PROMPTS, max_new_tokens=COUNT)
    stops = frozenset({free[0][5]})
    greedy = generate_batch(model, PROMPTS, max_new_tokens=COUNT, stop_ids=stops)
    assert beam_search(model, PROMPTS, beams=1, max_new_tokens=COUNT, stop_ids=stops) == greedy

    def chance(prompt: list[int], answer: list[int]) -> float:
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([prompt + answer])))[0, len(prompt) - 1 : -1]
        return float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())

    wide = beam_search(model, PROMPTS, beams=8, max_new_tokens=COUNT)
    gains = [chance(p, w) - chance(p, g) for p, w, g in zip(PROMPTS, wide, free, strict=True)]
    assert sum(gains) > 0.1


def test_a_batch_equals_each_prompt_alone(both: Twin) -> None:
    model = both.ours
    assert isinstance(model, Decoder | EncoderDecoder)
    free = beam_search(model, PROMPTS, beams=3, max_new_tokens=COUNT)
    stops = frozenset({free[0][4], free[2][7]})
    together = beam_search(model, PROMPTS, beams=3, max_new_tokens=COUNT, stop_ids=stops)
    alone = [beam_search(model, [one], beams=3, max_new_tokens=COUNT, stop_ids=stops)[0] for one in PROMPTS]
    assert together == alone


def test_wrong_calls_are_refused() -> None:
    model = made()
    for wrong in ({"beams": 0}, {"beams": 2, "length_penalty": float("nan")}, {"beams": 2, "length_penalty": 400.0}):
        with pytest.raises(DanluError, match="must be at least 1, and from -10 to 10"):
            beam_search(model, [[1]], max_new_tokens=1, **wrong)
    with pytest.raises(DanluError, match="60 tokens leaves room for 4, not for an answer of 5"):
        beam_search(model, [[1] * 60], beams=2, max_new_tokens=5)
    assert beam_search(model, [[1]], beams=2, max_new_tokens=0) == [[]]
    assert beam_search(model, [], beams=2, max_new_tokens=3) == []
    with torch.no_grad():
        model.blocks[0].attention.value.weight[0, 0] = float("nan")
    with pytest.raises(DanluError, match="logits are not numbers"):
        beam_search(model, [[1]], beams=2, max_new_tokens=5)
