"""Measuring how long a device takes for matrices of every number format, by stacks of them that llama.cpp runs.

What is not matrices is told apart by stacks that hold next to none: a layer's cost by their number, the cache's by how
much of it is looked at; choosing a word is timed by itself. Times are the median of tokens', of several rounds over all
stacks the quickest: what else runs on a machine only slows it.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import psutil

from danlu.artifact import library_version
from danlu.console import progress
from danlu.device.bandwidth import read_bandwidth
from danlu.device.cores import usable_cores
from danlu.device.engine import Engine
from danlu.device.probe import instructions, processor
from danlu.device.profile import DECODE, ENGINE, READ, CacheRate, DeviceProfile, Rate, Rest
from danlu.device.stack import HEAD, Stack, bytes_per_weight, fills, layers_for, write_stack

TYPES = (
    *("f16", "bf16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "iq4_nl", "q3_k", "q2_k"),
    *("tq2_0", "q1_0", "f32"),
)
COLUMNS = (576, 1536, 4096)
CACHES = ("f16", "q8_0", "q4_0")
BATCHES = (16, READ)  # of reading
SIZE = 96e6  # bytes of a stack's matrices: more than caches of a processor hold
MOST = 160e6  # numbers in a stack: with few bits, reading so many takes seconds
LAYERS = 512  # of a stack, at most: with more llama.cpp ends the process
ROUNDS = 2
PROMPT, DECODED, WARM = 8, 32, 4  # tokens
LENGTH = 1024  # tokens of the context; the cache is measured half full
LEAST = 0.1  # of a stack's time is its matrices' in any case
SMALL = Stack("q8_0", HEAD, 64)  # next to no matrices
SHALLOW = replace(SMALL, layers=16)
WORDY = replace(SHALLOW, words=65_536)
LOOKING = Stack("q8_0", 9 * HEAD, 8)


@dataclass(frozen=True)
class Timing:
    """Seconds of a stack's steps.

    Attributes:
        decode: of a token near the beginning.
        read: of reading so many tokens into an empty cache, by their number.
    """

    decode: float
    read: dict[int, float]

    def best(self, other: Timing) -> Timing:
        """The quicker of both, number by number."""
        return Timing(
            min(self.decode, other.decode), {batch: min(self.read[batch], other.read[batch]) for batch in self.read}
        )


@dataclass(frozen=True)
class Looking:
    """Seconds that 512 more tokens in the cache add.

    Attributes:
        decode: to a token. read: to reading 512 tokens.
    """

    decode: float
    read: float


def probe_device(
    types: Sequence[str] = TYPES,
    columns: Sequence[int] = COLUMNS,
    caches: Sequence[str] = CACHES,
    threads: int | None = None,
    rounds: int = ROUNDS,
    batches: Sequence[int] = BATCHES,
) -> DeviceProfile:
    """Measure this device.

    Args:
        types: number formats of matrices, as GGML calls them in lower case.
        columns: of matrices; formats whose blocks they do not fill are measured at the next number that does.
        caches: number formats of keys and values; f16 is among them.
        threads: by default every physical core this process may use.
        rounds: over all stacks.
        batches: tokens read at once whose time is measured too; none for decoding alone.

    Raises DanluError where llama.cpp does not run one of the formats.
    """
    started = time.monotonic()
    threads = threads or usable_cores()
    stacks = {(type, width): _stack(type, width) for type in types for width in sorted(_widths(type, columns))}
    timings: dict[Stack, Timing] = {}
    looks: dict[str, Looking] = {}
    word = math.inf
    wanted = [*dict.fromkeys([SMALL, SHALLOW, *stacks.values()])]
    with (
        tempfile.TemporaryDirectory(prefix="danlu-probe-") as folder,
        progress("probe", rounds * (len(wanted) + len(caches)), "stacks") as tick,
    ):
        file = Path(folder) / "stack.gguf"
        for _ in range(rounds):
            for stack in wanted:
                write_stack(stack, file)
                new = _time(file, threads, batches)
                timings[stack] = new.best(timings[stack]) if stack in timings else new
                tick.advance(1, f"{stack.type}, {stack.width} columns")
            write_stack(WORDY, file)
            word = min(word, _word_seconds(file, threads))
            write_stack(LOOKING, file)
            for cache in caches:
                seen = _look(file, threads, cache, bool(batches))
                before = looks.get(cache, seen)
                looks[cache] = Looking(min(seen.decode, before.decode), min(seen.read, before.read))
                tick.advance(1, f"cache of {cache}")
    rates, rest = _rates(stacks, timings, batches)
    return DeviceProfile(
        engine=str(library_version(ENGINE)),
        processor=processor(),
        instructions=tuple(instructions()),
        threads=threads,
        memory=psutil.virtual_memory().total,
        bandwidth=read_bandwidth(threads),
        matrices=tuple(rates),
        rest=tuple(rest),
        caches=tuple(_cache_rates(looks, batches)),
        word=word,
        seconds=round(time.monotonic() - started, 1),
    )


def _widths(type: str, columns: Sequence[int]) -> set[int]:
    """The numbers of columns, each raised to what fills the format's blocks and whole heads."""
    step = HEAD if fills(type, HEAD) else 256
    return {-(-width // step) * step for width in columns}


def _stack(type: str, width: int) -> Stack:
    most = layers_for("q8_0", width, MOST * bytes_per_weight("q8_0"))
    return Stack(type, width, min(layers_for(type, width, SIZE), most, LAYERS))


def _time(file: Path, threads: int, batches: Sequence[int]) -> Timing:
    with Engine(file, context=LENGTH, threads=threads) as engine:
        decode = _decode_seconds(engine, PROMPT)
        return Timing(decode, {batch: _read_seconds(engine, batch) for batch in batches})


def _decode_seconds(engine: Engine, prompt: int) -> float:
    """Of a token after a prompt of so many."""
    engine.clear()
    taken, before = [], time.perf_counter()
    for _ in engine.generate(list(_ids(prompt)), max_new_tokens=WARM + DECODED):
        now = time.perf_counter()
        taken.append(now - before)
        before = now
    return median(taken[WARM:])


def _read_seconds(engine: Engine, tokens: int, after: int = 0) -> float:
    """Of reading so many tokens where others are in the cache already."""
    engine.clear()
    if after:
        next(engine.generate(list(_ids(after)), max_new_tokens=1))
    started = time.perf_counter()
    next(engine.generate(list(_ids(after + tokens)), max_new_tokens=1))
    return time.perf_counter() - started


def _ids(count: int) -> Iterator[int]:
    return (number % 251 for number in range(count))


def _look(file: Path, threads: int, cache: str, reads: bool) -> Looking:
    """What `LENGTH` / 2 more tokens in the cache add to a token, and to reading as many."""
    half = LENGTH // 2
    with Engine(file, context=LENGTH, threads=threads, cache=cache) as engine:
        decode = _decode_seconds(engine, PROMPT + half) - _decode_seconds(engine, PROMPT)
        if not reads:
            return Looking(decode, 0.0)
        read = min(_read_seconds(engine, half - 1, half) - _read_seconds(engine, half - 1) for _ in range(2))
        return Looking(decode, read)


def _cache_rates(looks: dict[str, Looking], batches: Sequence[int]) -> Iterator[CacheRate]:
    each = LENGTH // 2 * LOOKING.layers * LOOKING.width
    for cache, look in looks.items():
        yield CacheRate(type=cache, batch=DECODE, seconds=max(look.decode / each, 0.0))
        for batch in batches:
            yield CacheRate(type=cache, batch=batch, seconds=max(look.read / each / (LENGTH // 2 - 1), 0.0))


def _rates(
    stacks: dict[tuple[str, int], Stack], timings: dict[Stack, Timing], batches: Sequence[int]
) -> tuple[list[Rate], list[Rest]]:
    """Times of matrices, and of what is beside them.

    A layer's cost is told by two stacks that differ in layers; their weights are so few that they do not count.
    """
    rates: list[Rate] = []
    rest: list[Rest] = []
    for batch in (DECODE, *batches):
        taken = {stack: _of(timing, batch) for stack, timing in timings.items()}
        layer = max(taken[SMALL] - taken[SHALLOW], 0.0) / (SMALL.layers - SHALLOW.layers)
        step = max(taken[SHALLOW] - SHALLOW.layers * layer, 0.0)
        rest.append(Rest(batch=batch, layer=layer, step=step))
        for (type, width), stack in stacks.items():
            left = taken[stack] - step - layer * stack.layers
            each = max(left, LEAST * taken[stack]) / (stack.weights + stack.words * stack.width)
            rates.append(Rate(type=type, columns=width, batch=batch, seconds=each))
    return rates, rest


def _of(timing: Timing, batch: int) -> float:
    return timing.decode if batch == DECODE else timing.read[batch]


def _word_seconds(file: Path, threads: int) -> float:
    """To choose among words, each."""
    with Engine(file, context=LENGTH, threads=threads) as engine:
        return median(engine.choosing_times(list(_ids(WARM + DECODED)))[WARM:]) / WORDY.words
