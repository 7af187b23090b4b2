"""Cross-entropy of a language model without ever holding all its logits.

The logits of 2,048 tokens over 49,152 words are 400 MB in fp32; here a few hundred rows at a time are made, turned
into loss and gradient, and forgotten (the idea of arXiv:2411.09009 and arXiv:2410.10989, for any device).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from danlu.model.split_loss import own_words, split_gradient, split_words

IGNORED = -100  # a target that is not trained, as in torch.nn.functional.cross_entropy
CHUNK_LOGITS = 2**26  # logits held at once, 134 MB in bf16: fewer rows slow the matrix products, more only cost memory
ACCELERATED = 8  # times as many on an accelerator, where each part's sum into the head's gradient is what takes time
WORDS = 2**13  # rows of the head's gradient made at once: as fast as all, without another copy of the head
PART_LOGITS = 2**19  # of these, logits in fp32 at once on a CPU: 2 MB, which stay in its cache from pass to pass


Gradient = Callable[[Tensor, slice], Tensor]  # overwrites some rows' logits by gradients and returns the rows' losses


def softmax_gradient(logits: Tensor, targets: Tensor, smoothing: float = 0.0, z: float = 0.0) -> Tensor:
    """The loss of each row in nat, fp32 [N]; `logits`, [N, vocab], are overwritten by its gradient.

    Args:
        targets: int64 [N], one of the words each.
        smoothing: share of the target's probability that is given to all words alike (arXiv:1512.00567).
        z: weight of the square of the logits' log-sum-exp, which is added to the loss (arXiv:2204.02311).
    """
    rows = max(1, PART_LOGITS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    losses = []
    for part, chosen in zip(logits.split(rows), targets[:, None].split(rows), strict=True):
        wide = torch.softmax(part, -1, dtype=torch.float32)
        # -log p(target) = (largest logit - target's) - log p(largest): the largest is no less than 1 / vocab, so unlike
        # p(target) it never underflows, and one pass of exponentials serves loss and gradient.
        behind = part.amax(-1, keepdim=True).float() - part.gather(-1, chosen).float()
        loss = behind - wide.amax(-1, keepdim=True).log()
        if z:
            log_sum = loss + part.gather(-1, chosen).float()
            loss = loss + z * log_sum.square()
            wide *= 1 + 2 * z * log_sum
        if smoothing:
            loss += smoothing * (part.gather(-1, chosen).float() - part.mean(-1, keepdim=True, dtype=torch.float32))
            wide -= smoothing / part.shape[-1]
        losses.append(loss[:, 0])
        wide.scatter_add_(-1, chosen, torch.full_like(chosen, smoothing - 1.0, dtype=torch.float32))
        part.copy_(wide)
    return torch.cat(losses)


class LinearLoss(torch.autograd.Function):
    """Makes the gradients during the forward pass, while a chunk's logits are at hand."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        to_gradient: Gradient,
        words: int,
    ) -> Tensor:
        to_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        to_weight = (
            torch.empty(weight.shape, dtype=torch.float32, device=weight.device) if weight.requires_grad else None
        )
        to_bias = None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        parts = list(_chunks(len(hidden), words, hidden.device))
        if not parts and to_weight is not None:
            to_weight.zero_()
        # Memory that is taken once, and not anew for every part, is not cleared by the system each time.
        room = weight.new_empty(max((part.stop - part.start for part in parts), default=0), len(weight))
        product = weight.new_empty(min(WORDS, len(weight)), weight.shape[1])
        for part in parts:
            gradient = torch.mm(hidden[part], weight.T, out=room[: part.stop - part.start])  # logits first
            if bias is not None:
                gradient += bias
            total += to_gradient(gradient, part).sum(dtype=torch.float64)
            if to_hidden is not None:
                torch.mm(gradient, weight, out=to_hidden[part])
            if to_bias is not None:
                to_bias += gradient.sum(0, dtype=torch.float32)
            if to_weight is not None:
                for some, rows in zip(gradient.split(WORDS, 1), to_weight.split(WORDS), strict=True):
                    made = torch.mm(some.T, hidden[part], out=product[: some.shape[1]])
                    rows.copy_(made) if part.start == 0 else rows.add_(made)
        ctx.save_for_backward(to_hidden, to_weight, to_bias)  # type: ignore[arg-type]
        ctx.dtype = weight.dtype  # type: ignore[attr-defined]
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, scale: Tensor) -> tuple[Tensor | None, ...]:
        to_hidden, to_weight, to_bias = ctx.saved_tensors  # type: ignore[attr-defined]
        scale = scale.float()
        if to_hidden is not None:
            to_hidden = (to_hidden * scale).to(to_hidden.dtype)
        if to_weight is not None:
            to_weight = _scaled(to_weight, scale, ctx.dtype)  # type: ignore[attr-defined]
        if to_bias is not None:
            to_bias = (to_bias * scale).to(ctx.dtype)  # type: ignore[attr-defined]
        return to_hidden, to_weight, to_bias, None, None


def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A scaled and rounded copy, made some rows at a time. x stays: a zero-bubble pipeline comes here twice."""
    made = torch.empty(x.shape, dtype=dtype, device=x.device)
    for some, rows in zip(x.split(WORDS), made.split(WORDS), strict=True):
        rows.copy_(some * scale)
    return made


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    smoothing: float = 0.0,
    z: float = 0.0,
    weights: Tensor | None = None,
) -> Tensor:
    """The sum over trained tokens of -log softmax(hidden weight^T + bias)[target], in nat, a float64 scalar.

    Args:
        hidden: [N, width], fp32 or bf16.
        weight: [vocab, width], the head, in the same dtype.
        targets: int64 [N]; rows where it is -100 cost nothing and get no gradient.
        bias: [vocab], in the same dtype, or None.
        smoothing, z: see `softmax_gradient`.
        weights: fp32 [N], what each row's loss is multiplied by; None for 1.

    With a DTensor as weight, its rows cut over some processes, no process holds a whole row of logits. All must have
    the same `hidden`; each gets the whole loss, and its part of the gradient of `hidden`.
    """
    trained = (targets != IGNORED).nonzero()[:, 0]
    chosen = targets[trained]
    split = split_words(weight) if isinstance(weight, DTensor) else None

    def to_gradient(logits: Tensor, rows: slice) -> Tensor:
        if split is not None:
            return split_gradient(logits, chosen[rows], split, smoothing, z)
        return softmax_gradient(logits, chosen[rows], smoothing, z)

    turned = weighted_gradient(to_gradient, weights, trained)
    own, own_bias = own_words(weight), None if bias is None else own_words(bias)
    return LinearLoss.apply(hidden[trained], own, own_bias, turned, len(weight) if split is None else split.most)


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and correctness of every token, for evaluation.

    Args:
        hidden: [N, width]; weight: [vocab, width]; targets: int64 [N].

    Returns: fp32 [N] in nat, 0 where the target is -100; bool [N], whether the most likely word is the target.
    """
    losses = torch.zeros(len(targets), dtype=torch.float32, device=hidden.device)
    correct = torch.zeros(len(targets), dtype=torch.bool, device=hidden.device)
    trained = (targets != IGNORED).nonzero()[:, 0]
    for part in _chunks(len(trained), len(weight), hidden.device):
        rows = trained[part]
        logits = (hidden[rows] @ weight.T).float()
        chosen = targets[rows]
        losses[rows] = torch.logsumexp(logits, -1) - logits.gather(-1, chosen[:, None])[:, 0]
        correct[rows] = logits.argmax(-1) == chosen
    return losses, correct


def _chunks(rows: int, words: int, device: torch.device) -> Iterator[slice]:
    """Slices of `rows`, as few as `CHUNK_LOGITS` allows for so many words and of nearly one size."""
    most = CHUNK_LOGITS * (1 if device.type == "cpu" else ACCELERATED)
    count = max(1, math.ceil(rows * words / most))
    size = max(16, math.ceil(rows / count))
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))


@dataclass(frozen=True)
class Taught:
    """What a teacher thinks of the same N tokens, before its logits are made.

    Attributes:
        hidden: [N, its width], what its head multiplies.
        weight: [vocab, its width], its head; the words are the pupil's.
        bias: [vocab] or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


def distillation_gradient(
    logits: Tensor,
    taught: Tensor,
    targets: Tensor,
    temperature: float,
    alpha: float,
    smoothing: float,
    z: float,
    reverse: bool = False,
) -> Tensor:
    """The loss of each row in nat, fp32 [N]; `logits`, [N, vocab], are overwritten by its gradient.

    alpha T^2 KL(softmax(taught / T) || softmax(logits / T)) + (1 - alpha) hard loss (arXiv:1503.02531, section 2).

    Args:
        taught: [N, vocab], the teacher's logits.
        targets, smoothing, z: of the hard loss; see `softmax_gradient`.
        temperature: T.
        alpha: the teacher's share.
        reverse: the divergence is taken from the pupil's side, KL(softmax(logits / T) || softmax(taught / T)).
    """
    rows = max(1, PART_LOGITS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    losses = []
    for part, wanted, chosen in zip(logits.split(rows), taught.split(rows), targets.split(rows), strict=True):
        known = torch.log_softmax(wanted.float() / temperature, -1)
        said = torch.log_softmax(part.float() / temperature, -1)
        if reverse:
            apart, chances = said - known, said.exp_()
            soft = (chances * apart).sum(-1)
            to_soft = chances.mul_(apart.sub_(soft[:, None])).mul_(alpha * temperature)
            soft *= temperature**2
        else:
            soft = (known.exp() * (known - said)).sum(-1) * temperature**2
            to_soft = said.exp_().sub_(known.exp_()).mul_(alpha * temperature)
        hard = softmax_gradient(part, chosen, smoothing, z)
        part.mul_(1 - alpha).add_(to_soft)
        losses.append(alpha * soft + (1 - alpha) * hard)
    return torch.cat(losses)


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    teacher: Taught,
    temperature: float,
    alpha: float,
    *,
    smoothing: float = 0.0,
    z: float = 0.0,
    weights: Tensor | None = None,
    reverse: bool = False,
) -> Tensor:
    """The sum of `distillation_gradient`'s losses over trained tokens, a float64 scalar.

    Both models' logits are made and forgotten a chunk at a time. The teacher gets no gradient. For the other arguments
    see `linear_cross_entropy`.
    """
    trained = (targets != IGNORED).nonzero()[:, 0]
    chosen, known = targets[trained], teacher.hidden[trained]

    def to_gradient(logits: Tensor, rows: slice) -> Tensor:
        taught = torch.nn.functional.linear(known[rows], teacher.weight, teacher.bias)
        return distillation_gradient(logits, taught, chosen[rows], temperature, alpha, smoothing, z, reverse)

    turned = weighted_gradient(to_gradient, weights, trained)
    return LinearLoss.apply(hidden[trained], weight, bias, turned, len(weight))


def weighted_gradient(to_gradient: Gradient, weights: Tensor | None, trained: Tensor) -> Gradient:
    """The same with each row's loss and gradient multiplied by its weight."""
    if weights is None:
        return to_gradient
    chosen = weights[trained].float()

    def scaled(logits: Tensor, rows: slice) -> Tensor:
        losses = to_gradient(logits, rows) * chosen[rows]
        logits *= chosen[rows, None].to(logits.dtype)
        return losses

    return scaled
