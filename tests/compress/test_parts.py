"""Tensors one after another, in memory or in a file, are what was put there."""

from __future__ import annotations

import pytest
import torch

from danlu.compress import parts
from danlu.compress.compensate import Inputs
from danlu.compress.parts import Parts


@pytest.mark.parametrize("room", [0, 100, 2**20], ids=["in a file", "in a file from the fourth on", "in memory"])
def test_they_are_read_as_they_were_put(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "ROOM", room)
    put = [torch.randn(2, 3), torch.randn(3, 2).mT, torch.randn(4, 5).bfloat16(), torch.randn(1, 7)]
    made = Parts(put)
    assert len(made) == 4 and all(torch.equal(x, y) for x, y in zip(made, put, strict=True))
    made[1] = torch.ones(2, 3)
    made.append(torch.arange(3))
    expected = [put[0], torch.ones(2, 3), put[2], put[3], torch.arange(3)]
    for _ in range(2):
        assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(made, expected, strict=True))


def test_others_than_were_there_are_a_fault() -> None:
    made = Parts([torch.zeros(2)])
    with pytest.raises(AssertionError):
        made[0] = torch.zeros(3)
    with pytest.raises(IndexError):
        made[1]


@pytest.mark.parametrize("room", [0, 2**30], ids=["in a file", "in memory"])
def test_products_of_inputs_are_read_row_by_row(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damped, whichever rows are asked for; and the factor is of the inverse of the same."""
    monkeypatch.setattr(parts, "ROOM", room)
    given = torch.randn(400, 100, generator=torch.Generator().manual_seed(0))
    products = given.T @ given
    damped = products + 0.01 * products.diagonal().mean() * torch.eye(100)
    inputs = Inputs(products.clone())
    for start, end in ((0, 100), (0, 32), (30, 70), (96, 100), (99, 100)):
        torch.testing.assert_close(inputs.products(start, end), damped[start:end])
    torch.testing.assert_close(inputs.factor.mT @ inputs.factor, torch.linalg.inv(damped), rtol=1e-4, atol=1e-7)
