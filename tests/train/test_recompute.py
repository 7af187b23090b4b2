"""Recomputing: the same bits with less kept, for dense models and mixtures, alone and spread over processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from danlu.data.stream import Batch
from danlu.model.config import Experts, ModelConfig
from danlu.model.mixture import Routing
from danlu.model.sight import Batch as Sighted
from danlu.model.sight import self_sight
from danlu.model.transformer import Decoder, Notes
from danlu.plan.plan import Plan
from danlu.train.mesh import make_mesh
from danlu.train.objective import next_token
from danlu.train.pipelined import can_zero_bubble
from danlu.train.recompute import DEAR, Recompute, recompute_blocks
from danlu.train.replica import Replica
from tests.train.ranks import run_ranks

DENSE = ModelConfig(
    vocab_size=64, context=32, width=32, layers=3, heads=4, kv_heads=2, head_width=8, feedforward_width=48
)
MIXTURE = replace(DENSE, experts=Experts(4, 2, 32, balance=0.5, z=0.1))
DROPPING = replace(DENSE, dropout=0.1, attention_dropout=0.1, drop_path=0.2)
HOW: tuple[Recompute, ...] = ("selective", "full")


def batch(rows: int = 4) -> Batch:
    tokens = torch.randint(0, 64, (rows, 32), generator=torch.Generator().manual_seed(0))
    segments = torch.ones(rows, 32, dtype=torch.int32)
    segments[:, 20:] = 2
    return Batch(tokens, tokens.roll(-1, 1), segments, torch.arange(32).expand(rows, -1))


def replica_of(config: ModelConfig, how: Recompute, dtype: torch.dtype, plan: Plan | None = None) -> Replica:
    torch.manual_seed(1)
    made = Decoder(config).to(dtype)
    mesh = make_mesh(plan) if plan else None
    return Replica(made, [next_token], mesh, rows=4, length=32, recompute=how, batch=Batch)


def step(replica: Replica) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of losses and the gradients of a step with dropout."""
    torch.manual_seed(2)
    loss = replica.gradients(batch(), batch().count)
    found = {name: weight.grad for name, weight in replica.parameters().items() if weight.grad is not None}
    return loss, {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [DENSE, MIXTURE, DROPPING], ids=["dense", "mixture", "dropping"])
def test_losses_and_gradients_have_the_same_bits(config: ModelConfig, dtype: torch.dtype, how: Recompute) -> None:
    wanted, found = step(replica_of(config, "none", dtype)), step(replica_of(config, how, dtype))
    assert torch.equal(wanted[0], found[0])
    assert wanted[1].keys() == found[1].keys()
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in wanted[1].items())


@pytest.mark.parametrize("how", HOW)
def test_routes_are_noted_once(how: Recompute) -> None:
    torch.manual_seed(1)
    model = Decoder(MIXTURE)
    recompute_blocks(list(model.blocks), how)
    routes: list[Routing] = []
    model(batch().tokens, routes=routes).sum().backward()
    assert len(routes) == MIXTURE.layers
    assert len({id(route) for route in routes}) == MIXTURE.layers


class Counter(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Any, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func] = self.seen.get(func, 0) + 1
        return func(*args, **(kwargs or {}))


def operators(how: Recompute) -> dict[Any, int]:
    replica = replica_of(DENSE, how, torch.float32)
    with Counter() as counter:
        step(replica)
    return counter.seen


def test_selective_computes_again_only_what_is_cheap() -> None:
    none, selective, full = (operators(how) for how in ("none", *HOW))
    dear = [op for op in DEAR if op in none]
    assert torch.ops.danlu.tiled_attention.default in dear
    assert torch.ops.aten.mm.default in dear
    assert all(selective[op] == none[op] < full[op] for op in dear)
    assert sum(selective.values()) > sum(none.values())


@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_less_is_kept(config: ModelConfig) -> None:
    wide = replace(config, width=128, head_width=32, feedforward_width=256, layers=6)
    kept = {how: bytes_kept(wide, how) for how in ("none", *HOW)}
    own = 0 if config.experts is None else 6 * 4 * 32 * (16 + 2 * 8 + 2)  # routers' logits, experts, and who was taken
    assert kept["full"] <= 6 * 4 * 32 * 128 * 4 + own, "the blocks' inputs alone"
    assert 3 * kept["full"] < kept["selective"] < 0.8 * kept["none"]


class Kept(TorchDispatchMode):
    """Knows what storages are made, but for those of weights, without keeping them."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.weights:
                    self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return made

    def bytes(self) -> int:
        """Of those that are still held."""
        return sum(size for reference, size in self.made.values() if not reference.expired())


def bytes_kept(config: ModelConfig, how: Recompute) -> int:
    """What the forward pass of the blocks leaves behind for the backward pass."""
    torch.manual_seed(1)
    model = Decoder(config)
    recompute_blocks(list(model.blocks), how)
    x = torch.randn(4, 32, config.width, requires_grad=True)
    routes: list[Routing] = []
    see = self_sight(config, 0, Sighted(batch().positions, batch().segments), None)
    with Kept(model) as kept:
        for block in model.blocks:
            x = block(x, see, None, None, None, Notes(routes))
        return kept.bytes()


def follow(config: ModelConfig, plan: dict[str, Any], how: Recompute) -> tuple[Tensor, dict[str, Tensor]]:
    return step(replica_of(config, how, torch.float32, Plan(**plan)))


def same_on_ranks(config: ModelConfig, plan: dict[str, Any], hows: tuple[Recompute, ...]) -> None:
    wanted = follow(config, plan, "none")
    for how in hows:
        found = follow(config, plan, how)
        assert torch.equal(wanted[0], found[0]), (plan, how)
        assert wanted[1].keys() == found[1].keys()
        for name, gradient in wanted[1].items():
            assert torch.equal(gradient, found[1][name]), (plan, how, name)


def all_plans() -> None:
    for config, plan in (
        (DENSE, {"tensor": 2, "micro_batches": 2}),
        (MIXTURE, {"tensor": 2}),
        (DENSE, {"pipeline": 2, "micro_batches": 2}),
        (MIXTURE, {"shard": 2}),
        (MIXTURE, {"expert": 2}),
        (DENSE, {"context": 2}),
    ):
        same_on_ranks(config, plan, HOW)


def test_on_two_processes_too() -> None:
    """However a model is cut, recomputing changes no bit."""
    run_ranks(2, all_plans)


@pytest.mark.skipif(not can_zero_bubble(), reason="this torch cannot run zero-bubble pipelines")
def test_zero_bubble_pipelines_compute_all_again() -> None:
    """They go backward twice, and what selective recomputing keeps is gone after the first time."""
    run_ranks(2, same_on_ranks, DENSE, {"pipeline": 2, "micro_batches": 2, "schedule": "zero-bubble"}, ("full",))
