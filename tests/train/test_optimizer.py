"""Master weights: the same as torch's AdamW in fp32, sums kept in fp32 for bf16, state restored bit for bit."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from danlu.train.optimizer import MasterAdamW, masters_of
from danlu.train.schedule import learning_rate
from danlu.train.settings import TuneSettings

SETTINGS = TuneSettings(method="full", clip=1e9, weight_decay=0.1)


def network() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))


def learn(model: nn.Module, optimizer: MasterAdamW, steps: range) -> None:
    dtype = next(model.parameters()).dtype
    for step in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
        model(x).float().square().mean().backward()
        optimizer.step(1e-2)


def test_equals_torch_in_fp32():
    ours, theirs = network(), network()
    learn(ours, MasterAdamW(*masters_of(ours, torch.float32), SETTINGS), range(5))
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    others = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=1e-2, betas=SETTINGS.betas, eps=SETTINGS.epsilon)
    for step in range(5):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        theirs(x).square().mean().backward()
        plain.step()
        plain.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_bf16_copies_follow_fp32_masters():
    model = network()
    start = model[0].weight.detach().clone()
    optimizer = MasterAdamW(*masters_of(model, torch.bfloat16), SETTINGS)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(optimizer.masters["0.weight"], start)
    learn(model, optimizer, range(3))
    assert optimizer.masters["0.weight"].dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, optimizer.masters[name].to(torch.bfloat16)) and parameter.grad is None


def test_micro_batches_sum_in_fp32():
    """256 + 1 is 256 in bf16: a gradient kept in bf16 would lose every small part after the first large one."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = MasterAdamW(*masters_of(model, torch.bfloat16), SETTINGS)
    for part in (256.0, 1.0, 1.0):
        (model(torch.full((1, 1), part, dtype=torch.bfloat16))).sum().backward()
    assert optimizer.masters["weight"].grad.item() == 258


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_restores_bit_for_bit(dtype):
    straight = network()
    learn(straight, MasterAdamW(*masters_of(straight, dtype), SETTINGS), range(6))
    first = network()
    optimizer = MasterAdamW(*masters_of(first, dtype), SETTINGS)
    learn(first, optimizer, range(3))
    saved = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    second = network()
    resumed = MasterAdamW(*masters_of(second, dtype), SETTINGS)
    resumed.load(saved)
    learn(second, resumed, range(3, 6))
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_clip_limits_the_step_and_reports_the_true_norm():
    model = nn.Linear(2, 1, bias=False)
    optimizer = MasterAdamW(*masters_of(model, torch.float32), SETTINGS.model_copy(update={"clip": 0.5}))
    model(torch.tensor([[3.0, 4.0]])).sum().backward()
    assert optimizer.step(0.0) == pytest.approx(5.0)


def test_schedules():
    def rates(**changes):
        settings = TuneSettings(learning_rate=1.0, warmup=0.2, final_share=0.1, **changes)
        return [learning_rate(step, 10, settings) for step in range(10)]

    for kind in ("constant", "linear", "cosine"):
        found = rates(schedule=kind)
        assert found[:2] == [0.5, 1.0] and found[2] == 1.0
        assert found[-1] == pytest.approx(1.0 if kind == "constant" else 0.1)
        assert all(a >= b for a, b in pairwise(found[1:]))
    assert rates(schedule="linear")[5] == pytest.approx(1 - 3 / 7 * 0.9)
