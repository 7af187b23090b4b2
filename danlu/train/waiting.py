"""How long the forward and the backward pass wait for other processes.

What is sent there overlaps with what is computed, so no stopwatch tells it apart. Now and then torch's profiler watches
one step, and what counts is the time in which something was under way between processes and nothing was computed: on
a CPU from gloo's operations and the operators' own times, on an accelerator from its kernels.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from danlu.train.watch import MARK, Clock

SHARE = 0.005  # of the run's time that watching may take
FIRST = 30.0  # seconds of a run before the first look
TALKING = ("autograd", "c10d", "_c10d_functional", "_c10d_functional_autograd")  # operators that do not compute
Span = tuple[float, float]


class Lookout:
    """Watches a step now and then, so seldom that all its looks together take at most `SHARE` of the run's time.

    Args:
        clock: told what was seen, beside the seconds of the phases: "waiting in forward" and the like.
    """

    def __init__(self, clock: Clock, device: torch.device) -> None:
        self.clock, self.device = clock, device
        self.began, self.spent = time.perf_counter(), FIRST * SHARE

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the forward and the backward passes of a step, which it may watch."""
        started = time.perf_counter()
        if (started - self.began) * SHARE < self.spent:
            yield
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own remarks
        cuda = self.device.type == "cuda"
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with self.clock.marking(), profile(activities=kinds, acc_events=True) as watched:
            yield
        for name, seconds in (on_cuda if cuda else on_cpu)(watched.events() or ()).items():
            self.clock.seconds[f"waiting in {name}"] += seconds
        self.spent += time.perf_counter() - started


def on_cpu(events: Iterable[Any]) -> dict[str, float]:
    """Seconds of each marked phase in which something was under way and no operator ran."""
    known = list(events)
    sent = [_span(event) for event in known if event.is_async and event.name.startswith("gloo:")]
    waits = [_span(event) for event in known if event.name == "_c10d_functional::wait_tensor"]
    busy = without([_span(event) for event in known if not event.is_async and _computes(event.name)], waits)
    bare = without(sent, busy)
    found: dict[str, float] = {}
    for event in known:
        if event.name.startswith(MARK):
            name = event.name.removeprefix(MARK)
            found[name] = found.get(name, 0.0) + _length(bare, _span(event))
    return found


def on_cuda(events: Iterable[Any]) -> dict[str, float]:
    """Seconds in which kernels of NCCL ran and no others did; nothing where the profiler saw no kernels."""
    kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    sent = [_span(event) for event in kernels if event.name.startswith("nccl")]
    bare = without(sent, [_span(event) for event in kernels if not event.name.startswith("nccl")])
    return {"forward and backward": sum(end - start for start, end in bare) / 1e6} if kernels else {}


def without(spans: list[Span], others: list[Span]) -> list[Span]:
    """What of some spans of time no other covers, ascending and apart."""
    left, rest = [], iter([*_joined(others), (float("inf"), float("inf"))])
    start, end = next(rest)
    for first, last in _joined(spans):
        while end <= first:
            start, end = next(rest)
        while start < last:
            if first < start:
                left.append((first, start))
            first = end
            if end >= last:
                break
            start, end = next(rest)
        if first < last:
            left.append((first, last))
    return left


def _joined(spans: list[Span]) -> list[Span]:
    """The same time in spans that are ascending and apart."""
    made: list[Span] = []
    for start, end in sorted(spans):
        if made and start <= made[-1][1]:
            made[-1] = (made[-1][0], max(end, made[-1][1]))
        else:
            made.append((start, end))
    return made


def _length(spans: list[Span], within: Span) -> float:
    """Seconds of spans, in microseconds, within another."""
    return sum(max(0.0, min(end, within[1]) - max(start, within[0])) for start, end in spans) / 1e6


def _span(event: Any) -> Span:
    return event.time_range.start, event.time_range.end


def _computes(name: str) -> bool:
    """Whether it is an operator, or a graph of them that was compiled."""
    space, colons, _ = name.partition("::")
    return (bool(colons) and space not in TALKING) or "CompiledFxGraph" in name
