"""Cross-entropy of a language model without ever holding all its logits.

The logits of 2,048 tokens over 49,152 words are 400 MB in fp32; here a few hundred rows at a time are made, turned
into loss and gradient, and forgotten (the idea of arXiv:2411.09009 and arXiv:2410.10989, for any device).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

IGNORED = -100  # a target that is not trained, as in torch.nn.functional.cross_entropy
CHUNK_LOGITS = 2**25  # logits held at once, 67 MB in bf16: fewer rows slow the matrix products, more only cost memory
WORDS = 2**13  # rows of the head's gradient made at once: as fast as all, without another copy of the head
PART_LOGITS = 2**19  # of these, logits in fp32 at once on a CPU: 2 MB, which stay in its cache from pass to pass


def softmax_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of each row in nat, fp32 [N]; `logits`, [N, vocab], are overwritten by its gradient."""
    rows = max(1, PART_LOGITS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    losses = []
    for part, chosen in zip(logits.split(rows), targets[:, None].split(rows), strict=True):
        wide = torch.softmax(part, -1, dtype=torch.float32)
        # -log p(target) = (largest logit - target's) - log p(largest): the largest is no less than 1 / vocab, so unlike
        # p(target) it never underflows, and one pass of exponentials serves loss and gradient.
        behind = part.amax(-1, keepdim=True).float() - part.gather(-1, chosen).float()
        losses.append((behind - wide.amax(-1, keepdim=True).log())[:, 0])
        wide.scatter_add_(-1, chosen, torch.full_like(chosen, -1.0, dtype=torch.float32))
        part.copy_(wide)
    return torch.cat(losses)


class _LinearCrossEntropy(torch.autograd.Function):
    """Makes the gradients during the forward pass, while a chunk's logits are at hand."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        to_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        to_weight = (
            torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if weight.requires_grad else None
        )
        to_bias = None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        parts = list(_chunks(len(hidden), weight))
        # Memory that is taken once, and not anew for every part, is not cleared by the system each time.
        room = weight.new_empty(max((part.stop - part.start for part in parts), default=0), len(weight))
        product = weight.new_empty(min(WORDS, len(weight)), weight.shape[1])
        for part in parts:
            gradient = torch.mm(hidden[part], weight.T, out=room[: part.stop - part.start])  # logits first
            if bias is not None:
                gradient += bias
            total += softmax_gradient(gradient, targets[part]).sum(dtype=torch.float64)
            if to_hidden is not None:
                torch.mm(gradient, weight, out=to_hidden[part])
            if to_bias is not None:
                to_bias += gradient.sum(0, dtype=torch.float32)
            if to_weight is not None:
                for some, rows in zip(gradient.split(WORDS, 1), to_weight.split(WORDS), strict=True):
                    rows += torch.mm(some.T, hidden[part], out=product[: some.shape[1]])
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
            to_weight = to_weight.mul_(scale).to(ctx.dtype)  # type: ignore[attr-defined]
        if to_bias is not None:
            to_bias = (to_bias * scale).to(ctx.dtype)  # type: ignore[attr-defined]
        return to_hidden, to_weight, to_bias, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """The sum over trained tokens of -log softmax(hidden weight^T + bias)[target], in nat, a float64 scalar.

    Args:
        hidden: [N, width], fp32 or bf16.
        weight: [vocab, width], the head, in the same dtype.
        targets: int64 [N]; rows where it is -100 cost nothing and get no gradient.
        bias: [vocab], in the same dtype, or None.
    """
    trained = (targets != IGNORED).nonzero()[:, 0]
    return _LinearCrossEntropy.apply(hidden[trained], weight, bias, targets[trained])


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
    for part in _chunks(len(trained), weight):
        rows = trained[part]
        logits = (hidden[rows] @ weight.T).float()
        chosen = targets[rows]
        losses[rows] = torch.logsumexp(logits, -1) - logits.gather(-1, chosen[:, None])[:, 0]
        correct[rows] = logits.argmax(-1) == chosen
    return losses, correct


def _chunks(rows: int, weight: Tensor) -> Iterator[slice]:
    """Slices of `rows`, as few as `CHUNK_LOGITS` allows and of nearly one size."""
    count = max(1, math.ceil(rows * weight.shape[0] / CHUNK_LOGITS))
    size = max(16, math.ceil(rows / count))
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))
