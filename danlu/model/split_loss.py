"""The losses and gradients of words that are shared out over processes: none ever holds a whole row of logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


@dataclass(frozen=True)
class Split:
    """How words are shared out.

    Attributes:
        group: the processes.
        words: of all of them; first: the first of this process's; most: that a process has.
    """

    group: dist.ProcessGroup
    words: int
    first: int
    most: int


def split_words(weight: DTensor) -> Split:
    """How the rows of a weight [vocab, width] lie on a mesh of one dimension."""
    mesh = weight.device_mesh
    most = -(-len(weight) // mesh.size())  # the library cuts rows as torch.chunk does
    return Split(mesh.get_group(), len(weight), most * mesh.get_local_rank(), most)


def own_words(weight: Tensor) -> Tensor:
    """This process's rows of a weight, or all of a plain one."""
    return weight.to_local(grad_placements=[Shard(0)]) if isinstance(weight, DTensor) else weight


def split_gradient(logits: Tensor, targets: Tensor, split: Split, smoothing: float, z: float) -> Tensor:
    """The loss of each row in nat, fp32 [N], on every process; `logits`, [N, own words], become their gradient.

    Args:
        targets: int64 [N].
        smoothing: label smoothing (arXiv:1512.00567); z: weight of the squared log-sum-exp (arXiv:2204.02311).
    """
    places = targets - split.first
    rows = ((places >= 0) & (places < logits.shape[1])).nonzero()[:, 0]
    own = places[rows]
    wide = logits.float()
    largest = wide.amax(-1) if wide.shape[1] else wide.new_full((len(wide),), float("-inf"))
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=split.group)
    wide = wide - largest[:, None]
    sums = torch.zeros(3, len(wide), device=wide.device)  # of exponentials, of targets' logits, of all logits
    sums[1, rows] = wide[rows, own]
    sums[2] = wide.sum(-1)
    wide.exp_()
    sums[0] = wide.sum(-1)
    dist.all_reduce(sums, group=split.group)
    log = sums[0].log()
    losses = log - (1 - smoothing) * sums[1] - smoothing * sums[2] / split.words
    wide /= sums[0][:, None]
    if z:
        whole = log + largest
        losses = losses + z * whole.square()
        wide *= (1 + 2 * z * whole)[:, None]
    wide[rows, own] -= 1 - smoothing
    if smoothing:
        wide -= smoothing / split.words
    logits.copy_(wide)
    return losses
