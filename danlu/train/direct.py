"""FSDP's two exchanges between processes without accelerators: each part goes straight to whom it is for.

gloo's own all-gather and reduce-scatter take as long as its all-reduce; sent directly, a part travels once. torch's
FSDP calls these through `set_custom_all_gather` and `set_custom_reduce_scatter`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

GATHER, SCATTER = 1, 2  # tags, so that neither takes a message of the other's


class _Direct:
    """What FSDP asks of either exchange besides the exchange itself."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what is sent or received."""
        return torch.empty(*size, dtype=dtype, device=device)


class DirectAllGather(_Direct):
    """Everybody gets everybody's part."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Fill `output_tensor` with all parts in the order of ranks; it is whole when this returns."""
        own, parts = group.rank(), output_tensor.chunk(group.size())
        if parts[own].data_ptr() != input_tensor.data_ptr():
            parts[own].copy_(input_tensor)
        _swap({other: input_tensor for other in _others(group)}, dict(enumerate(parts)), group, GATHER)


class DirectReduceScatter(_Direct):
    """Everybody gets the sum of one part, always added up in the order of ranks."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        """Fill `output_tensor` with the sum, or what else `op` says, of this process's part; it is done on return."""
        if op != dist.ReduceOp.SUM:
            raise NotImplementedError(f"parts are summed here; {op} was asked for")
        own, parts = group.rank(), input_tensor.chunk(group.size())
        got = {other: torch.empty_like(output_tensor) for other in _others(group)}
        _swap({other: parts[other] for other in got}, got, group, SCATTER)
        got[own] = parts[own]
        output_tensor.copy_(got[0])
        for rank in range(1, group.size()):
            output_tensor += got[rank]


def _others(group: dist.ProcessGroup) -> list[int]:
    return [rank for rank in range(group.size()) if rank != group.rank()]


def _swap(sent: dict[int, Tensor], received: dict[int, Tensor], group: dist.ProcessGroup, tag: int) -> None:
    """Send to each of some ranks, and receive from each, until all is done."""
    under_way = [dist.isend(part, group=group, group_dst=other, tag=tag) for other, part in sent.items()]
    under_way += [dist.irecv(received[other], group=group, group_src=other, tag=tag) for other in sent]
    for one in under_way:
        assert one is not None, "this process is of the group"
        one.wait()
