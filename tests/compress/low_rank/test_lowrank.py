"""Thin matrices: exact at full rank, losing what the theory says, and less than a plain SVD."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from danlu.compress.compensate import DAMPING
from danlu.compress.low_rank import matrices
from danlu.compress.low_rank.convolutions import Way, convolution_numbers, decompose
from danlu.compress.low_rank.matrices import Factored, allot, check_share, load_factored, lower_rank, numbers, spectrum
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint
from tests.compress.short import OTHER, TEXT, divergence


def seen(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix [24, 16] and inputs [999, 16] that go together."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(16, 16, generator=generator) * torch.logspace(0, -1, 16)[:, None]
    return torch.randn(24, 16, generator=generator), torch.randn(999, 16, generator=generator) @ mixing


def test_nothing_is_lost_at_full_rank_and_else_the_rest_of_the_spectrum() -> None:
    weight, inputs = seen()
    products = inputs.T @ inputs
    made = spectrum(weight, products)
    assert torch.allclose(made.cut(16), weight, atol=1e-4)
    damped = products + DAMPING * products.diagonal().mean() * torch.eye(16)
    for rank in (1, 5, 12):
        error = made.cut(rank) - weight
        assert float(torch.trace(error @ damped @ error.T)) == pytest.approx(float(made.lost[rank:].sum()), rel=1e-3)
        plain = torch.linalg.svd(weight, full_matrices=False)
        cut = (plain.U[:, :rank] * plain.S[:rank]) @ plain.Vh[:rank]
        assert (error @ inputs.T).square().sum() < ((cut - weight) @ inputs.T).square().sum()


def test_ranks_go_where_they_are_worth_most_and_keep_to_the_budget() -> None:
    spectra = {"flat": torch.full((20,), 1.0), "steep": torch.logspace(2, -4, 20), "dear": torch.logspace(2, -4, 20)}
    shapes = {"flat": (40, 20), "steep": (20, 30), "dear": (20, 30)}
    for share in (0.3, 0.5, 0.8):
        ranks = allot(spectra, shapes, {"flat": 1.0, "steep": 1.0, "dear": 100.0}, share)
        assert numbers(ranks, shapes) <= share * sum(high * wide for high, wide in shapes.values())
        assert (ranks["dear"] or 99) > (ranks["steep"] or 99) or ranks["dear"] == ranks["steep"] == 0
    least = (40 + 20 + 2 * (20 + 30)) / (40 * 20 + 2 * 20 * 30)
    check_share(least, shapes)
    assert allot(spectra, shapes, dict.fromkeys(shapes, 1.0), least) == dict.fromkeys(shapes, 1)
    with pytest.raises(DanluError, match=r"too little: matrices of rank 1 have 0\.08 of the numbers"):
        check_share(least - 1e-6, shapes)
    check_share(0.99999, {"a row": (1, 30)} | shapes)  # which rank 1 would only make larger


def test_a_real_model_is_nearer_than_by_a_plain_svd_and_comes_back(
    short: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = lower_rank(short, 0.6, TEXT, tmp_path / "thin", tokens=4096)
    assert made.figures["share"]["value"] <= 0.6
    dense, thin = Checkpoint.open(made.path), load_factored(made.path)
    assert made.figures["parameters"]["value"] == sum(weight.numel() for weight in thin.parameters())
    assert (tmp_path / "thin" / "factored.safetensors").stat().st_size < 4.1 * made.figures["parameters"]["value"]
    ids = torch.tensor([short.tokenizer.encode(OTHER, special=False)[:128]])
    with torch.inference_mode():
        assert torch.allclose(thin.logits(thin(ids)), (model := dense.load()).logits(model(ids)), atol=1e-3)
    monkeypatch.setattr(matrices, "spectrum", lambda weight, products: spectrum(weight, torch.eye(len(products))))
    plain = Checkpoint.open(lower_rank(short, 0.6, TEXT, tmp_path / "plain", tokens=4096).path)
    assert divergence(short, dense) < 0.7 * divergence(short, plain)

    layers = [module for module in thin.modules() if isinstance(module, Factored)]
    assert len(layers) + made.figures["whole"]["value"] == 14
    optimizer = torch.optim.AdamW([weight for layer in layers for weight in layer.parameters()], 1e-3)
    losses = []
    for _ in range(3):
        said = thin.train().logits(thin(ids[:, :-1]))
        loss = nn.functional.cross_entropy(said.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0], "thin matrices learn"


def test_what_cannot_be_made_thin_is_said(short: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("nothing must be read or computed")

    monkeypatch.setattr(matrices, "calibration_rows", never)
    with pytest.raises(DanluError, match="matrices of rank 1 have") as problem:
        lower_rank(short, 0.001, TEXT, tmp_path / "thin")
    assert "say 80%" in str(problem.value) and not list(tmp_path.iterdir())
    with pytest.raises(DanluError, match="share of 1"):
        lower_rank(short, 1.0, TEXT, tmp_path / "thin")
    with pytest.raises(DanluError, match="no model of low rank"):
        load_factored(short.path)
    with pytest.raises(DanluError, match="no convolution"):
        decompose(nn.Linear(3, 3), 0.5)


# --- Convolutions ---------------------------------------------------------------------------------------------------


def pictures(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(inputs)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("way", ["tucker", "cp"])
def test_convolutions_of_low_rank_are_found_out(way: Way, stride: int) -> None:
    """A kernel that is a sum of few: taken apart with as many numbers as those need, nothing is lost."""
    pytest.importorskip("tensorly", reason="the extra danlu[lowrank] is not installed")
    generator = torch.Generator().manual_seed(1)
    back, into, high, wide = (torch.randn(size, 2, generator=generator) for size in (24, 16, 3, 3))
    layer = nn.Conv2d(16, 24, 3, stride, padding=1, dilation=1)
    layer.weight.data = torch.einsum("or,ir,hr,wr->oihw", back, into, high, wide)
    model = nn.Sequential(layer, nn.ReLU(), nn.Conv2d(24, 4, 1))
    made, ranks = decompose(model, 0.1, way)
    assert set(ranks) == {"0"}, "what looks at single pixels stays"
    inputs = torch.randn(2, 16, 9, 7, generator=generator)
    one, other = pictures(model, inputs), pictures(made, inputs)
    assert one.shape == other.shape and (one - other).norm() < 1e-2 * one.norm()
    first = made.get_submodule("0")
    assert convolution_numbers(first) <= 0.1 * layer.weight.numel()


def test_more_numbers_lose_less_of_a_network() -> None:
    pytest.importorskip("tensorly", reason="the extra danlu[lowrank] is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1))
    inputs = torch.randn(2, 3, 12, 12)
    whole = pictures(model, inputs)
    lost = [float((pictures(decompose(model, share)[0], inputs) - whole).norm()) for share in (0.2, 0.5, 0.9)]
    assert lost == sorted(lost, reverse=True) and lost[-1] < 0.8 * lost[0]
