"""The optimizer: parity with torch.optim, sums kept in fp32 for bf16, state restored bit for bit, and the same update
however the weights are spread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from danlu.errors import DanluError
from danlu.train.optimizer import Optimizer, clip, masters_of, square_sum
from danlu.train.optimizing.adam8 import Code, dynamic_map
from danlu.train.optimizing.rules import orthogonalize
from danlu.train.optimizing.settings import OptimizerSettings
from tests.train.ranks import run_ranks

SETTINGS = {"weight_decay": 0.1, "betas": (0.9, 0.95), "epsilon": 1e-8}
MUON = {"name": "muon", "muon": ("*",)}
KINDS: list[dict[str, Any]] = [
    {"name": "sgd"},
    {"name": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"name": "adagrad"},
    {"name": "rmsprop", "momentum": 0.9, "l1": 0.01},
    {"name": "adam", "l2": 0.1},
    {"name": "adamw", "weight_decay": 0.1, "factors": {"0.*": 0.5}},
    {"name": "adamw", "state": "8bit"},
    {"name": "adafactor", "weight_decay": 0.1},
    MUON,
]


def name_of(kind: Any) -> str:
    if isinstance(kind, dict):
        return "-".join(map(str, kind.values()))
    return "torch" if callable(kind) else str(kind)  # a function's address differs from process to process


def network(wide: int = 5) -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, wide), nn.LayerNorm(wide), nn.Linear(wide, 3))


def inputs(step: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step))


def optimizer_of(model: nn.Module, dtype: torch.dtype = torch.float32, **settings: Any) -> Optimizer:
    return Optimizer(*masters_of(model, dtype), OptimizerSettings(**settings))


def follow(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    dtype = next(model.parameters()).dtype
    for step in steps:
        model(inputs(step).to(dtype)).float().square().mean().backward()
        optimizer.step(1e-2)
        optimizer.zero()


def test_equals_torch_in_fp32():
    ours, theirs = network(), network()
    follow(ours, optimizer_of(ours, **SETTINGS), range(5))
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    others = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=1e-2, betas=SETTINGS["betas"], eps=SETTINGS["epsilon"])
    for step in range(5):
        theirs(inputs(step)).square().mean().backward()
        plain.step()
        plain.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_bf16_copies_follow_fp32_masters():
    model = network()
    start = model[0].weight.detach().clone()
    optimizer = optimizer_of(model, torch.bfloat16, **SETTINGS)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(optimizer.masters["0.weight"], start)
    follow(model, optimizer, range(3))
    assert optimizer.masters["0.weight"].dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, optimizer.masters[name].to(torch.bfloat16)) and parameter.grad is None


def test_micro_batches_sum_in_fp32():
    """256 + 1 is 256 in bf16: a gradient kept in bf16 would lose every small part after the first large one."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = optimizer_of(model, torch.bfloat16, **SETTINGS)
    for part in (256.0, 1.0, 1.0):
        (model(torch.full((1, 1), part, dtype=torch.bfloat16))).sum().backward()
    assert optimizer.masters["weight"].grad.item() == 258


def test_clip_limits_the_step():
    model = nn.Linear(2, 1, bias=False)
    optimizer = optimizer_of(model, **SETTINGS)
    model(torch.tensor([[3.0, 4.0]])).sum().backward()
    gradients = optimizer.gradients()
    norm = float(square_sum(gradients).sqrt())
    assert norm == pytest.approx(5.0)
    clip(gradients, norm, 0.5)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.3, 0.4]]))


Kind = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
TORCH: list[tuple[dict[str, Any], Kind]] = [
    ({"name": "sgd"}, lambda groups: torch.optim.SGD(groups)),
    ({"name": "sgd", "momentum": 0.9}, lambda groups: torch.optim.SGD(groups, momentum=0.9)),
    (
        {"name": "sgd", "momentum": 0.9, "nesterov": True},
        lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True),
    ),
    ({"name": "adagrad"}, lambda groups: torch.optim.Adagrad(groups)),
    ({"name": "rmsprop", "smoothing": 0.9}, lambda groups: torch.optim.RMSprop(groups, alpha=0.9)),
    ({"name": "rmsprop", "momentum": 0.5}, lambda groups: torch.optim.RMSprop(groups, momentum=0.5)),
    ({"name": "adam", "betas": (0.8, 0.9)}, lambda groups: torch.optim.Adam(groups, betas=(0.8, 0.9), fused=True)),
    ({"name": "adamw"}, lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)),
]


@pytest.mark.parametrize(("settings", "kind"), TORCH, ids=name_of)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_torch_bit_for_bit(settings, kind, decay):
    """Decay is torch's own: through the gradient (our l2) in all but AdamW, where it is decoupled."""
    ours, theirs = network(), network()
    named = {"weight_decay" if settings["name"] == "adamw" else "l2": decay}
    follow(ours, optimizer_of(ours, factors={"0.*": 0.5}, **settings, **named), range(5))
    groups = [
        {"params": [p], "weight_decay": decay if p.dim() > 1 else 0.0, "lr": 0.005 if name[0] == "0" else 0.01}
        for name, p in theirs.named_parameters()
    ]
    plain = kind(groups)
    for step in range(5):
        theirs(inputs(step)).square().mean().backward()
        plain.step()
        plain.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b) if decay == 0 or settings["name"] == "adamw" else torch.allclose(a, b, 1e-6, 1e-7)


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rmsprop"])
def test_decay_is_decoupled(name):
    """A gradient of zero moves nothing, so what is left is the decay alone; vectors have none."""
    model = network()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = optimizer_of(model, name=name, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.1)
    for n, parameter in model.named_parameters():
        assert torch.equal(parameter, before[n] * (1 - 0.05) if parameter.dim() > 1 else before[n])


@pytest.mark.parametrize("shape", [(7,), (6, 10), (3, 4, 5), ()])
def test_adafactor_equals_torch(shape):
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    theirs = nn.Parameter(ours.detach().clone())
    optimizer = Optimizer({"w": ours}, {}, OptimizerSettings(name="adafactor", weight_decay=0.1, decay=("w",)))
    plain = torch.optim.Adafactor([theirs], lr=1e-2, weight_decay=0.1)
    for scale in (1.0, 30.0, 0.01, 0.0, 1.0):
        gradient = torch.randn(shape) * scale
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step(1e-2)
        plain.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_muon_equals_torch():
    """Of matrices; torch's takes the same bf16 iteration, so what differs is how products are rounded."""
    ours, theirs = network(32), network(32)
    optimizer = optimizer_of(ours, **MUON, weight_decay=0.1)
    plain = torch.optim.Muon(
        [p for p in theirs.parameters() if p.dim() == 2], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    rest = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.dim() < 2], lr=1e-2, weight_decay=0, betas=(0.9, 0.95), fused=True
    )
    follow(ours, optimizer, range(1))
    theirs(inputs(0)).square().mean().backward()
    plain.step()
    rest.step()
    for (_, start), a, b in zip(network(32).named_parameters(), ours.parameters(), theirs.parameters(), strict=True):
        moved, wanted = (a - start).detach(), (b - start).detach()
        assert float((moved - wanted).norm() / wanted.norm()) < (0.02 if a.dim() == 2 else 1e-6)


def test_muon_takes_experts_one_by_one():
    torch.manual_seed(0)
    start, gradient = torch.randn(3, 6, 4), torch.randn(3, 6, 4)
    bank = nn.Parameter(start.clone())
    bank.grad = gradient.clone()
    Optimizer({"blocks.0.experts.weight": bank}, {}, OptimizerSettings(name="muon")).step(0.1)
    for number in range(3):
        one = nn.Parameter(start[number].clone())
        one.grad = gradient[number].clone()
        Optimizer({"blocks.0.up.weight": one}, {}, OptimizerSettings(name="muon")).step(0.1)
        torch.testing.assert_close(bank[number], one, rtol=0, atol=2e-3)


@pytest.mark.parametrize("shape", [(16, 16), (40, 24), (24, 40), (4, 12, 20)])
def test_orthogonal_matrices_have_singular_values_near_1(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape) * 1e-3).float())
    wide = shape[-1] != shape[-2]  # a square matrix may have a singular value near 0
    assert float(values.max()) < 1.3 and float(values.median()) > 0.6
    assert not wide or float(values.min()) > 0.5


def test_the_map_has_256_numbers():
    for signed in (True, False):
        numbers = dynamic_map(signed)
        assert len(numbers.unique()) == 256 and float(numbers.max()) == 1 and 0 in numbers
        assert (float(numbers.min()) < -0.99) == signed


@given(st.integers(0, 2**31), st.integers(-30, 30), st.booleans())
def test_bytes_come_back_near(seed, power, signed):
    """Each as the nearest number of the map, to bf16's rounding, times the largest of its block; zeros stay."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, 32, generator=generator) ** 3 * 10.0**power
    values = values if signed else values.abs()
    values[1] = 0
    code = Code(signed, torch.device("cpu"))
    codes, scales = torch.empty(3, 32, dtype=torch.uint8), torch.empty(3, 2)
    code.encode(values, codes, scales)
    back = code.decode(codes, scales)
    largest = values.view(3, 2, 16).abs().amax(-1, keepdim=True).expand(3, 2, 16).reshape(3, 32)
    nearest = (code.numbers * largest[..., None] - values[..., None]).abs().amin(-1)
    assert not back[1].any()
    assert bool(((back - values).abs() <= nearest + 2**-7 * values.abs() + 1e-6 * largest).all())
    large = values.abs() > 0.1 * largest
    assert bool(((back - values).abs() <= 0.075 * values.abs())[large].all())


def test_8_bit_moments_learn_as_well_and_are_small():
    torch.manual_seed(0)
    x, y = torch.randn(256, 64), torch.randn(256, 64)

    def fit(**settings: Any) -> tuple[float, Optimizer]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
        optimizer = optimizer_of(model, name="adamw", **settings)
        for _ in range(150):
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step(3e-3)
            optimizer.zero()
        return float(loss.detach()), optimizer

    wide, _ = fit()
    narrow, optimizer = fit(state="8bit")
    assert narrow == pytest.approx(wide, rel=0.02) and wide < 0.8
    kept = [t for name, t in optimizer.state().items() if name.endswith("0.weight") and not name.startswith("master")]
    assert sum(tensor.nbytes for tensor in kept) < 2.2 * 64 * 128
    assert "exp_avg_scale.0.weight" in optimizer.state() and "exp_avg_scale.0.bias" not in optimizer.state()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_state_restores_bit_for_bit(kind, dtype):
    """8-bit moments are only kept of matrices that are large enough."""
    wide = 1024 if "state" in kind else 5
    straight = network(wide)
    follow(straight, optimizer_of(straight, dtype, **kind), range(6))
    first = network(wide)
    optimizer = optimizer_of(first, dtype, **kind)
    complete = optimizer.state().keys()
    follow(first, optimizer, range(3))
    saved = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    assert saved.keys() == complete
    second = network(wide)
    resumed = optimizer_of(second, dtype, **kind)
    resumed.load(saved)
    follow(second, resumed, range(3, 6))
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_something_else_is_refused():
    optimizer = optimizer_of(network())
    saved = dict(optimizer.state())
    with pytest.raises(DanluError, match=r"has no exp_avg\.0\.weight"):
        optimizer.load({name: tensor for name, tensor in saved.items() if name != "exp_avg.0.weight"})
    with pytest.raises(DanluError, match=r"master\.2\.weight is \[3, 5\] in the checkpoint and \[3, 7\] here"):
        optimizer_of(network(7)).load(saved | {f"master.{n}": p for n, p in network(7)[:2].named_parameters()})


def test_norm_and_clip():
    gradients = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    assert square_sum(gradients).dtype == torch.float64 and float(square_sum(gradients)) == 25
    clip(gradients, 5.0, 10.0)
    assert gradients["a"].tolist() == [3, 0]
    clip(gradients, 5.0, 1.0)
    assert float(square_sum(gradients)) == pytest.approx(1)
    assert float(square_sum({})) == 0


def test_penalties_act_on_what_decays():
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, -3.0]]))
        model.bias.fill_(5.0)
    optimizer = optimizer_of(model, name="sgd", l1=0.1, l2=0.01)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1.0)
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[2 - 0.1 - 0.02, -3 + 0.1 + 0.03]]))
    assert model.bias.item() == 5


def test_frozen_blocks_thaw_from_the_top():
    """What is not thawed keeps its bits, and its state, and is no part of the gradient's norm."""
    shapes = {"embedding.weight": (4, 2), "blocks.0.up": (2, 2), "blocks.1.up": (2, 2), "head.weight": (4, 2)}
    masters = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    optimizer = Optimizer(dict(masters), {}, OptimizerSettings(thaw_steps=2, weight_decay=0.5))
    learned = []
    for _ in range(5):
        before = {name: tensor.clone() for name, tensor in optimizer.state().items()}
        for master in masters.values():
            master.grad = torch.ones_like(master)
        found = set(optimizer.gradients())
        optimizer.step(0.1)
        after = optimizer.state()
        changed = {name for name in before if not torch.equal(before[name], after[name])} - {"updates"}
        assert changed == {f"{kind}.{name}" for name in found for kind in ("master", "exp_avg", "exp_avg_sq", "step")}
        learned.append(found)
    top = {"blocks.1.up", "head.weight"}
    assert learned == [top, top, top | {"blocks.0.up"}, top | {"blocks.0.up"}, set(shapes)]


def test_weights_that_were_moved_still_learn():
    straight, moved = network(), network()
    follow(straight, optimizer_of(straight), range(2))
    optimizer = optimizer_of(moved)
    follow(moved, optimizer, range(1))
    for parameter in moved.parameters():
        parameter.data = parameter.data.clone()
    follow(moved, optimizer, range(1, 2))
    for a, b in zip(straight.parameters(), moved.parameters(), strict=True):
        assert torch.equal(a, b)


# Spread over two processes. Names say how each weight is cut: 5 rows over 2 leave one process fewer than the other.
SPREAD: dict[str, tuple[tuple[int, ...], Any]] = {
    "rows": ((5, 8), Shard(0)),
    "columns": ((6, 8), Shard(1)),
    "one_row": ((1, 7), Shard(0)),
    "same": ((4, 6), Replicate()),
    "vector": ((7,), Shard(0)),
    "bank": ((4, 6, 5), Shard(0)),
    "bank_rows": ((2, 6, 5), Shard(1)),
    "large": ((65, 128), Shard(0)),
    "large_columns": ((33, 128), Shard(1)),
    "large_row": ((1, 4096), Shard(0)),
}


def whole_gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, (shape, _) in SPREAD.items()}


def run_alone(settings: dict[str, Any], steps: range, saved: dict[str, Tensor] | None = None) -> Optimizer:
    torch.manual_seed(3)
    masters: dict[str, Tensor] = {name: nn.Parameter(torch.randn(shape)) for name, (shape, _) in SPREAD.items()}
    optimizer = Optimizer(masters, {}, OptimizerSettings(**settings))
    if saved is not None:
        optimizer.load(saved)
    for step in steps:
        for name, gradient in whole_gradients(step).items():
            masters[name].grad = gradient
        optimizer.step(1e-2)
        optimizer.zero()
    return optimizer


def run_spread(settings: dict[str, Any], mesh: Any, steps: range, saved: dict[str, Tensor] | None) -> Optimizer:
    torch.manual_seed(3)
    masters: dict[str, Tensor] = {
        name: nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [place]))
        for name, (shape, place) in SPREAD.items()
    }
    optimizer = Optimizer(masters, {}, OptimizerSettings(**settings))
    if saved is not None:
        optimizer.load(saved)
    for step in steps:
        for name, gradient in whole_gradients(step).items():
            spread: Tensor = distribute_tensor(gradient, mesh, [SPREAD[name][1]])
            if name == "same":  # each process has made a part of it
                spread = DTensor.from_local(gradient / mesh.size(), mesh, [Partial()])
            masters[name].grad = spread
        optimizer.step(1e-2)
        optimizer.zero()
    return optimizer


def on_ranks(kinds: list[dict[str, Any]]) -> None:
    """Every kind of optimizer, from its start and from the middle of a run on one process, ends as it does alone."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for kind in kinds:
        middle = run_alone(kind, range(2)).state()
        wanted = run_alone(kind, range(2, 3), middle).state()
        for optimizer in (run_spread(kind, mesh, range(3), None), run_spread(kind, mesh, range(2, 3), middle)):
            found = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in optimizer.state().items()}
            assert found.keys() == wanted.keys()
            for name, tensor in wanted.items():
                # rounding of a sum may move a byte to its neighbour
                close = {"rtol": 0, "atol": 1} if tensor.dtype == torch.uint8 else {"rtol": 1e-5, "atol": 1e-6}
                torch.testing.assert_close(
                    found[name], tensor, **close, msg=lambda text, at=f"{kind} {name}": f"{at}: {text}"
                )


def fsdp_on_ranks() -> None:
    """A model that FSDP spreads learns as it does alone."""
    alone, model = network(), network()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    follow(alone, optimizer_of(alone), range(3))
    follow(model, optimizer_of(model), range(3))
    for wanted, found in zip(alone.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found.full_tensor(), wanted, rtol=1e-5, atol=1e-6)


def uneven_blocks_on_ranks() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    cut = nn.Parameter(distribute_tensor(torch.randn(128, 64), mesh, [Shard(1)]))
    with pytest.raises(DanluError, match="rows of 64 are cut into 2 parts, which are no multiples of 64"):
        Optimizer({"cut": cut}, {}, OptimizerSettings(state="8bit"))


def checks_on_ranks(kinds: list[dict[str, Any]]) -> None:
    on_ranks(kinds)
    fsdp_on_ranks()
    uneven_blocks_on_ranks()


def test_every_rule_makes_the_same_update_on_two_processes():
    run_ranks(2, checks_on_ranks, [kind | {"factors": {"rows": 0.5}} for kind in KINDS])
