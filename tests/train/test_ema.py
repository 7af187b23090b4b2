"""Averages of weights: parity with torch's, the corrected start, evaluation with them, and exact resume."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from danlu.train.ema import Average
from danlu.train.optimizer import Optimizer, masters_of
from danlu.train.optimizing.settings import OptimizerSettings


def network() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))


def optimizer_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> Optimizer:
    return Optimizer(*masters_of(model, dtype), OptimizerSettings())


def step(model: nn.Module, optimizer: Optimizer, number: int) -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
    model(x.to(next(model.parameters()).dtype)).float().square().mean().backward()
    optimizer.step(0.1)
    optimizer.zero()


def test_equals_torch():
    model = network()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(model)  # torch's first update copies the weights: there ours starts
    optimizer = optimizer_of(model)
    ours = Average(optimizer, 0.9)
    for number in range(5):
        step(model, optimizer, number)
        ours.update()
        theirs.update_parameters(model)
    for a, b in zip(ours.averages.values(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-6, atol=1e-7)


def test_warmed_up_it_is_the_weighted_mean_of_what_was_seen():
    model = network()
    optimizer = optimizer_of(model)
    average = Average(optimizer, 0.9, warmup=True)
    seen = []
    for number in range(6):
        step(model, optimizer, number)
        average.update()
        seen.append(optimizer.masters["0.weight"].detach().double())
        shares = [0.9 ** (len(seen) - 1 - place) for place in range(len(seen))]
        mean = sum(share * weight for share, weight in zip(shares, seen, strict=True)) / sum(shares)
        torch.testing.assert_close(average.averages["0.weight"].double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swapped_weights_are_the_averages_and_come_back(dtype):
    model = network()
    optimizer = optimizer_of(model, dtype)
    average = Average(optimizer, 0.5)
    for number in range(3):
        step(model, optimizer, number)
        average.update()
    last = {name: p.detach().clone() for name, p in model.named_parameters()}
    means = {name: tensor.clone() for name, tensor in average.averages.items()}
    masters = {name: tensor.detach().clone() for name, tensor in optimizer.masters.items()}
    with pytest.raises(RuntimeError, match="evaluation failed"), average.swapped():
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, means[name].to(dtype)) and not torch.equal(parameter, last[name])
        raise RuntimeError("evaluation failed")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, last[name])
        assert torch.equal(average.averages[name], means[name])
        assert torch.equal(optimizer.masters[name], masters[name])


def test_it_resumes_bit_for_bit():
    def run(model: nn.Module, optimizer: Optimizer, average: Average, steps: range) -> None:
        for number in steps:
            step(model, optimizer, number)
            average.update()

    straight = network()
    optimizer = optimizer_of(straight)
    wanted = Average(optimizer, 0.9, warmup=True)
    run(straight, optimizer, wanted, range(6))
    first, second = network(), network()
    optimizer = optimizer_of(first)
    average = Average(optimizer, 0.9, warmup=True)
    run(first, optimizer, average, range(3))
    saved = {name: t.detach().clone() for name, t in (optimizer.state() | average.state()).items()}
    optimizer = optimizer_of(second)
    average = Average(optimizer, 0.9, warmup=True)
    optimizer.load(saved)
    average.load(saved)
    run(second, optimizer, average, range(3, 6))
    for name, tensor in wanted.averages.items():
        assert torch.equal(average.averages[name], tensor)
