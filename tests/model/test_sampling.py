"""Choosing tokens: the same ones stay as with Hugging Face's processors, and each is drawn as often as it should be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from danlu.errors import DanluError
from danlu.model.generate import generate, generate_batch
from danlu.model.sampling import RANKED, Choice, Chooser, draw, likely, penalised
from danlu.model.transformer import Decoder, EncoderDecoder
from tests.model.test_generate import lively, made

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [5, 6, 7]]


def scores(rows: int = 16, vocab: int = 400, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * spread


@pytest.mark.parametrize("vocab", [400, 3 * RANKED])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_each_setting_does_what_hugging_faces_does(vocab: int, spread: float) -> None:
    given, none = scores(vocab=vocab, spread=spread), torch.empty(16, 0, dtype=torch.int64)
    cases = [(Choice(temperature=t), hf.TemperatureLogitsWarper(t)) for t in (0.3, 1.7)]
    cases += [(Choice(1.0, top_k=k), hf.TopKLogitsWarper(k)) for k in (1, 7, 399, 10_000)]
    cases += [(Choice(1.0, top_p=p), hf.TopPLogitsWarper(p)) for p in (1e-6, 0.1, 0.5, 0.9, 0.999)]
    cases += [(Choice(1.0, min_p=p), hf.MinPLogitsWarper(p)) for p in (1e-6, 0.05, 0.5, 1.0)]
    for choice, theirs in cases:
        assert torch.equal(likely(given, choice), theirs(none, given)), choice


def test_settings_together_take_effect_in_hugging_faces_order() -> None:
    given = scores(rows=64)
    ids = torch.randint(400, (64, 30), generator=torch.Generator().manual_seed(1))
    choice = Choice(temperature=1.6, top_k=60, top_p=0.8, min_p=0.15, repetition_penalty=1.4)
    chain = hf.LogitsProcessorList(
        [
            hf.RepetitionPenaltyLogitsProcessor(1.4),
            hf.TemperatureLogitsWarper(1.6),
            hf.TopKLogitsWarper(60),
            hf.TopPLogitsWarper(0.8),
            hf.MinPLogitsWarper(0.15),
        ]
    )
    theirs = chain(ids, given)
    used = torch.zeros(64, 400, dtype=torch.bool).scatter(1, ids, True)
    assert torch.equal(likely(penalised(given, used, 1.4), choice), theirs)
    for without in ({"top_k": 0}, {"top_p": 1.0}, {"min_p": 0.0}, {"temperature": 1.0}):  # each of them counts
        assert not torch.equal(likely(penalised(given, used, 1.4), replace(choice, **without)), theirs), without


def test_as_likely_as_the_last_kept_stays_too() -> None:
    tied = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    assert likely(tied, Choice(1.0, top_k=2)).isfinite().tolist() == [[False, True, True, True, False]]
    assert likely(tied, Choice(1.0, top_p=0.7)).isfinite().tolist() == [[False, True, True, True, False]]
    assert likely(torch.zeros(2, 5), Choice(1.0, top_k=1, top_p=0.5, min_p=1.0)).isfinite().all()


def test_tokens_are_drawn_as_often_as_is_likely() -> None:
    chances = torch.tensor([0.05, 0.5, 0.0, 0.15, 0.3])
    even = [(place + 0.5) / 1000 for place in range(1000)]
    counts = draw(chances.log().expand(1000, -1), even).bincount(minlength=5)
    assert counts.tolist() == [50, 500, 0, 150, 300]
    assert draw(chances.log()[None], [0.0]).item() == 0
    assert draw(chances.log()[None], [1 - 2**-53]).item() == 4
    assert draw(torch.tensor([[-torch.inf, 2.0, -torch.inf]] * 2), [0.0, 1 - 2**-53]).tolist() == [1, 1]


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    model = made()

    def drawn(seed: int, **how: float) -> list[int]:
        return list(generate(model, [5, 6, 7], max_new_tokens=20, temperature=1.5, seed=seed, **how))

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in range(8)}) == 8
    greedy = list(generate(model, [5, 6, 7], max_new_tokens=20))
    assert drawn(3, top_k=1) == drawn(4, top_p=1e-6) == drawn(5, min_p=1.0) == greedy


def test_a_row_draws_the_same_whatever_its_neighbours_are() -> None:
    model, choice = made(), Choice(temperature=1.5, top_p=0.95, repetition_penalty=1.2, seed=4)

    def drawn(prompts: list[list[int]], stops: frozenset[int], choice: Choice = choice) -> list[list[int]]:
        return generate_batch(model, prompts, max_new_tokens=30, stop_ids=stops, choice=choice)

    free = drawn(PROMPTS, frozenset())
    assert free[0] != free[3]  # the same prompt, another row
    stops = frozenset({free[0][12], free[1][7]})
    together = drawn(PROMPTS, stops)
    assert len({len(row) for row in together}) > 1  # the others' places in the batch change
    assert drawn([[50, 51], [8], [52] * 20, [5, 6, 7]], stops)[1::2] == together[1::2]
    one = generate(model, PROMPTS[0], max_new_tokens=30, stop_ids=stops, **vars(choice))
    assert list(one) == together[0]
    # Seed and row are two numbers, not their sum.
    assert drawn([[8], [8]], stops, Choice(1.5, seed=0))[1] != drawn([[8], [8]], stops, Choice(1.5, seed=1))[0]


@pytest.mark.parametrize("case", ["llama", "flan-t5"])
def test_the_repetition_penalty_counts_prompt_and_answer_as_transformers_does(case: str, tmp_path: Path) -> None:
    both, prompt = lively(case, tmp_path), [5, 6, 7, 8, 9, 10, 11]
    ours, stops = both.ours, frozenset({95})
    assert isinstance(ours, Decoder | EncoderDecoder)
    theirs = both.theirs.generate(
        torch.tensor([prompt]), max_new_tokens=24, do_sample=False, repetition_penalty=1.5, eos_token_id=95
    )[0].tolist()
    answer = list(generate(ours, prompt, max_new_tokens=24, repetition_penalty=1.5, stop_ids=stops))
    assert answer == [token for token in theirs[1 if case == "flan-t5" else len(prompt) :] if token != 95]
    assert answer != list(generate(ours, prompt, max_new_tokens=24, stop_ids=stops))


def test_wrong_settings_are_refused() -> None:
    wrong: dict[str, list[float]] = {
        "temperature": [-1.0, 1e-9, float("nan"), float("inf")],
        "top_k": [-1],
        "top_p": [0.0, 1.1, float("nan")],
        "min_p": [-0.1, 1.1],
        "repetition_penalty": [0.0, -1.0, float("inf")],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(DanluError, match=f"{name} is .* must be"):
                Choice(**{name: value})  # type: ignore[arg-type]


def test_logits_that_are_no_numbers_are_not_drawn_from() -> None:
    chooser = Chooser(Choice(1.0), [[1]], 4, torch.device("cpu"))
    with pytest.raises(DanluError, match="logits are not numbers"):
        chooser.choose(torch.tensor([[0.0, float("nan"), 1.0, 2.0]]))
