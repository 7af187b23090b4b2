"""Loss scaling: moves as torch's GradScaler does, learns what fp16 alone cannot, resumes exactly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from danlu.errors import DanluError
from danlu.train.scaling import LossScale, ScalingSettings, _fits_float8, to_float8
from danlu.train.state import Checkpoints


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=40), st.integers(1, 5))
def test_moves_as_grad_scaler_does(overflows: list[bool], every: int) -> None:
    ours = LossScale(ScalingSettings(start=2.0**20, every=every, least=1e-30))
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=every)
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for overflow in overflows:
        weight.grad = None
        theirs.scale((weight * (math.inf if overflow else 1.0)).sum()).backward()
        assert weight.grad is not None
        gradient = weight.grad.clone()
        norm = ours.unscale({"weight": gradient}, float(gradient.norm()))
        theirs.unscale_(optimizer)
        if not overflow:
            assert torch.equal(gradient, weight.grad)
            assert norm == float(weight.grad.norm())
        theirs.step(optimizer)
        theirs.update()
        ours.update(not math.isfinite(norm))
        assert float(ours.factor) == theirs.get_scale()


def test_the_factor_never_grows_out_of_its_range() -> None:
    scale = LossScale(ScalingSettings(start=2.0**127, every=1))
    scale.update(False)
    assert float(scale.factor) == 2.0**127


def test_small_gradients_survive() -> None:
    """A gradient of 1e-8 is 0 in fp16; with the factor it comes out to fp16's precision."""

    def gradient(scale: LossScale) -> float:
        weight = nn.Parameter(torch.ones(1, dtype=torch.float16))
        ((weight * torch.tensor(1e-4, dtype=torch.float16)).float().sum() * 1e-4 * scale.factor).backward()
        assert weight.grad is not None
        wide = {"weight": weight.grad.float()}
        scale.unscale(wide, 1.0)
        return float(wide["weight"])

    assert gradient(LossScale(ScalingSettings(start=1.0))) == 0
    assert gradient(LossScale()) == pytest.approx(1e-8, rel=2e-3)


def test_overflow_that_no_factor_cures_stops_the_run() -> None:
    scale = LossScale(ScalingSettings(start=1.0, least=0.25))
    scale.update(True)
    scale.update(True)
    with pytest.raises(DanluError, match=r"not finite even where the loss is multiplied by 0\.125"):
        scale.update(True)


def test_resumes_where_it_was(tmp_path) -> None:
    kept, overflows = LossScale(ScalingSettings(every=3)), [False, True, False, False]
    for overflow in overflows:
        kept.update(overflow)
    checkpoints = Checkpoints(tmp_path, 1, background=False)
    checkpoints.save(4, kept.state(), {})
    resumed = LossScale(ScalingSettings(every=3))
    saved = checkpoints.open()
    assert saved is not None
    saved.read_into(resumed.state())
    for scale in (kept, resumed):
        scale.update(False)
        assert float(scale.factor) == 2.0**16
        assert int(scale.good) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_float8_says_what_it_needs() -> None:
    with pytest.raises(DanluError, match=r"compute capability 8\.9 or more .* there is no CUDA GPU"):
        to_float8(nn.Linear(16, 16))


def test_float8_leaves_routers_and_odd_sizes_alone() -> None:
    assert _fits_float8(nn.Linear(64, 32), "blocks.0.feedforward.up")
    assert not _fits_float8(nn.Linear(64, 32), "blocks.0.feedforward.router")
    assert not _fits_float8(nn.Linear(64, 24), "blocks.0.feedforward.up")
