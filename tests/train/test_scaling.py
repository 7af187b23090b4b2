"""Loss scaling: moves as torch's GradScaler does, learns what fp16 alone cannot, resumes exactly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from danlu.data.stream import Batch
from danlu.errors import DanluError
from danlu.model.config import ModelConfig
from danlu.model.transformer import Decoder
from danlu.train.objective import next_token
from danlu.train.optimizer import Optimizer, clip, masters_of, square_sum
from danlu.train.optimizing.settings import OptimizerSettings
from danlu.train.scaling import LossScale, ScalingSettings, _fits_float8, to_float8
from danlu.train.state import Checkpoints

CONFIG = ModelConfig(
    vocab_size=64, context=16, width=32, layers=2, heads=4, kv_heads=2, head_width=8, feedforward_width=64, tied=True
)


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


def test_fp16_follows_fp32() -> None:
    """In fp16 with a factor that is too large at first, steps are skipped until it is not; then all is as in fp32."""
    tokens = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(4, 16, dtype=torch.int32), torch.arange(16).expand(4, -1))

    def learn(dtype: torch.dtype, steps: int) -> tuple[list[float], int]:
        torch.manual_seed(1)
        model = Decoder(CONFIG)
        with torch.no_grad():
            model.embedding.tokens.weight.mul_(0.02)
        optimizer = Optimizer(*masters_of(model, dtype), OptimizerSettings())
        scale, losses, skipped = LossScale(ScalingSettings(start=2.0**24 if dtype == torch.float16 else 1.0)), [], 0
        while len(losses) < steps:
            loss = next_token(model, batch)
            (loss.sum / loss.count * scale.factor).backward()
            gradients = optimizer.gradients()
            norm = scale.unscale(gradients, float(square_sum(gradients).sqrt()))
            overflow = not math.isfinite(norm)
            if overflow:
                skipped += 1
            else:
                losses.append(float(loss.sum.detach()) / loss.count)
                clip(gradients, norm, 1.0)
                optimizer.step(1e-2)
            optimizer.zero()
            scale.update(overflow)
        return losses, skipped

    wanted, _ = learn(torch.float32, 12)
    found, skipped = learn(torch.float16, 12)
    assert skipped > 0
    assert wanted[-1] < 0.6 * wanted[0]
    assert found == pytest.approx(wanted, rel=2e-2)
