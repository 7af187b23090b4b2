"""Kullback-Leibler divergence between two models' guesses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.evaluate import divergence as module
from danlu.evaluate.divergence import divergence


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.1, 1.0, 30.0]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_it_is_torchs_own_in_float64(seed: int, scale: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    reference, other = (torch.randn(3, 5, 50, generator=generator).mul(scale).to(dtype) for _ in range(2))
    known, said = (each.double().log_softmax(-1) for each in (reference, other))
    expected = F.kl_div(said, known, reduction="none", log_target=True).sum(-1)
    found = divergence(reference, other)
    assert found.dtype == torch.float32 and found.shape == (3, 5)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(divergence(reference, reference), torch.zeros(3, 5))


def test_parts_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, other = torch.randn(2, 7, 11, 50)
    whole = divergence(reference, other)
    monkeypatch.setattr(module, "AT_ONCE", 150)
    assert torch.allclose(divergence(reference, other), whole, atol=1e-6)
    with pytest.raises(ValueError, match="one shape"):
        divergence(reference, other[:3])
