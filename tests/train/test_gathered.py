"""Pairs that lie on several processes are compared with one another as if they lay on one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.train.objectives.contrastive import gather_rows, pair_loss
from tests.train.ranks import run_ranks

WAYS = (False, True)  # symmetric or not


def compare(vectors: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What one of two processes makes of its half of the pairs: its loss, and its own rows' gradient."""
    found = []
    for symmetric in WAYS:
        own = vectors.chunk(2)[torch.distributed.get_rank()].clone().requires_grad_()
        loss = pair_loss(own, torch.tensor(4.0), symmetric, gather_rows())
        loss.backward()
        assert own.grad is not None
        found.append((loss.detach(), own.grad))
    return found


def test_two_processes_compare_all_rows() -> None:
    vectors = F.normalize(torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(4)), dim=-1)
    ranks = run_ranks(2, compare, vectors)
    for symmetric, *results in zip(WAYS, *ranks, strict=True):
        together = vectors.clone().requires_grad_()
        whole = pair_loss(together, torch.tensor(4.0), symmetric, None)
        whole.backward()
        losses, gradients = zip(*results, strict=True)
        torch.testing.assert_close(sum(losses), whole.detach())
        torch.testing.assert_close(torch.cat(gradients), together.grad)
