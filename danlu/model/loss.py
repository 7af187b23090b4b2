"""Cross-entropy of a language model without ever holding all its logits.

The logits of 2,048 tokens over 49,152 words are 400 MB in fp32; here a few hundred rows at a time are made, turned
into loss and gradient, and forgotten (the idea of arXiv:2411.09009 and arXiv:2410.10989, for any device).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

IGNORED = -100  # a target that is not trained, as in torch.nn.functional.cross_entropy
CHUNK_LOGITS = 2**23  # logits held at once: 16 MB in bf16, which stays in a last-level cache

Finish = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def softmax_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each row in nat, fp32 [N], and its gradient with respect to the logits, [N, vocab] in their dtype."""
    wide = logits.float()
    normaliser = torch.logsumexp(wide, -1, keepdim=True)
    loss = normaliser - wide.gather(-1, targets[:, None])
    words = torch.arange(logits.shape[-1], device=logits.device)
    gradient = (wide - normaliser).exp() - (words == targets[:, None]).float()
    return loss[:, 0], gradient.to(logits.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """Makes the gradients during the forward pass, while a chunk's logits are at hand."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, hidden: Tensor, weight: Tensor, targets: Tensor, finish: Finish
    ) -> Tensor:
        to_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        to_weight = (
            torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if weight.requires_grad else None
        )
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for part in _chunks(len(hidden), weight):
            loss, gradient = finish(hidden[part] @ weight.T, targets[part])
            total += loss.sum(dtype=torch.float64)
            if to_hidden is not None:
                torch.mm(gradient, weight, out=to_hidden[part])
            if to_weight is not None:
                to_weight += gradient.T @ hidden[part]
        ctx.save_for_backward(to_hidden, to_weight)  # type: ignore[arg-type]
        ctx.dtype = weight.dtype  # type: ignore[attr-defined]
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, scale: Tensor) -> tuple[Tensor | None, ...]:
        to_hidden, to_weight = ctx.saved_tensors  # type: ignore[attr-defined]
        scale = scale.float()
        if to_hidden is not None:
            to_hidden = (to_hidden * scale).to(to_hidden.dtype)
        if to_weight is not None:
            to_weight = to_weight.mul_(scale).to(ctx.dtype)  # type: ignore[attr-defined]
        return to_hidden, to_weight, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, finish: Finish = softmax_gradient) -> Tensor:
    """The sum over trained tokens of -log softmax(hidden weight^T)[target], in nat, a float64 scalar.

    Args:
        hidden: [N, width], fp32 or bf16.
        weight: [vocab, width], the head, in the same dtype.
        targets: int64 [N]; rows where it is -100 cost nothing and get no gradient.
        finish: `softmax_gradient`, or the same compiled.
    """
    trained = (targets != IGNORED).nonzero()[:, 0]
    return _LinearCrossEntropy.apply(hidden[trained], weight, targets[trained], finish)


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
    size = max(16, CHUNK_LOGITS // weight.shape[0])
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))
