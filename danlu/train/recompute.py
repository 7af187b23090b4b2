"""Recomputing activations in the backward pass instead of keeping them (arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from danlu.model import tiled_attention  # noqa: F401  it registers an operator that is named below
from danlu.model.transformer import Notes, Stack

Recompute = Literal["none", "selective", "full"]
# What is dear to compute and is kept by selective recomputing: matrix products and attention. Norms, activations and
# rotations cost next to nothing (arXiv:2205.05198, section 5).
DEAR = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.danlu.tiled_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)
# Attention probabilities to keep on a CPU, a query and head; 320 are all of them in rows of 512 tokens.
KEPT_PROBABILITIES = 320


def keep_probabilities(model: nn.Module) -> None:
    """Let attention on a CPU keep probabilities for the backward pass where there is memory for them."""
    for module in model.modules():
        if isinstance(module, Stack):
            module.keep_probabilities = KEPT_PROBABILITIES


def recompute_blocks(blocks: Sequence[nn.Module], how: Recompute) -> None:
    """Let blocks compute again what they need for the backward pass: all of it, or all but what is dear."""
    if how == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_dear)
    for block in blocks:
        block.forward = partial(_recomputed, block.forward, options)


def _recomputed(forward: Callable[..., Tensor], options: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
    """A block's output, of which routers note what they do the first time only.

    Noting it again would count it twice, and hold what is computed again until the last block's turn has come.
    """
    again = False

    def run(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal again
        if again:
            args = tuple(_fresh(value) for value in args)
            kwargs = {name: _fresh(value) for name, value in kwargs.items()}
        again = True
        return forward(*args, **kwargs)

    return checkpoint(run, *args, **options, **kwargs)


def _fresh(value: Any) -> Any:
    return Notes([]) if isinstance(value, Notes) else value


def _keep_dear(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in DEAR else CheckpointPolicy.PREFER_RECOMPUTE
