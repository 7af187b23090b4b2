"""What one GGUF costs and gives on this machine, measured in a fresh process that holds nothing else.

`measure` starts that process (`python -m danlu.device.measure`: a request as JSON on standard input, figures as JSON on
standard output); what it imports is what a device would need, so its peak memory is the model's own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from danlu.artifact import figure, peak_memory
from danlu.device.energy import Counter
from danlu.device.engine import CACHES, IGNORED, Engine
from danlu.errors import DanluError


@dataclass(frozen=True)
class Document:
    """A text to be scored: `targets[i]` is the token that follows `tokens[i]`, or -100 where that is not scored."""

    tokens: list[int]
    targets: list[int]

    @property
    def count(self) -> int:
        """Tokens that are scored."""
        return sum(target != IGNORED for target in self.targets)


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        model: path of the GGUF.
        context, threads, exact, cache: see Engine.
        prompt: token ids whose reading is timed.
        decode_tokens: decoded after the prompt, timed.
        repeats: of both; 0 leaves the speed out.
        documents: to score.
    """

    model: str
    context: int
    threads: int | None
    prompt: list[int]
    decode_tokens: int
    repeats: int
    documents: list[Document]
    exact: bool = False
    cache: str = CACHES[0]


@dataclass(frozen=True)
class Measurement:
    """What was measured.

    Attributes:
        description, threads: of the engine.
        file_bytes, weight_bytes: of the file, and of the tensors in it.
        load_seconds: until the model was ready.
        prefill, decode: token/s of each repeat.
        prompt_tokens, decode_tokens: of each repeat.
        peak_memory: bytes the process held at most while it loaded the model, read the prompt and decoded.
        losses: nat, summed over each document.
        correct: tokens of each document that were the most likely ones.
        imported_torch: whether PyTorch got into the process, which it must not.
        processor: seconds of all cores together for a decoded token, of each repeat.
        energy: joules for one, of each repeat; none where the machine has no counter that may be read.
    """

    description: str
    threads: int
    file_bytes: int
    weight_bytes: int
    load_seconds: float
    prefill: list[float]
    decode: list[float]
    prompt_tokens: int
    decode_tokens: int
    peak_memory: int
    losses: list[float]
    correct: list[int]
    imported_torch: bool
    processor: list[float]
    energy: list[float]

    def prefill_figure(self) -> dict[str, Any]:
        """Reading speed: the median of the repeats and their range."""
        return _spread(self.prefill, f"median of {len(self.prefill)} prompts of {self.prompt_tokens} tokens")

    def decode_figure(self) -> dict[str, Any]:
        """Decoding speed: the median of the repeats and their range."""
        by = f"median of {len(self.decode)} times {self.decode_tokens} tokens after a prompt of {self.prompt_tokens}"
        return _spread(self.decode, by)

    def processor_figure(self) -> dict[str, Any]:
        """Work of decoding: the median of the repeats and their range."""
        by = f"all cores together, median of {len(self.processor)} times {self.decode_tokens} tokens"
        return _spread(self.processor, by, "s/token")

    def energy_figure(self) -> dict[str, Any] | None:
        """Joules of decoding, likewise; None where there is no counter."""
        if not self.energy:
            return None
        by = f"counters of all processor packages, other programs included; median of {len(self.energy)} times"
        return _spread(self.energy, f"{by} {self.decode_tokens} tokens", "J/token")


def _spread(rates: Sequence[float], by: str, unit: str = "token/s") -> dict[str, Any]:
    return figure(median(rates), unit, min(rates), max(rates), f"{by}; the range is that of the repeats")


def measure(request: Request) -> Measurement:
    """Measure in a fresh process.

    Raises DanluError with that process's own words where it fails, or says how it died.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-m", "danlu.device.measure"],
        input=json.dumps(asdict(request)),
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise DanluError(
            f"the measuring process ended with code {done.returncode}: {last[0]}", where=request.model
        ) from None
    if "error" in answer:
        raise DanluError(**answer["error"])
    return Measurement(**answer)


def work(request: Request) -> Measurement:
    """Measure in this process: speed first, so that scoring is not part of the peak memory."""
    started = time.perf_counter()
    with Engine(
        Path(request.model),
        context=request.context,
        threads=request.threads,
        exact=request.exact,
        cache=request.cache,
    ) as engine:
        load_seconds = time.perf_counter() - started
        decode_tokens = min(request.decode_tokens, engine.context // 2)
        prompt = request.prompt[: engine.context - decode_tokens - 1]
        counter = Counter.find()
        if request.repeats:
            _time(engine, prompt, 8, None)  # pages are touched and threads started before the clock counts
        timed = [_time(engine, prompt, decode_tokens, counter) for _ in range(request.repeats)]
        peak = peak_memory()
        scores = [_score(engine, document) for document in request.documents]
        return Measurement(
            description=engine.description,
            threads=engine.threads,
            file_bytes=engine.path.stat().st_size,
            weight_bytes=engine.weight_bytes,
            load_seconds=load_seconds,
            prefill=[each.prefill for each in timed],
            decode=[each.decode for each in timed],
            prompt_tokens=len(prompt),
            decode_tokens=decode_tokens,
            peak_memory=peak,
            losses=[score[0] for score in scores],
            correct=[score[1] for score in scores],
            imported_torch="torch" in sys.modules,
            processor=[each.processor for each in timed],
            energy=[each.energy for each in timed if each.energy is not None],
        )


@dataclass(frozen=True)
class _Timed:
    """One repeat; see Measurement."""

    prefill: float
    decode: float
    processor: float
    energy: float | None


def _time(engine: Engine, prompt: list[int], decode_tokens: int, counter: Counter | None) -> _Timed:
    """Read a prompt into an empty cache, and decode after it."""
    engine.clear()
    started = time.perf_counter()
    answer = engine.generate(prompt, max_new_tokens=decode_tokens + 1)
    next(answer)
    read, work = time.perf_counter(), time.process_time()
    before = {} if counter is None else counter.read()
    made = sum(1 for _ in answer)
    lasted, work = time.perf_counter() - read, time.process_time() - work
    joules = None if counter is None else counter.joules(before, counter.read()) / max(made, 1)
    return _Timed(len(prompt) / (read - started), made / lasted, work / max(made, 1), joules)


def _score(engine: Engine, document: Document) -> tuple[float, int]:
    """Sum of losses in nat, and how many tokens were the most likely ones."""
    loss, correct = engine.token_losses(document.tokens, document.targets)
    return float(loss.sum(dtype="float64")), int(correct.sum())


def main() -> None:
    """Read a request, print the figures or the error."""
    asked = json.load(sys.stdin)
    asked["documents"] = [Document(**document) for document in asked["documents"]]
    answer: dict[str, Any]
    try:
        answer = asdict(work(Request(**asked)))
    except DanluError as error:
        where = None if error.where is None else str(error.where)
        answer = {"error": {"what": error.what, "where": where, "fix": error.fix}}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
