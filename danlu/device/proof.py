"""The certificate of a compressed file against its original, on texts of the user's own: what is asked, what is so.

Where the target device is this one, speed is measured; for another one it is told from that device's profile, and said
to be.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from danlu.artifact import Figures, figure, library_version
from danlu.console import say
from danlu.device.bandwidth import read_bandwidth
from danlu.device.divergence import Divergences, score_divergence
from danlu.device.documents import SEED
from danlu.device.loops import loop_rate
from danlu.device.measure import Document, Measurement, Request, measure
from danlu.device.phones import extrapolate
from danlu.device.probe import instructions, processor
from danlu.device.profile import ENGINE, READ, DeviceProfile
from danlu.device.settings import Target
from danlu.device.stack import bytes_per_weight
from danlu.device.sustained import sustained_speed
from danlu.device.task import Asked, task_figures
from danlu.device.verdict import Line, amount, judge
from danlu.device.workload import Workload
from danlu.evaluate.bootstrap import interval, paired_change
from danlu.tokenizer import Tokenizer

PROMPT, DECODED = 128, 64  # tokens of a timed repeat
BEGINNING = 32  # tokens of a document that a long answer goes on from
TOLD = "told by"  # so begins how a figure was got that was not measured
# What is measured and not judged: its figure, and what its line is called.
BESIDE = {
    "decode_here": "decoding here", "prefill": "prefill", "prefill_here": "prefill here",
    "sustained": "sustained", "sustained_trend": "sustained, last quarter to first",
    "divergence": "divergence", "same_top": "same top",
    "task_rouge_l": "task, ROUGE-L", "task_rouge_l_original": "task, ROUGE-L, original",
    "task_rouge_l_change": "task, ROUGE-L, change", "task_exact": "task, exact answers",
    "task_exact_original": "task, exact answers, original", "task_exact_change": "task, exact answers, change",
    "loops": "loops", "loops_original": "loops, original", "peak_memory": "peak memory",
}  # fmt: skip


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        repeats: of speed. answers, answer_tokens: whose loops are counted.
        sustained: seconds of decoding without a pause; 0 for none.
        resamples: behind each interval.
    """

    repeats: int
    answers: int
    answer_tokens: int
    sustained: float
    resamples: int


@dataclass(frozen=True)
class Subject:
    """What is certified.

    Attributes:
        original: F32 GGUF. model: the compressed file.
        cache: number format of its keys and values. cache_bytes: of them, at `context` tokens.
        context, threads: see Engine.
        profile: of another device than this one; None where it is this one.
    """

    original: Path
    model: Path
    cache: str
    cache_bytes: int
    context: int
    threads: int | None
    profile: DeviceProfile | None


def prove(
    subject: Subject,
    target: Target,
    heldout: Sequence[Document],
    questions: Sequence[Asked],
    tokenizer: Tokenizer,
    effort: Effort,
) -> dict[str, Any]:
    """Measure everything; the certificate, JSON-ready, whole whether the target is met or missed.

    Args:
        heldout: documents that had no part in making the file.
        questions: the user's own task; none where there is none.

    Raises DanluError where a file does not load.
    """
    say(f"certify: {subject.model.name} on {len(heldout)} held-out documents")
    found = score_divergence(
        subject.original,
        subject.model,
        heldout,
        context=subject.context,
        threads=subject.threads,
        cache=subject.cache,
        label="certify",
    )
    figures = quality(found, effort.resamples)
    measured, about = speed_and_memory(subject, heldout, effort.repeats)
    figures |= about
    if effort.answers:
        figures |= _loops(subject, heldout, effort)
    if questions:
        figures |= task_figures(
            subject.original,
            subject.model,
            questions,
            tokenizer,
            threads=subject.threads,
            cache=subject.cache,
            samples=effort.resamples,
        )
    if effort.sustained and subject.profile is not None:
        say("certify: decoding without a pause is left out: it says something only on the device itself")
    elif effort.sustained:
        prompt = heldout[0].tokens[:BEGINNING]
        figures |= sustained_speed(
            subject.model,
            prompt,
            effort.sustained,
            context=subject.context,
            threads=subject.threads,
            cache=subject.cache,
        )
    phones = _phones(subject.model, measured, subject.profile)
    lines = _lines(target, figures)
    return {
        "passed": all(not line.short for line in lines),
        "lines": [line.plain() for line in lines],
        "figures": figures,
        "phones": phones,
        "cache": subject.cache,
        "context": subject.context,
        "machine": {"processor": processor(), "instructions": instructions(), "system": platform.platform()},
        "engine": {
            "name": "llama.cpp",
            ENGINE: library_version(ENGINE),
            "model": measured.description,
            "threads": measured.threads,
        },
    }


def quality(found: Divergences, samples: int) -> Figures:
    """Divergence, loss and its rise, each with its interval over documents."""
    change = paired_change(found.original_loss, found.loss, found.counts, SEED, samples)
    by = f"{len(found.counts)} documents, which are resampled; {int(found.counts.sum()):,} tokens"
    return {
        "divergence": interval(found.divergence, found.counts, SEED, samples).figure("nat/token", by),
        "same_top": interval(found.same, found.counts, SEED, samples).figure("share", by),
        "heldout_loss": interval(found.loss, found.counts, SEED, samples).figure("nat/token", by),
        "heldout_loss_original": interval(found.original_loss, found.counts, SEED, samples).figure("nat/token", by),
        "heldout_loss_rise": (change.relative or change.absolute).figure("share", f"paired; {by}"),
    }


def speed_and_memory(subject: Subject, documents: Sequence[Document], repeats: int) -> tuple[Measurement, Figures]:
    """Sizes and speeds of a file, in a process of its own."""
    joined = [token for document in documents for token in document.tokens]
    request = Request(
        model=str(subject.model),
        context=subject.context,
        threads=subject.threads,
        prompt=(joined * (PROMPT // len(joined) + 1))[:PROMPT],
        decode_tokens=DECODED,
        repeats=repeats,
        documents=[],
        cache=subject.cache,
    )
    measured = measure(request)
    memory = measured.file_bytes + subject.cache_bytes
    by = f"the file and keys and values of {subject.context:,} tokens as {subject.cache}"
    figures = {
        "file_size": figure(measured.file_bytes, "byte"),
        "memory": figure(memory, "byte", by=by),
        "peak_memory": figure(measured.peak_memory, "byte", by="of a whole process here, Python and the engine in it"),
        "decode": measured.decode_figure(),
        "prefill": measured.prefill_figure(),
    }
    if subject.profile is not None:
        figures |= {f"{name}_here": figures.pop(name) for name in ("decode", "prefill")}
        figures |= told_speeds(subject.profile, Workload.of_file(subject.model), subject.cache)
    return measured, figures


def told_speeds(profile: DeviceProfile, workload: Workload, cache: str) -> Figures:
    """Token/s of a file on the device of a profile; of reading where reading was measured there.

    Raises DanluError where the profile does not know the file's formats.
    """
    by = f"{TOLD} the profile of {profile.processor}, {profile.threads} threads; not measured"
    seconds = profile.seconds_for(workload, depth=PROMPT + DECODED / 2, cache=cache)
    told = {"decode": figure(1 / seconds, "token/s", by=by)}
    if profile.reads(workload, cache):
        read = figure(READ / profile.prompt_seconds(workload, cache), "token/s", by=f"{by}; {READ} tokens at once")
        told["prefill"] = read
    return told


def _loops(subject: Subject, documents: Sequence[Document], effort: Effort) -> Figures:
    """The share of long answers that end in a loop, the original's beside it."""
    step = max(1, len(documents) // effort.answers)
    prompts = [document.tokens[:BEGINNING] for document in documents[::step]][: effort.answers]
    tokens = min(effort.answer_tokens, subject.context - BEGINNING)
    by = f"{len(prompts)} greedy answers of {tokens} tokens that end in a cycle"
    rate = partial(loop_rate, prompts=prompts, tokens=tokens, threads=subject.threads)
    return {
        "loops": rate(subject.model, cache=subject.cache).figure("share", by),
        "loops_original": rate(subject.original, mapped=True).figure("share", by),
    }


def _phones(model: Path, measured: Measurement, profile: DeviceProfile | None) -> Figures:
    """Canalys' line, from what is reached of this machine's bandwidth; a profile's device too, where there is one."""
    matrices = Workload.of_file(model).matrices
    weights = sum(matrix.rows * matrix.columns for matrix in matrices)
    read = sum(matrix.rows * matrix.columns * bytes_per_weight(matrix.type) for matrix in matrices)
    rate = measured.decode_figure()["value"] * read
    share = float(np.clip(rate / read_bandwidth(measured.threads), 0.0, 1.0))
    device = None if profile is None else (profile.processor, profile.bandwidth / 1e9)
    return extrapolate(8 * read / weights, share, device)


def _lines(target: Target, figures: Figures) -> list[Line]:
    """The target's lines, and what is measured beside them."""
    judged = judge(
        target,
        file_size=figures["file_size"],
        memory=figures["memory"],
        decode=figures["decode"],
        loss_rise=figures["heldout_loss_rise"],
        memory_name="memory of file and cache",
    )
    return [*judged, *(Line(words, None, figures[name]) for name, words in BESIDE.items() if name in figures)]


def _amount(value: float, unit: str) -> str:
    return f"{value:.4f} {unit}" if unit == "nat/token" else amount(value, unit)


def in_words(certificate: dict[str, Any]) -> list[str]:
    """A line of text for each line of a certificate."""
    lines = []
    for line in certificate["lines"]:
        measured = line["measured"]
        value = _amount(measured["value"], measured["unit"])
        spread = ""
        if "low" in measured:
            low, high = (_amount(measured[end], measured["unit"]) for end in ("low", "high"))
            spread = f" ({low} to {high})"
        asked = "" if line["asked"] is None else f"; asked {amount(line['asked']['value'], line['asked']['unit'])}"
        verdict = "" if line["asked"] is None else (", met" if line["passed"] else ", MISSED")
        told = f"; {measured['by']}" if measured.get("by", "").startswith(TOLD) else ""
        lines.append(f"{line['name']}: {value}{spread}{asked}{verdict}{told}")
    return lines


def phones_in_words(certificate: dict[str, Any]) -> list[str]:
    """Canalys' line, a line of text for each device."""
    phones = certificate["phones"].items()
    return [f"{name}: {each['value']:,.1f} {each['unit']}; {each['by']}" for name, each in phones]
