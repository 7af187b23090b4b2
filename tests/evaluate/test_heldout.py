"""Sums of every held-out document equal those of a plain computation that holds all logits, one document at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from danlu.data.stream import Rows
from danlu.errors import DanluError
from danlu.evaluate import heldout
from danlu.evaluate.bootstrap import Interval
from danlu.evaluate.heldout import choose_rows, perplexity, relative_perplexity, score
from danlu.model.config import ModelConfig
from danlu.model.transformer import Decoder

WINDOW, VOCABULARY = 40, 97


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=VOCABULARY, width=32, layers=2, heads=4, kv_heads=2, head_width=8, feedforward_width=48, context=64
    )
    made = Decoder(config)
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return made.eval()


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Rows:
    """Nine rows of up to four documents and padding; in each document the first third is a prompt."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, (9, WINDOW)).astype(np.int32)
    segments, trained = np.zeros_like(tokens), np.zeros(tokens.shape, dtype=bool)
    for row in range(9):
        start = 0
        for number in range(1, 5):
            length = int(rng.integers(2, 14))
            end = min(WINDOW, start + length)
            segments[row, start:end] = number
            trained[row, start + max(1, length // 3) : end] = True
            start = end
    return save_rows(tmp_path_factory.mktemp("heldout"), tokens, segments, trained)


def save_rows(place: Path, tokens: np.ndarray, segments: np.ndarray, trained: np.ndarray) -> Rows:
    for name, array in (("tokens", tokens), ("segments", segments), ("trained", trained)):
        np.save(place / f"{name}.npy", array)
    return Rows.open(place)


def plain_sums(model: Decoder, rows: Rows, row: int, segment: int) -> tuple[float, int, int]:
    """The document alone, through the whole vocabulary: loss sum, tokens, right tokens."""
    inside = rows.segments[row] == segment
    tokens = torch.from_numpy(rows.tokens[row][inside].astype(np.int64))
    trained = torch.from_numpy(np.asarray(rows.trained[row][inside]))[1:]
    with torch.no_grad():
        logits = model.logits(model(tokens[None]))[0, :-1]
    losses = F.cross_entropy(logits, tokens[1:], reduction="none")[trained]
    right = (logits.argmax(-1) == tokens[1:])[trained]
    return float(losses.double().sum()), int(trained.sum()), int(right.sum())


def test_every_document_equals_the_plain_computation(model, rows):
    found = score(model, rows, np.arange(9))
    places = list(zip(found.row.tolist(), found.segment.tolist(), strict=True))
    scored = {
        (row, int(segment))
        for row in range(9)
        for segment in np.unique(rows.segments[row])
        if segment and plain_sums(model, rows, row, segment)[1]
    }
    assert set(places) == scored and len(places) == len(scored) > 20
    for place, (row, segment) in enumerate(places):
        loss, count, right = plain_sums(model, rows, row, segment)
        assert found.losses[place] == pytest.approx(loss, abs=1e-4)
        assert (found.counts[place], found.correct[place]) == (count, right)


def test_how_the_rows_are_batched_changes_nothing(model, rows, monkeypatch):
    together = score(model, rows, np.arange(9))
    monkeypatch.setattr(heldout, "TOKENS_AT_ONCE", WINDOW)
    alone = score(model, rows, np.arange(9))
    np.testing.assert_array_equal(together.row, alone.row)
    np.testing.assert_array_equal(together.segment, alone.segment)
    np.testing.assert_array_equal(together.counts, alone.counts)
    np.testing.assert_allclose(together.losses, alone.losses, rtol=1e-5)


def test_chosen_rows_keep_their_own_numbers(model, rows):
    found = score(model, rows, np.array([3, 7]))
    assert set(found.row.tolist()) == {3, 7}
    whole = score(model, rows, np.arange(9))
    of_three = whole.losses[whole.row == 3]
    np.testing.assert_allclose(found.losses[found.row == 3], of_three, rtol=1e-5)


def test_bf16_is_near_fp32(model, rows):
    exact, rough = (score(each, rows, np.arange(9)) for each in (model, _in_bf16(model)))
    np.testing.assert_array_equal(rough.counts, exact.counts)
    assert rough.losses.sum() == pytest.approx(exact.losses.sum(), rel=0.02)


def _in_bf16(model: Decoder) -> Decoder:
    copy = Decoder(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.to(torch.bfloat16).eval()


def test_perplexity_is_the_exponential_of_loss_limits_and_all():
    assert perplexity(Interval(2.0, 1.9, 2.2)) == pytest.approx(np.exp([2.0, 1.9, 2.2]).tolist())
    was, now = perplexity(Interval(2.0, 1.9, 2.2)).value, perplexity(Interval(1.7, 1.5, 1.8)).value
    assert relative_perplexity(Interval(-0.3, -0.4, -0.2)).value == pytest.approx(now / was - 1)


def test_rows_are_drawn_by_the_seed_and_bounded(rows):
    assert choose_rows(rows, None, seed=0).tolist() == list(range(9))
    assert choose_rows(rows, 10**9, seed=0).tolist() == list(range(9))
    assert len(choose_rows(rows, 3 * WINDOW + 5, seed=0)) == 3
    assert len(choose_rows(rows, 1, seed=0)) == 1
    assert choose_rows(rows, 3 * WINDOW, seed=4).tolist() == choose_rows(rows, 3 * WINDOW, seed=4).tolist()
    draws = {tuple(choose_rows(rows, 3 * WINDOW, seed=seed).tolist()) for seed in range(8)}
    assert len(draws) > 1


def test_no_rows_at_all_is_said(tmp_path):
    empty = np.zeros((0, WINDOW), dtype=np.int32)
    with pytest.raises(DanluError, match=r"no held-out row"):
        choose_rows(save_rows(tmp_path, empty, empty, empty.astype(bool)), None, seed=0)


def test_tokens_of_another_vocabulary_are_refused(model, tmp_path):
    tokens = np.full((1, WINDOW), VOCABULARY, dtype=np.int32)
    strange = save_rows(tmp_path, tokens, np.ones_like(tokens), np.ones(tokens.shape, dtype=bool))
    with pytest.raises(DanluError, match="tokenizer"):
        score(model, strange, np.arange(1))
