"""Plans: how they are written, which are refused, and what is offered instead."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.errors import DanluError
from danlu.model.config import EncoderDecoderConfig, Experts, ModelConfig, Patches
from danlu.plan.plan import DEGREES, Plan, Work, check, nearest_plan, problems
from danlu.plan.stages import cut

DENSE = ModelConfig(
    vocab_size=320, width=64, layers=6, heads=8, kv_heads=4, head_width=8, feedforward_width=96, context=128
)
MIXTURE = replace(DENSE, experts=Experts(6, 2, 32))
BOTH = EncoderDecoderConfig(replace(DENSE, causal=False), replace(DENSE, cross=True), 0)
SMALL = st.sampled_from((1, 2, 3, 4, 8))


def test_it_is_written_and_read_alike() -> None:
    plan = Plan.read(Plan.parse("tensor=2, pipeline=2,micro_batches=4,schedule=zero-bubble,sequence=false"))
    assert (plan.tensor, plan.pipeline, plan.sequence, plan.world, plan.all_stages) == (2, 2, False, 4, 2)
    assert Plan.read(Plan.parse(plan.short())) == plan
    assert Plan().short() == "data=1"


@given(st.fixed_dictionaries({name: SMALL for name in DEGREES}))
def test_degrees_multiply_to_the_world(degrees: dict[str, int]) -> None:
    plan = Plan(**degrees)
    assert plan.world == plan.readers * plan.tensor * plan.pipeline * plan.context
    assert Plan.read(Plan.parse(plan.short())) == plan


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tensr=2", r"tensr=2 is no part of a plan\n  did you mean tensor\?"),
        ("tensor", "tensor is no part of a plan"),
        ("tensor=0", "tensor=0: input should be greater than or equal to 1"),
        ("tensor=two", "tensor=two: input should be a valid integer"),
        ("stages=2", "schedule 1f1b holds one stage a process"),
        ("schedule=interleaved,pipeline=2", "set stages=2 or more"),
        ("schedule=zero-bubble", "schedule and stages are for pipelines"),
    ],
)
def test_what_is_no_plan_is_said(text: str, told: str) -> None:
    with pytest.raises(DanluError, match=told):
        Plan.read(Plan.parse(text))


@pytest.mark.parametrize(
    ("plan", "config", "told"),
    [
        (Plan(tensor=8), DENSE, "4 key/value heads cannot be cut into tensor=8"),
        (Plan(pipeline=8), DENSE, "6 layers cannot fill 8 stages"),
        (Plan(data=3), DENSE, "16 rows a step cannot be shared by data x expert x shard = 3"),
        (Plan(micro_batches=3), DENSE, "16 rows of a process cannot be cut into micro_batches=3"),
        (Plan(expert=2), DENSE, "the model has no experts"),
        (Plan(expert=4), MIXTURE, "6 experts cannot be cut into expert=4"),
        (Plan(context=8), replace(DENSE, norm="batch"), "batch norms see all tokens"),
        (Plan(context=3), DENSE, "rows of 64 tokens cannot be cut into 2 x context=3 pieces"),
        (
            Plan(tensor=2, pipeline=2),
            BOTH,
            "a model of two stacks is not cut that way",
        ),
        (Plan(tensor=2), None, "can only be copied or sharded"),
    ],
    ids=lambda value: value.short() if isinstance(value, Plan) else "",
)
def test_an_impossible_plan_is_refused_with_the_nearest(plan: Plan, config: ModelConfig | None, told: str) -> None:
    work = Work(config, 16, 64)
    with pytest.raises(DanluError, match=told) as error:
        check(plan, work, plan.world)
    near = nearest_plan(plan, work, plan.world)
    assert near is None or (near.world == plan.world and not any(problems(near, work)))
    assert str(error.value.fix).startswith("nearest plan" if near else "no plan fits")


def test_images_are_not_cut_along_the_row() -> None:
    image = replace(DENSE, vocab_size=0, patches=Patches((16, 16), (4, 4)), causal=False)
    assert any("context=2" in problem for problem in problems(Plan(context=2), Work(image, 16, 17)))
    assert not any(problems(Plan(tensor=4), Work(image, 16, 17)))


def test_another_number_of_processes_is_named() -> None:
    with pytest.raises(DanluError, match="shard 2 x tensor 2 = 4 processes, but there are 6"):
        check(Plan(tensor=2, shard=2), Work(DENSE, 12, 64), 6)


def test_it_needs_no_torch() -> None:
    code = "import sys, danlu.plan.plan, danlu.plan.stages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=9), st.integers(1, 9), st.floats(0, 20), st.floats(0, 20))
def test_stages_are_cut_as_well_as_can_be(costs: list[float], stages: int, first: float, last: float) -> None:
    if stages > len(costs):
        with pytest.raises(ValueError, match="cannot fill"):
            cut(costs, stages, first, last)
        return
    found = cut(costs, stages, first, last)
    assert [begin for begin, _ in found][1:] == [end for _, end in found][:-1]
    assert found[0][0] == 0 and found[-1][1] == len(costs) and all(begin < end for begin, end in found)
    best = min(slowest(borders, costs, first, last) for borders in all_cuts(len(costs), stages))
    assert slowest(found, costs, first, last) == pytest.approx(best)


def all_cuts(layers: int, stages: int) -> list[list[tuple[int, int]]]:
    if stages == 1:
        return [[(0, layers)]]
    made = []
    for end in range(stages - 1, layers):
        made += [[*rest, (end, layers)] for rest in all_cuts(end, stages - 1)]
    return made


def slowest(borders: list[tuple[int, int]], costs: list[float], first: float, last: float) -> float:
    times = [sum(costs[begin:end]) for begin, end in borders]
    times[0] += first
    times[-1] += last
    return max(times)
