"""Schedules: parity with torch.optim.lr_scheduler, their ends, and a plateau's exact resume."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.optim import lr_scheduler

from danlu.train.optimizing.settings import SHAPES, ScheduleSettings
from danlu.train.schedule import Schedule, learning_rate
from danlu.train.settings import TuneSettings

STEPS = 40


def rates(steps: int = STEPS, highest: float = 2.0, **settings: Any) -> list[float]:
    schedule = Schedule(ScheduleSettings(**settings), highest, steps)
    return [schedule.rate(step) for step in range(steps)]


def torch_rates(make: Any) -> list[float]:
    """What one of torch's schedulers makes of the same highest rate."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = make(optimizer)
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("settings", "make"),
    [
        ({"kind": "constant"}, lambda o: lr_scheduler.ConstantLR(o, 1.0)),
        ({"kind": "linear", "final_share": 0.2}, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, STEPS - 1)),
        ({"kind": "cosine", "final_share": 0.2}, lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS - 1, 0.4)),
        (
            {"kind": "exponential", "final_share": 0.2},
            lambda o: lr_scheduler.ExponentialLR(o, 0.2 ** (1 / (STEPS - 1))),
        ),
        (
            {"kind": "step", "milestones": (0.25, "50%"), "drop": 0.3},
            lambda o: lr_scheduler.MultiStepLR(o, [10, 20], 0.3),
        ),
        (
            {"kind": "wsd", "fall": 0.25, "final_share": 0.2},
            lambda o: lr_scheduler.SequentialLR(
                o, [lr_scheduler.ConstantLR(o, 1.0), lr_scheduler.LinearLR(o, 1.0, 0.2, 10)], [29]
            ),
        ),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_equals_torch(settings, make):
    assert rates(warmup=0, **settings) == pytest.approx(torch_rates(make), rel=1e-9)


@pytest.mark.parametrize("warm", [1, 8])
def test_inverse_square_root_is_that_of_the_transformer(warm):
    """arXiv:1706.03762, equation 3, scaled so that its highest is ours."""
    paper = [min((step + 1) ** -0.5, (step + 1) * warm**-1.5) * warm**0.5 for step in range(STEPS)]
    assert rates(kind="inverse_sqrt", warmup=warm / STEPS, highest=1.0) == pytest.approx(paper)


@given(st.sampled_from(sorted(set(SHAPES) - {"plateau"})), st.integers(1, 200), st.floats(0, 0.5), st.floats(1e-6, 10))
def test_every_schedule_rises_then_never_rises_again(kind, steps, warmup, highest):
    found = rates(steps, highest, kind=kind, warmup=warmup)
    warm = math.ceil(steps * warmup)
    assert len(found) == steps and all(0 <= rate <= highest * (1 + 1e-9) for rate in found)
    assert all(a < b for a, b in pairwise(found[:warm]))
    assert all(a >= b - 1e-12 for a, b in pairwise(found[max(warm - 1, 0) :]))
    if SHAPES[kind].get("final_share") and steps - warm > 1:
        assert found[-1] == pytest.approx(highest * 0.1)


@given(st.sampled_from(sorted(SHAPES)), st.integers(1, 60), st.floats(0, 0.99), st.integers(0, 200))
def test_behind_its_end_a_schedule_stays_where_it_is(kind, steps, warmup, behind):
    assume(kind != "wsd" or warmup <= 0.9)
    schedule = Schedule(ScheduleSettings(kind=kind, warmup=warmup), 2.0, steps)
    later = schedule.rate(steps + behind)
    assert 0 <= later == schedule.rate(steps) <= schedule.rate(steps - 1)
    if math.ceil(steps * warmup) < steps:
        assert later == schedule.rate(steps - 1)


LOSSES = [
    float("nan"),
    3.0,
    2.5,
    2.6,
    2.5,
    2.51,
    2.4,
    float("nan"),
    2.41,
    2.42,
    2.43,
    2.39,
    2.39,
    2.39,
    2.39,
    2.39,
    2.39,
    2.39,
]


@pytest.mark.parametrize("patience", [0, 2])
def test_plateau_equals_torch(patience):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    theirs = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=patience, threshold=1e-3, min_lr=0.01)
    settings = ScheduleSettings(
        kind="plateau", warmup=0, drop=0.3, patience=patience, threshold=1e-3, final_share=0.005
    )
    ours = Schedule(settings, 2.0, STEPS)
    for step, loss in enumerate(LOSSES):
        theirs.step(loss)
        ours.observe(loss)
        assert ours.rate(step) == pytest.approx(optimizer.param_groups[0]["lr"])
    assert ours.drops >= 1


@pytest.mark.parametrize("cut", range(len(LOSSES)))
def test_plateau_resumes_exactly(cut):
    settings = ScheduleSettings(kind="plateau", patience=1)
    straight, before, after = (Schedule(settings, 1.0, STEPS) for _ in range(3))
    for loss in LOSSES[:cut]:
        before.observe(loss)
    after.load(json.loads(json.dumps(before.state(), allow_nan=False)))
    for loss in LOSSES[cut:]:
        after.observe(loss)
    for loss in LOSSES:
        straight.observe(loss)
    assert after.state() == straight.state() and after.rate(STEPS - 1) == straight.rate(STEPS - 1)


def test_validation_moves_no_other_schedule():
    schedule = Schedule(ScheduleSettings(kind="cosine"), 1.0, STEPS)
    before = [schedule.rate(step) for step in range(STEPS)]
    for loss in LOSSES:
        schedule.observe(loss)
    assert [schedule.rate(step) for step in range(STEPS)] == before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "cosine", "patience": 2}, "patience has no effect where kind is cosine; it belongs to plateau"),
        ({"kind": "exponential", "final_share": 0}, "never reaches 0"),
        ({"kind": "wsd", "warmup": 0.6, "fall": 0.5}, "do not fit in one run"),
        ({"kind": "step", "milestones": (1.5,)}, "between 0 and 1"),
        ({"kind": "sine"}, "Input should be 'constant'"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(settings, said):
    with pytest.raises(ValidationError, match=said):
        ScheduleSettings(**settings)


@pytest.mark.parametrize("kind", SHAPES)
def test_settings_written_out_are_read_again(kind):
    settings = ScheduleSettings(kind=kind)
    assert ScheduleSettings(**settings.plain()) == settings


def test_tuning():
    def tuned(**changes: Any) -> list[float]:
        settings = TuneSettings(learning_rate=1.0, warmup=0.2, final_share=0.1, **changes)
        return [learning_rate(step, 10, settings) for step in range(10)]

    for kind in ("constant", "linear", "cosine"):
        found = tuned(schedule=kind)
        assert found[:2] == [0.5, 1.0] and found[2] == 1.0
        assert found[-1] == pytest.approx(1.0 if kind == "constant" else 0.1)
        assert all(a >= b for a, b in pairwise(found[1:]))
    assert tuned(schedule="linear")[5] == pytest.approx(1 - 3 / 7 * 0.9)
