"""What a teacher told of a few words is learned as a divergence that autograd agrees with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from danlu.errors import DanluError
from danlu.model.loss import distillation_gradient
from danlu.model.told_loss import Told, linear_told, told_gradient
from danlu.train.objective import Words
from danlu.train.objectives.told import ToldDistillation

ROWS, VOCAB = 6, 11


def teacher_and_pupil(sharp: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(4)
    return sharp * torch.randn(ROWS, VOCAB), torch.randn(ROWS, VOCAB), torch.randint(VOCAB, (ROWS,))


def named(teacher: Tensor, most: int, columns: int | None = None) -> Told:
    """The likeliest words; columns without a word are as `danlu.data.told` has them."""
    known, ids = teacher.log_softmax(-1).topk(most)
    empty = (columns or most) - most
    return Told(
        torch.cat((ids, ids[:, :1].expand(-1, empty)), 1), torch.cat((known, torch.full((ROWS, empty), -1e4)), 1)
    )


def plainly(pupil: Tensor, teacher: Tensor, most: int) -> Tensor:
    """KL over the named words and all others as one, by its definition, of each row."""
    ids = teacher.topk(most).indices
    known, said = (each.double().softmax(-1).gather(-1, ids) for each in (teacher, pupil))
    known, said = (torch.cat((each, 1 - each.sum(-1, keepdim=True)), 1) for each in (known, said))
    return (known * (known.log() - said.log())).sum(-1)


@pytest.mark.parametrize("most", [1, 4, VOCAB - 1])
@pytest.mark.parametrize("sharp", [1.0, 4.0])
def test_loss_and_gradient_are_the_definition_s(most: int, sharp: float) -> None:
    teacher, pupil, targets = teacher_and_pupil(sharp)
    wanted = pupil.clone().requires_grad_()
    hard = torch.nn.functional.cross_entropy(wanted, targets, reduction="none")
    total = 0.7 * plainly(wanted, teacher, most) + 0.3 * hard
    total.sum().backward()
    made = pupil.clone()
    losses = told_gradient(made, named(teacher, most, most + 2), targets, 0.7)
    assert torch.allclose(losses, total.detach().float(), atol=1e-5)
    assert torch.allclose(made, wanted.grad, atol=1e-5)


def test_all_words_named_is_distillation_and_fewer_are_less() -> None:
    teacher, pupil, targets = teacher_and_pupil()
    known, made = pupil.clone(), pupil.clone()
    whole = distillation_gradient(known, teacher, targets, 1.0, 1.0, 0.0, 0.0)
    assert torch.allclose(told_gradient(made, named(teacher, VOCAB), targets, 1.0), whole, atol=1e-6)
    assert torch.allclose(made, known, atol=1e-6)
    before = whole
    for most in (6, 3, 1):
        fewer = told_gradient(pupil.clone(), named(teacher, most), targets, 1.0)
        assert (fewer >= -1e-6).all() and (fewer <= before + 1e-6).all()
        before = fewer


def test_a_pupil_that_agrees_learns_nothing_more() -> None:
    teacher, _, targets = teacher_and_pupil()
    for most in (2, VOCAB):
        made = teacher.clone()
        assert told_gradient(made, named(teacher, most), targets, 1.0).abs().max() < 1e-6
        assert made.abs().max() < 1e-6


def test_the_head_gets_its_gradient_and_rows_that_are_not_learned_none() -> None:
    torch.manual_seed(1)
    teacher, _, targets = teacher_and_pupil()
    targets[2] = -100
    hidden, weight = torch.randn(ROWS, 5, requires_grad=True), torch.randn(VOCAB, 5, requires_grad=True)
    learned = targets >= 0
    wanted = plainly(hidden @ weight.T, teacher, 3)[learned].sum()
    to = torch.autograd.grad(wanted, (hidden, weight))
    made = torch.autograd.grad(linear_told(hidden, weight, targets, None, named(teacher, 3), 1.0), (hidden, weight))
    for one, other in zip(made, to, strict=True):
        assert torch.allclose(one, other.float(), atol=1e-4)
    assert not made[0][2].any()


def test_a_share_is_a_share() -> None:
    with pytest.raises(DanluError, match=r"alpha 1\.5 must be between 0 and 1"):
        ToldDistillation(Words(), 1.5)
