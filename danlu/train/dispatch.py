"""Expert parallelism: each process holds some experts of every layer, and tokens travel to them and back.

Every process sorts its tokens by expert and sends each to the process that holds it, all to all at once; what comes
back stands where it was sent from (GShard, arXiv:2006.16668, without padding or dropping).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd

from danlu.model.mixture import BankFeedForward, Compute, Mixture


class Dispatch:
    """How tokens reach experts that are shared out over a group, equally many each.

    Args:
        group: the processes, in the order in which they hold the experts.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size = group, dist.get_world_size(group)

    def __call__(self, experts: BankFeedForward) -> Compute:
        """What computes all experts, of which this process holds `experts`."""

        def compute(x: Tensor, sizes: Sequence[int]) -> Tensor:
            count = len(sizes) // self.size
            sent = torch.tensor(sizes).view(self.size, count)
            received = torch.empty_like(sent)
            dist.all_to_all_single(received, sent, group=self.group)
            out, back = sent.sum(1).tolist(), received.sum(1).tolist()
            arrived = all_to_all_single_autograd(x, back, out, self.group)
            order = _by_expert(received)
            made = experts(arrived[order], received.sum(0).tolist())
            returned = torch.empty_like(order)
            returned[order] = torch.arange(len(order))
            return all_to_all_single_autograd(made[returned], out, back, self.group)

        return compute


def _by_expert(received: Tensor) -> Tensor:
    """Where the tokens of each expert stand among those that came, int64 [N].

    Args: received: int64 [processes, experts], how many came from each process for each expert, in this order.
    """
    ends = list(accumulate(received.flatten().tolist(), initial=0))
    places = [torch.arange(begin, end) for begin, end in pairwise(ends)]
    processes, experts = received.shape
    return torch.cat([places[process * experts + expert] for expert in range(experts) for process in range(processes)])


def share_experts(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Let every mixture of a model compute with experts of all processes of a group; banks hold this process's."""
    for module in model.modules():
        if isinstance(module, Mixture):
            module.exchange = Dispatch(group)
