"""Routing: who computes which token, what is dropped and counted, and the losses on the router."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from danlu.model.config import Experts, ModelConfig
from danlu.model.mixture import Mixture, Routing, router_penalty
from danlu.model.transformer import Decoder


def config(experts: Experts, **changes: object) -> ModelConfig:
    shape = {"vocab_size": 50, "width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_width": 8}
    return ModelConfig(**{**shape, "feedforward_width": 24, "context": 64, "experts": experts, **changes})


def mixture(experts: Experts, **changes: object) -> Mixture:
    torch.manual_seed(0)
    return Mixture(config(experts, **changes), experts).eval()


def by_hand(model: Mixture, x: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
    """The same, one token and one expert after another; and which expert computed which token."""
    experts, done, made = model.settings, [], torch.zeros_like(x)
    for row in range(len(x)):
        used = [0] * experts.count
        for place in range(x.shape[1]):
            token = x[row, place]
            chances = model.router(token).softmax(-1)
            values, chosen = chances.topk(experts.chosen)
            if experts.normalised:
                values = values / values.sum()
            for value, expert in zip(values, chosen.tolist(), strict=True):
                used[expert] += 1
                if experts.capacity is not None and used[expert] > experts.capacity:
                    continue
                bank = model.experts
                inner = bank.up.weight[expert] @ token
                if bank.gate is not None:
                    inner = torch.nn.functional.silu(bank.gate.weight[expert] @ token) * inner
                else:
                    inner = torch.nn.functional.silu(inner)
                made[row, place] += value * (bank.down.weight[expert] @ inner)
                done.append((row * x.shape[1] + place, expert))
    return made, done


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_equals_one_token_after_another(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 6))
    capacity = data.draw(st.one_of(st.none(), st.integers(0, 4)))
    experts = Experts(
        count, data.draw(st.integers(1, count)), 12, normalised=data.draw(st.booleans()), capacity=capacity
    )
    model = mixture(experts, gated=data.draw(st.booleans()))
    x = torch.randn(data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9)), 16)
    routes: list[Routing] = []
    with torch.no_grad():
        made = model(x, routes)
        expected, done = by_hand(model, x)
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-4)

    (route,) = routes
    choices = x.shape[0] * x.shape[1] * experts.chosen
    assert int(route.load().sum()) == len(done) == choices - route.dropped()
    assert route.load().tolist() == [sum(expert == other for _, other in done) for expert in range(count)]
    if capacity is None:
        assert route.dropped() == 0  # every token by each of its experts, exactly once
        assert len(set(done)) == len(done) == choices


def test_a_capacity_factor_is_a_share_of_the_row() -> None:
    even = Experts(4, 2, 12, capacity_factor=1.25)
    route = mixture(even).route(torch.randn(2, 8, 16))[1]
    limit = 5  # 1.25 * 8 tokens * 2 choices / 4 experts
    per_row = [torch.bincount(row[kept], minlength=4).max() for row, kept in rows(route, 8)]
    assert max(per_row) <= limit and route.dropped() == 32 - int(route.load().sum()) > 0


def rows(route: Routing, length: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(route.experts.split(length), route.taken.split(length), strict=True))


def test_what_finds_no_room_passes_by_unchanged() -> None:
    model = mixture(Experts(2, 1, 12, capacity=0))
    assert torch.equal(model(torch.randn(1, 5, 16)), torch.zeros(1, 5, 16))


def test_the_shared_expert_serves_every_token() -> None:
    model = mixture(Experts(4, 1, 12, capacity=0, shared_width=20, shared_gate=True))
    x = torch.randn(1, 5, 16)
    assert model.shared is not None and model.shared_gate is not None
    torch.testing.assert_close(model(x), torch.sigmoid(model.shared_gate(x)) * model.shared(x))


def test_the_losses_are_the_papers() -> None:
    experts = Experts(4, 2, 12, balance=0.1, z=0.1)
    model = Decoder(config(experts))
    routes: list[Routing] = []
    model(torch.randint(0, 50, (2, 9)), routes=routes)
    assert len(routes) == 2
    counts = torch.tensor([9, 4])
    # Row by row and layer by layer, each row as often as it has targets.
    rows = [route.logits.unflatten(0, (2, 9))[row] for route in routes for row in (0, 1)]
    times = [9, 4] * 2
    balance = sum(n * load_balancing_loss_func((row,), 4, 2) for n, row in zip(times, rows, strict=True))
    found = router_penalty(routes, replace(experts, z=0.0), counts)
    torch.testing.assert_close(found, 0.1 * balance)
    z = sum(n * router_z_loss_func(row[None]) for n, row in zip(times, rows, strict=True))
    torch.testing.assert_close(router_penalty(routes, replace(experts, balance=0.0), counts), 0.1 * z)
    found.backward()
    assert all(block.feedforward.router.weight.grad.abs().sum() > 0 for block in model.blocks)


def test_padding_costs_routers_nothing() -> None:
    experts = Experts(4, 2, 12, balance=0.1, z=0.1)
    model = Decoder(config(experts))
    tokens, whole, cut = torch.randint(0, 50, (1, 9)), [], []
    real = torch.arange(9)[None] < 6
    model(tokens, segments=real.int(), routes=whole)
    model(tokens[:, :6], routes=cut)
    counts = torch.tensor([5])
    torch.testing.assert_close(router_penalty(whole, experts, counts, real), router_penalty(cut, experts, counts))


def test_perfect_balance_costs_as_little_as_it_can() -> None:
    even = Routing(torch.zeros(8, 4), torch.arange(8)[:, None] % 4, torch.ones(8, 1, dtype=torch.bool))
    once, alone = torch.tensor([1]), Experts(4, 1, 12, balance=1.0)
    assert float(router_penalty([even], alone, once)) == pytest.approx(1.0)
    skewed = replace(
        even, logits=torch.tensor([9.0, 0, 0, 0]).expand(8, 4), experts=torch.zeros(8, 1, dtype=torch.int64)
    )
    assert float(router_penalty([skewed], alone, once)) > 3.9


def test_jitter_is_for_training_alone() -> None:
    model = mixture(Experts(4, 1, 12, jitter=0.5))
    x = torch.randn(1, 30, 16)
    assert torch.equal(model.route(x)[1].logits, model.route(x)[1].logits)
    model.train()
    assert not torch.equal(model.route(x)[1].logits, model.route(x)[1].logits)


def test_an_exact_router_computes_in_fp32() -> None:
    model = mixture(Experts(4, 1, 12, exact_router=True)).bfloat16()
    x = torch.randn(1, 6, 16).bfloat16()
    exact = torch.nn.functional.linear(x[0].float(), model.router.weight.float())
    assert torch.equal(model.route(x)[1].logits, exact)
