"""Chunked cross-entropy against the plain one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from danlu.model import loss as module
from danlu.model.loss import linear_cross_entropy, token_losses


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", 16 * 300)
    monkeypatch.setattr(module, "PART_LOGITS", 3 * 300)
    monkeypatch.setattr(module, "WORDS", 128)


def case(rows=70, ignored=9, dtype=torch.float32):
    torch.manual_seed(rows)
    hidden, weight = torch.randn(rows, 24, dtype=dtype), torch.randn(300, 24, dtype=dtype) / 4
    targets = torch.randint(0, 300, (rows,))
    targets[torch.randperm(rows)[:ignored]] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def test_value_and_gradients_equal_the_plain_loss():
    hidden, weight, targets = case()
    ours = linear_cross_entropy(hidden, weight, targets)
    plain = F.cross_entropy(hidden @ weight.T, targets, reduction="sum", ignore_index=-100)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours.float(), plain, rtol=1e-6, atol=1e-4)
    mine, theirs = (torch.autograd.grad(value * 0.37, (hidden, weight)) for value in (ours, plain))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_bias_of_the_head_counts_and_learns():
    hidden, weight, targets = case()
    bias = torch.randn(300).requires_grad_()
    ours = linear_cross_entropy(hidden, weight, targets, bias)
    plain = F.cross_entropy(hidden @ weight.T + bias, targets, reduction="sum", ignore_index=-100)
    torch.testing.assert_close(ours.float(), plain, rtol=1e-6, atol=1e-4)
    mine, theirs = (torch.autograd.grad(value * 0.37, (hidden, weight, bias)) for value in (ours, plain))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_targets_too_unlikely_for_a_float_keep_their_loss():
    hidden, weight, targets = case()
    hidden = (hidden.detach() * 100).requires_grad_()
    ours = linear_cross_entropy(hidden, weight, targets)
    plain = F.cross_entropy(hidden @ weight.T, targets, reduction="sum", ignore_index=-100)
    assert plain / 61 > 200  # exp(-200) is 0 in fp32
    torch.testing.assert_close(ours.float(), plain, rtol=1e-6, atol=1e-4)


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, targets = case()
    linear_cross_entropy(hidden, weight.requires_grad_(False), targets).backward()
    assert hidden.grad is not None and weight.grad is None


def test_nothing_to_learn_is_zero():
    hidden, weight, targets = case(rows=5, ignored=5)
    total = linear_cross_entropy(hidden, weight, targets)
    total.backward()
    assert total == 0 and hidden.grad.abs().sum() == 0 and weight.grad.abs().sum() == 0


def test_bf16_stays_near_fp32():
    hidden, weight, targets = case(dtype=torch.bfloat16)
    exact = F.cross_entropy(hidden.float() @ weight.float().T, targets, reduction="sum", ignore_index=-100)
    assert abs(linear_cross_entropy(hidden, weight, targets).item() / exact.item() - 1) < 2e-3


def test_token_losses():
    hidden, weight, targets = case()
    losses, correct = token_losses(hidden, weight, targets)
    logits = hidden @ weight.T
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none", ignore_index=-100))
    assert torch.equal(correct, logits.argmax(-1) == targets)
