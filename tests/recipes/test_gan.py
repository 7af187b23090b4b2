"""Two models that learn against each other, each in its own turn of a step."""

from __future__ import annotations

from pathlib import Path

import gan
import pytest
import torch
import torch.nn.functional as F
from common import Task, chance, fit, take_turn
from torch import nn

from danlu.model.module import load_weights
from danlu.train.optimizing.settings import OptimizerSettings, ScheduleSettings
from danlu.train.replica import Replica


def models() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"judge": gan.layers(2, 1), "maker": gan.layers(gan.NOISE, 2)})


def near_each_mode(out: Path) -> torch.Tensor:
    """The share of the points that the maker left there makes within 0.3 of each centre."""
    made = models()
    load_weights(made, out / "gan.safetensors")
    with torch.no_grad():
        distance, mode = torch.cdist(
            made["maker"](torch.randn(8000, gan.NOISE, generator=chance(9))), gan.centres()
        ).min(-1)
    return mode[distance < 0.3].bincount(minlength=gan.MODES) / len(mode)


def test_points_come_to_lie_near_every_mode(tmp_path: Path) -> None:
    gan.learn(Task(tmp_path, 800))
    shares = near_each_mode(tmp_path)
    assert shares.min() > 0.02 and shares.sum() > 0.5


@pytest.mark.soak
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_points_come_to_lie_on_every_mode(seed: int, tmp_path: Path) -> None:
    figures = gan.learn(Task(tmp_path, 10_000, seed))
    assert figures["modes"]["value"] == 8 and figures["near"]["value"] > 0.6


@pytest.mark.parametrize(("learner", "objective"), [("judge", gan.judging), ("maker", gan.making)])
def test_a_turn_changes_its_own_model_only(learner: str, objective: object, tmp_path: Path) -> None:
    both, before = models(), models()
    settings = OptimizerSettings(name="adam", learning_rate=1e-2)
    turn = take_turn(dict(both[learner].named_parameters(learner)), 3, settings, ScheduleSettings(kind="constant"))
    fit(Task(tmp_path, 3), "gan", Replica(both, [objective]), [turn], gan.Ring(0, 3))
    for (name, one), other in zip(both.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other) == (not name.startswith(learner)), name


def test_the_objectives_are_those_of_the_papers() -> None:
    both, batch = models(), gan.Ring(1, 16).batch(4)
    both["judge"] = linear = nn.Linear(2, 1)  # its slope is its weight, everywhere
    assert batch.blur.abs().max() > 0
    assert not gan.Ring(1, 16).batch(8).blur.any(), "sharp after half of the steps"
    # Noise is alike for both, drawn for the one and turned around for the other, so that no pair shares it.
    real, made = (
        both["judge"](points + noise)
        for points, noise in ((batch.real, batch.blur), (both["maker"](batch.noise), batch.blur.flip(0)))
    )
    says, denies = torch.ones_like(real), torch.zeros_like(real)
    judging, making = gan.judging(both, batch, penalty=0.5), gan.making(both, batch)
    wrong = F.binary_cross_entropy_with_logits(real, says, reduction="sum")
    wrong = wrong + F.binary_cross_entropy_with_logits(made, denies, reduction="sum")
    torch.testing.assert_close(judging.sum, wrong)
    torch.testing.assert_close(judging.penalty, 0.25 * gan.ROWS * linear.weight.square().sum())
    torch.testing.assert_close(making.sum, F.binary_cross_entropy_with_logits(made, says, reduction="sum"))
    judging.sum.backward()
    assert all(weight.grad is None for weight in both["maker"].parameters())


def test_quality_of_what_is_known() -> None:
    def real(noise: torch.Tensor) -> torch.Tensor:
        return gan.centres()[torch.arange(len(noise)) % gan.MODES] + gan.SPREAD * noise

    near, covered = gan.quality(real, 0)
    assert near == pytest.approx(1 - torch.tensor(-4.5).exp().item(), abs=0.005) and covered == gan.MODES
    assert gan.quality(lambda noise: torch.zeros_like(noise), 0) == (0.0, 0)
    assert gan.quality(lambda noise: gan.centres()[:1].expand_as(noise), 0) == (1.0, 1)
