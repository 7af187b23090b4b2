"""What layers are given in two models, put together a piece at a time."""

from __future__ import annotations

import pytest
import torch

from danlu.compress import beside, parts
from danlu.compress.compensate import CAUTION
from danlu.compress.parts import Parts


@pytest.mark.parametrize("room", [0, 2**30], ids=["in files", "in memory"])
@pytest.mark.parametrize("numbers", [1, 300 * 700, 2**26], ids=["256 rows at once", "the same, rounded down", "all"])
def test_wide_layers_are_aimed_at_a_piece_at_a_time(room: int, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights come out as by the whole matrices in double precision, however few rows are in memory at once."""
    monkeypatch.setattr(parts, "ROOM", room)
    monkeypatch.setattr(beside, "DRIFT", numbers)
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(6, 200, 700, generator=generator)
    after = before + 0.3 * torch.randn(before.shape, generator=generator) @ torch.rand(700, 700, generator=generator)
    weight = torch.randn(40, 700, generator=generator)

    inputs = beside._inputs(Parts(before.split(2)), Parts(after.split(2)))

    x, y = (each.reshape(-1, 700).double() for each in (before, after))
    products = y.T @ y
    damped = products + CAUTION * products.diagonal().mean() * torch.eye(700)
    expected = weight + weight.double() @ ((x - y).T @ y) @ damped.inverse()
    assert inputs is not None
    torch.testing.assert_close(inputs.aim(weight), expected.float(), rtol=1e-3, atol=1e-3)
    assert float((expected - weight).abs().mean()) > 0.1, "there is something to aim at"


def test_layers_that_are_given_zeros_have_no_inputs() -> None:
    assert beside._inputs(Parts([torch.ones(2, 8)]), Parts([torch.zeros(2, 8)])) is None
