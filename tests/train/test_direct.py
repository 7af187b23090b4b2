"""What processes exchange directly is what the library's own collectives would have brought."""

from __future__ import annotations

import torch
import torch.distributed as dist

from danlu.train.direct import DirectAllGather, DirectReduceScatter
from tests.train.ranks import run_ranks

SIZE = 1000


def exchanged() -> list[float]:
    """Both exchanges beside the library's, again and again; returns what was gathered last, summed by process."""
    group, rank = dist.group.WORLD, dist.get_rank()
    assert group is not None
    count = group.size()
    own = torch.randn(SIZE, generator=torch.Generator().manual_seed(rank))
    gathered, expected = torch.empty(count * SIZE), torch.empty(count * SIZE)
    part, summed = torch.empty(SIZE), torch.empty(SIZE)
    for _ in range(3):  # the messages of one round must not end up in another
        DirectAllGather()(gathered, own, group)
        dist.all_gather_into_tensor(expected, own)
        assert torch.equal(gathered, expected)
        DirectReduceScatter()(part, gathered * (rank + 1), group, dist.ReduceOp.SUM)
        dist.reduce_scatter_tensor(summed, expected * (rank + 1))
        torch.testing.assert_close(part, summed)
        own = part / count
    # As FSDP does it: a process's own part lies in what is to be filled already.
    place = gathered.chunk(count)[rank]
    DirectAllGather()(gathered, place, group)
    dist.all_gather_into_tensor(expected, place.clone())
    assert torch.equal(gathered, expected)
    return gathered.view(count, -1).sum(1).tolist()


def test_three_processes_get_what_the_library_gives() -> None:
    found = run_ranks(3, exchanged)
    assert found[0] == found[1] == found[2]


def scattered() -> list[float]:
    """The sum of one part, of numbers whose order of addition shows."""
    group = dist.group.WORLD
    assert group is not None
    part = torch.empty(4)
    given = torch.tensor([1e8, 1.0, -1e8][dist.get_rank()]).expand(12).contiguous()
    DirectReduceScatter()(part, given, group, dist.ReduceOp.SUM)
    return part.tolist()


def test_parts_are_summed_in_the_order_of_ranks_on_every_process() -> None:
    expected = float(torch.tensor(1e8) + torch.tensor(1.0) + torch.tensor(-1e8))
    assert run_ranks(3, scattered) == [[expected] * 4] * 3
