"""What is minimised beside the loss that is reported."""

from __future__ import annotations

import torch

from danlu.data.stream import Batch
from danlu.model.config import Experts, ModelConfig
from danlu.model.mixture import Routing, balance_loss, z_loss
from danlu.model.transformer import Decoder
from danlu.train.objective import next_token

SHAPE = {"vocab_size": 50, "width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_width": 8}


def batch() -> Batch:
    tokens = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    segments = torch.ones(2, 12, dtype=torch.int32)
    return Batch(tokens, tokens.roll(-1, 1), segments, torch.arange(12).expand(2, -1))


def test_losses_on_routers_are_minimised_but_not_reported() -> None:
    experts = Experts(4, 2, 12, balance=0.5, z=0.25)
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**SHAPE, feedforward_width=24, context=32, experts=experts))
    loss = next_token(model, batch())
    routes: list[Routing] = []
    logits = model.logits(model(batch().tokens, routes=routes))
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch().targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss.sum.float(), plain, rtol=1e-5, atol=1e-4)
    expected = (0.5 * balance_loss(routes, experts) + 0.25 * z_loss(routes)) * 24
    assert isinstance(loss.penalty, torch.Tensor)
    torch.testing.assert_close(loss.penalty, expected, rtol=1e-5, atol=1e-5)
    loss.penalty.backward()
    assert all(block.feedforward.router.weight.grad.any() for block in model.blocks)


def test_a_model_without_a_mixture_has_no_penalty() -> None:
    assert next_token(Decoder(ModelConfig(**SHAPE, feedforward_width=24, context=32)), batch()).penalty == 0.0
