"""What a pupil learns besides its teacher's words: the other divergence, hidden states, and corrections of itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from danlu.data.stream import IGNORED, Batch
from danlu.errors import DanluError
from danlu.model.config import ModelConfig
from danlu.model.transformer import Decoder
from danlu.plan.plan import Plan
from danlu.train.objective import Words
from danlu.train.objectives.distillation import Distillation
from danlu.train.objectives.exits import EarlyExits
from danlu.train.objectives.own_text import continued
from danlu.train.objectives.states import counterparts, projections, state_difference
from danlu.train.recipe import ObjectiveSettings
from danlu.train.tasks.teacher import check_teacher

PUPIL = ModelConfig(
    vocab_size=50, width=16, layers=2, heads=2, kv_heads=2, head_width=8, feedforward_width=24, context=32
)


def models(width: int = 16) -> tuple[Decoder, Decoder]:
    torch.manual_seed(5)
    return Decoder(PUPIL), Decoder(replace(PUPIL, width=width, layers=4))


def batch() -> Batch:
    tokens = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(2))
    targets = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(3))
    targets[0, ::4] = IGNORED
    return Batch(tokens, targets, torch.ones(3, 12, dtype=torch.int32), torch.arange(12).expand(3, -1))


def test_the_reverse_divergence() -> None:
    (pupil, teacher), data = models(), batch()
    loss = Distillation(Words(), teacher, temperature=2.0, alpha=0.7, reverse=True)(pupil, data)
    loss.sum.backward()
    ours = [weight.grad.clone() for weight in pupil.parameters() if weight.grad is not None]
    pupil.zero_grad()
    said, known = (model.logits(model(data.tokens)).flatten(0, 1) for model in (pupil, teacher))
    wanted, learned = data.targets.flatten(), data.targets.flatten() != IGNORED
    mine, theirs = (said / 2).log_softmax(-1), (known.detach() / 2).log_softmax(-1)
    soft = (mine.exp() * (mine - theirs)).sum(-1)[learned].sum() * 4
    expected = 0.7 * soft + 0.3 * nn.functional.cross_entropy(said, wanted, reduction="sum")
    torch.testing.assert_close(loss.sum.float(), expected, rtol=1e-5, atol=1e-5)
    expected.backward()
    plain = [weight.grad for weight in pupil.parameters() if weight.grad is not None]
    assert len(ours) == len(plain) > 10
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_each_block_has_its_counterpart() -> None:
    assert counterparts(4, 4) == [0, 1, 2, 3]
    assert counterparts(2, 6) == [2, 5]
    assert counterparts(3, 2)[-1] == 1


def test_states_alike_have_no_difference_and_scale_does_not_matter() -> None:
    pupil, data = models()[0], batch()
    states: list[torch.Tensor] = []
    pupil(data.tokens, hidden=states)
    wanted = data.targets != IGNORED
    assert float(state_difference(pupil, states, [3 * state for state in states], wanted)) < 1e-4
    turned = [-state for state in states]
    assert float(state_difference(pupil, states, turned, wanted)) == pytest.approx(4 * int(wanted.sum()), rel=1e-3)


def test_states_of_another_width_go_through_a_projection_that_learns() -> None:
    (pupil, teacher), data = models(width=24), batch()
    pupil.projections = projections(PUPIL, 24).to_empty(device="cpu")
    for weight in pupil.projections.parameters():
        nn.init.normal_(weight, std=0.1)
    objective = Distillation(Words(), teacher, states=0.5)
    optimizer = torch.optim.Adam(pupil.parameters(), 1e-2)
    apart = []
    for _ in range(30):
        loss = objective(pupil, data)
        assert isinstance(loss.penalty, torch.Tensor)
        apart.append(float(loss.penalty))
        optimizer.zero_grad()
        ((loss.sum + loss.penalty) / loss.count).backward()
        optimizer.step()
    assert apart[-1] < 0.5 * apart[0]
    torch.testing.assert_close(objective(pupil, data).sum, Distillation(Words(), teacher)(pupil, data).sum)
    assert objective(pupil.eval(), data).penalty == 0.0


def test_rows_end_as_the_model_writes_them() -> None:
    pupil, data = models()[0].train(), batch()
    with torch.no_grad():
        pupil.norm.weight.mul_(30)  # type: ignore[union-attr, operator]
    torch.manual_seed(7)
    made, own = continued(pupil, data, share=0.5)
    assert pupil.training and torch.equal(made.tokens[:, :6], data.tokens[:, :6]) and made.count == data.count
    assert torch.equal(made.targets[:, :5], data.targets[:, :5]) and not own[:, :5].any()
    written = own[:, :-1]
    assert torch.equal(made.targets[:, :-1][written], made.tokens[:, 1:][written])
    assert torch.equal(own[:, 5:], data.targets[:, 5:] != IGNORED)
    torch.manual_seed(7)
    assert torch.equal(continued(pupil, data, share=0.5)[0].tokens, made.tokens)
    likely = pupil.logits(pupil(made.tokens))[:, 5:-1].softmax(-1).gather(-1, made.tokens[:, 6:, None])
    given = pupil.logits(pupil(data.tokens))[:, 5:-1].softmax(-1).gather(-1, data.tokens[:, 6:, None])
    assert likely.mean() > 4 * given.mean()  # drawn from the model's own probabilities
    kept, none = continued(pupil, data, share=0.0)
    assert torch.equal(kept.tokens, data.tokens) and not none.any()


def test_what_a_model_wrote_is_judged_by_the_teacher_alone() -> None:
    (pupil, teacher), data = models(), batch()
    torch.manual_seed(3)
    made, own = continued(pupil, data, share=0.5)
    torch.manual_seed(3)
    loss = Distillation(Words(), teacher, alpha=0.2, own=0.5)(pupil.train(), data)
    text = replace(made, targets=made.targets.masked_fill(own, IGNORED))
    itself = replace(made, targets=made.targets.masked_fill(~own, IGNORED))
    expected = Distillation(Words(), teacher, alpha=0.2)(pupil, text).sum
    expected = expected + Distillation(Words(), teacher, alpha=1.0)(pupil, itself).sum
    torch.testing.assert_close(loss.sum, expected)
    measured = Distillation(Words(), teacher, alpha=0.2, own=0.5)(pupil.eval(), data).sum
    torch.testing.assert_close(measured, Distillation(Words(), teacher, alpha=0.2)(pupil, data).sum)


def test_exits_learn_and_the_end_alone_is_reported() -> None:
    pupil, data = models()[1].train(), batch()
    loss = EarlyExits(Words(), (1, 3))(pupil, data)
    torch.testing.assert_close(loss.sum, Words()(pupil, data).sum)
    states: list[torch.Tensor] = []
    end = pupil.logits(pupil(data.tokens, hidden=states)).flatten(0, 1).detach()
    targets, expected = data.targets.flatten(), torch.zeros(())
    for number in (1, 3):
        said = pupil.logits(pupil.norm(states[number])).flatten(0, 1)  # type: ignore[misc]
        hard = nn.functional.cross_entropy(said, targets, reduction="sum")
        apart = nn.functional.kl_div(said.log_softmax(-1), end.softmax(-1), reduction="none").sum(-1)
        expected = expected + (0.5 * hard + 0.5 * apart[targets != IGNORED].sum()) / 2
    assert isinstance(loss.penalty, torch.Tensor)
    torch.testing.assert_close(loss.penalty.float(), expected, rtol=1e-5, atol=1e-5)
    assert EarlyExits(Words(), (1, 3))(pupil.eval(), data).penalty == 0.0
    with pytest.raises(DanluError, match="no exit behind block 4: the model has 4 blocks"):
        EarlyExits(Words(), (4,))(pupil, data)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"own": 0.5}, "own has no effect where kind is next_token without a teacher"),
        ({"states": 1.0}, "without a teacher"),
        ({"teacher": "a", "exits": (1,)}, "name one of teacher, exits and elastic"),
        ({"exits": (2, 2)}, "each named once"),
        ({"kind": "spans", "exits": (2,)}, "exits has no effect where kind is spans"),
        ({"kind": "masked_tokens", "teacher": "a", "own": 0.5}, "own has no effect"),
    ],
)
def test_settings_that_contradict_themselves(changes: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        ObjectiveSettings.model_validate(changes)


@pytest.mark.parametrize(
    ("asked", "plan", "told"),
    [
        ({"teacher": "a", "own": 0.5}, {"data": 2}, "a model with objective.own is trained in one process"),
        ({"elastic": {"layers": [1]}}, {"shard": 2}, "a model with objective.elastic is trained in one process"),
        ({"exits": [1]}, {"pipeline": 2}, "exits need all blocks"),
    ],
)
def test_plans_that_cannot_carry_it(asked: dict[str, object], plan: dict[str, int], told: str) -> None:
    with pytest.raises(DanluError, match=told):
        check_teacher(ObjectiveSettings.model_validate(asked), Plan.model_validate(plan))
