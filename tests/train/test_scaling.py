"""Loss scaling: moves as torch's GradScaler does, learns what fp16 alone cannot, resumes exactly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from danlu.data.stream import Batch
from danlu.errors import DanluError
from danlu.model.config import ModelConfig
from danlu.model.initialize import initialize
from danlu.model.transformer import Decoder
from danlu.plan.plan import Plan
from danlu.train.loop import Run, Turn, train
from danlu.train.mesh import make_mesh
from danlu.train.objective import next_token
from danlu.train.optimizer import Optimizer
from danlu.train.optimizing.settings import OptimizerSettings
from danlu.train.precision import Choice, Precision
from danlu.train.replica import Replica
from danlu.train.scaling import LossScale, ScalingSettings, _fits_float8, to_float8
from danlu.train.state import Checkpoints
from danlu.train.weights import masters_and_copies
from tests.train.ranks import run_ranks
from tests.train.tiny_run import here

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


def test_a_precision_is_kept_by_name() -> None:
    for asked in get_args(Choice):
        chosen = Precision.choose(asked)
        assert Precision.read(json.loads(json.dumps(chosen.plain()))) == chosen
        assert chosen.float8 == (asked == "float8")
    assert Precision.choose("fp16").dtype == torch.float16
    for bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):  # as earlier versions wrote it
        assert Precision.read({"bf16": bf16, "precision": "measured"}) == Precision(dtype, "measured")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_float8_says_what_it_needs() -> None:
    with pytest.raises(DanluError, match=r"compute capability 8\.9 or more .* there is no CUDA GPU"):
        to_float8(nn.Linear(16, 16))


def test_float8_leaves_routers_and_odd_sizes_alone() -> None:
    assert _fits_float8(nn.Linear(64, 32), "blocks.0.feedforward.up")
    assert not _fits_float8(nn.Linear(64, 32), "blocks.0.feedforward.router")
    assert not _fits_float8(nn.Linear(64, 24), "blocks.0.feedforward.up")


# --- In the loop ----------------------------------------------------------------------------------------------------

RECIPE = """
name: tiny
model:
  architecture: LlamaForCausalLM
  shape: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32,
          max_position_embeddings: 16}
data: {sources: text.txt, vocabulary: bytes, heldout: 10%, heldout_from: end}
batch: {rows: 4, window: 16}
steps: 14
precision: fp16
scaling: {start: 16777216}
compile: off
validation: {rows: 8}
"""


class Words:
    """The same four rows every step."""

    def __init__(self, reader: int = 0, readers: int = 1) -> None:
        tokens = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(0))
        own = tokens.chunk(readers)[reader]
        whole = torch.ones(len(own), 16, dtype=torch.int32)
        self.rows = Batch(own[:, :-1], own[:, 1:], whole, torch.arange(16).expand(len(own), -1))

    def batch(self, step: int) -> Batch:
        return self.rows


def make_run(
    out: Path,
    dtype: torch.dtype,
    steps: int,
    scaling: ScalingSettings | None = None,
    plan: str = "data=1",
    float8: bool = False,
) -> Run:
    mesh = make_mesh(Plan.model_validate(Plan.parse(plan)))
    model = Decoder(CONFIG)
    initialize(model, "normal", 3)
    if float8:
        to_float8(model, emulated=True)
    shape = {"rows": 4 // mesh.plan.readers, "length": 16}
    replica = Replica(model, [next_token], mesh, dtype=dtype, batch=Batch, **shape)
    optimizer = Optimizer(*masters_and_copies(replica, dtype), OptimizerSettings())
    scale = LossScale(scaling or ScalingSettings()) if dtype == torch.float16 else None
    return Run(
        replica,
        [Turn(optimizer, lambda step: 1e-2, clip=1.0, scale=scale)],
        Words(mesh.reader, mesh.plan.readers),
        steps=steps,
        seed=0,
        checkpoints=Checkpoints(out / "checkpoints", 1, background=False),
        checkpoint_steps=4,
        out=out,
    )


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_fp16_follows_fp32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a factor that is too large at first, steps are skipped until it is not; then all is as in fp32.

    The guard, which stops at the first number that is none, has nothing to say to that.
    """
    train(make_run(tmp_path / "fp32", torch.float32, 10, ScalingSettings()))
    train(make_run(tmp_path / "fp16", torch.float16, 20, ScalingSettings(start=2.0**24)))
    wanted, found = lines(tmp_path / "fp32"), lines(tmp_path / "fp16")
    skipped = [line for line in found if "skipped" in line]
    assert 0 < len(skipped) <= 10 and skipped[0] == found[0]
    assert skipped[0]["skipped"] == "its gradient overflows where the loss is multiplied by 1.67772e+07"
    assert "step 1 is skipped: its gradient overflows" in capsys.readouterr().err
    learned = [line for line in found if "skipped" not in line][:10]
    assert wanted[-1]["loss"] < 0.6 * wanted[0]["loss"]
    for name, tolerance in (("loss", 2e-2), ("gradient_norm", 5e-2)):
        assert [line[name] for line in learned] == pytest.approx([line[name] for line in wanted], rel=tolerance)


def test_fp16_resumes_to_the_bit(tmp_path: Path) -> None:
    scaling = ScalingSettings(start=2.0**22, every=2)  # falls at first, and rises and falls again and again
    whole = make_run(tmp_path / "whole", torch.float16, 12, scaling)
    train(whole)
    for steps in (6, 12):
        last = make_run(tmp_path / "cut", torch.float16, steps, scaling)
        train(last)
    names = ("loss", "gradient_norm", "skipped")
    curves = [[[line.get(name) for name in names] for line in lines(tmp_path / run)] for run in ("whole", "cut")]
    assert str(curves[0]) == str(curves[1])
    assert len({line[2] for line in curves[0]}) > 2  # more than one factor was too large
    state = whole.state()
    assert {"loss_scale", "loss_scale.good"} <= set(state)
    assert all(torch.equal(tensor, last.state()[name]) for name, tensor in state.items())


def test_a_loss_that_is_no_number_is_left_to_the_guard(tmp_path: Path) -> None:
    run = make_run(tmp_path, torch.float16, 2, ScalingSettings())
    with torch.no_grad():
        run.turns[0].optimizer.masters["norm.weight"].fill_(float("nan"))
    run.turns[0].optimizer.refresh()
    with pytest.raises(DanluError, match="step 1: loss nan"):
        train(run)
    scale = run.turns[0].scale
    assert scale is not None and float(scale.factor) == 2.0**16


def spread(out: str, plan: str) -> tuple[float, float, float | None]:
    run = make_run(Path(out), torch.float16, 16, ScalingSettings(start=2.0**24), plan)
    done = train(run)
    scale = run.turns[0].scale
    assert scale is not None
    return float(scale.factor), float(scale.good), done.loss


@pytest.mark.parametrize("plan", ["shard=2", "pipeline=2,micro_batches=2"])
def test_processes_scale_alike(tmp_path: Path, plan: str) -> None:
    found = run_ranks(2, spread, str(tmp_path), plan)
    assert found[0][:2] == found[1][:2] and found[0][0] < 2.0**24
    told = lines(tmp_path)
    learned = [line["loss"] for line in told if "skipped" not in line]
    assert len(learned) < 16 and learned[-1] < 0.7 * learned[0]
    assert all(line["gradient_norm"] < 100 for line in told if "skipped" not in line)  # the factor is off again


def test_a_recipe_in_fp16(tmp_path: Path) -> None:
    """The command skips what overflows, learns the rest, and writes a model."""
    (tmp_path / "text.txt").write_text("the furnace 丹炉 turns ore into silver. " * 300, encoding="utf-8")
    (tmp_path / "tiny.yaml").write_text(RECIPE, encoding="utf-8")
    here(tmp_path / "tiny.yaml", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "decisions.json").read_text())["dtype"] == "float16"
    told = lines(tmp_path / "run")
    skipped = [line["skipped"] for line in told if "skipped" in line]
    assert 3 < len(skipped) < 14 and all("skipped" in line for line in told[:4])
    assert told[-1]["step"] == 14
    halved = [f"{2.0**24 / 2**fall:g}" for fall in range(len(skipped))]
    assert [one.split()[-1] for one in skipped] == halved
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def curve(out: Path, plan: str, float8: bool) -> list[float]:
    """Losses of forty steps in bf16."""
    run = make_run(out, torch.bfloat16, 40, plan=plan, float8=float8)
    train(run)
    assert set(run.replica.parameters()) == {name for name, _ in Decoder(CONFIG).named_parameters()}
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("plan", ["data=1", pytest.param("shard=2", marks=pytest.mark.soak)])
def test_float8_learns_what_bf16_does(plan: str, tmp_path: Path) -> None:
    """Products are rounded as the hardware does it, and summed in full precision: what is to be seen without it."""
    pytest.importorskip("torchao", reason="the extra danlu[float8] is not installed")
    plain, rounded = (curve(tmp_path / str(number), "data=1", bool(number)) for number in range(2))
    assert rounded != plain and rounded[-1] < 0.5 * rounded[0]
    assert all(abs(mine - expected) < 0.05 * plain[0] for mine, expected in zip(rounded, plain, strict=True))
    if plan != "data=1":
        split = run_ranks(2, curve, tmp_path / "split", plan, True)[0]
        assert all(abs(mine - expected) < 0.02 * plain[0] for mine, expected in zip(split, rounded, strict=True))
