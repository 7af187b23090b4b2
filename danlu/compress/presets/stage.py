"""The compress stage, first form: number formats are tried one by one, measured on this machine, and one is kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from danlu.artifact import WORK, Figures, figure, write_json
from danlu.compress.presets.possible import check_target
from danlu.compress.presets.quantize import Stored, quantize
from danlu.compress.presets.settings import CompressSettings
from danlu.console import progress, say, warn
from danlu.device.documents import SEED, Drawn, draw_heldout
from danlu.device.measure import Measurement, Request, measure
from danlu.device.settings import Target
from danlu.device.verdict import Line, amount, judge, worst_miss
from danlu.evaluate.bootstrap import Change, interval, paired_change
from danlu.model.checkpoint import Checkpoint
from danlu.model.gguf import write_gguf

MODEL, CANDIDATES = "model.gguf", "candidates.json"


@dataclass(frozen=True)
class Candidate:
    """One number format, measured.

    Attributes:
        type: llama.cpp's file type.
        stored: how its matrices really are stored.
        measured: size, speed, memory and loss.
        change: of the held-out loss against F32.
        lines: of the target.
    """

    type: str
    stored: Stored
    measured: Measurement
    change: Change
    lines: list[Line]

    @property
    def meets(self) -> bool:
        """Whether it meets the whole target."""
        return worst_miss(self.lines) == 0

    @property
    def missed(self) -> str:
        """The lines it misses, in words."""
        return "; ".join(f"{line.name}: {line.short}" for line in self.lines if line.short)


def compress(settings: CompressSettings, target: Target, tuned: Checkpoint, data: Path, out: Path) -> Figures:
    """Try the types, keep one as model.gguf, and write candidates.json.

    Each candidate is quantized from F32, loaded in a fresh process, and measured there: file, memory, speed, and the
    loss on one and the same set of held-out documents, compared with F32 document by document.

    Args:
        settings: what is tried and how much is measured.
        target: what the device asks; where nothing meets it, the nearest is kept and said to miss.
        tuned: the checkpoint to compress.
        data: a data artifact, of which heldout/ is read.
        out: an existing directory.

    Raises DanluError where no type could ever meet the target, or llama.cpp fails.
    """
    check_target(settings, target, tuned.config)
    work = out / WORK
    work.mkdir(exist_ok=True)
    drawn = draw_heldout(data, tuned.tokenizer, settings.heldout_tokens)
    source = work / "f32.gguf"
    write_gguf(tuned.load(), tuned.tokenizer, source, "f32")
    say(f"compress: {len(settings.types)} types on {drawn.words}")
    request = Request(
        model=str(source),
        context=min(settings.context, tuned.config.context),
        threads=settings.threads,
        prompt=drawn.sample(settings.prompt_tokens),
        decode_tokens=settings.decode_tokens,
        repeats=0,
        documents=drawn.documents,
        exact=True,
    )
    reference = measure(request)
    candidates: list[Candidate] = []
    with progress("compress", len(settings.types), "types") as tick:
        for file_type in settings.types:
            file = work / f"{file_type}.gguf"
            stored = quantize(source, file_type, file, settings.threads)
            measured = measure(replace(request, model=str(file), repeats=settings.repeats, exact=False))
            candidates.append(_candidate(file_type, stored, measured, reference, drawn, target, settings.resamples))
            _keep_only(choose(candidates, settings.prefer), candidates, work)
            tick.advance(1, _in_words(candidates[-1]))
    best = choose(candidates, settings.prefer)
    if not best.meets:
        warn(f"no candidate meets the target; the nearest, {best.type}, is kept. {best.missed}")
    (work / f"{best.type}.gguf").replace(out / MODEL)
    write_json(out / CANDIDATES, [_record(each, best, settings, drawn) for each in candidates])
    return _figures(best, candidates, reference, drawn)


def choose(candidates: list[Candidate], prefer: Literal["smallest", "fastest"]) -> Candidate:
    """The smallest or fastest that meets the target; where none does, the one whose worst line is missed least."""
    meeting = [candidate for candidate in candidates if candidate.meets]
    if not meeting:
        return min(candidates, key=lambda candidate: worst_miss(candidate.lines))
    if prefer == "smallest":
        return min(meeting, key=lambda candidate: candidate.measured.file_bytes)
    return max(meeting, key=lambda candidate: candidate.measured.decode_figure()["value"])


def _candidate(
    file_type: str,
    stored: Stored,
    measured: Measurement,
    reference: Measurement,
    drawn: Drawn,
    target: Target,
    samples: int,
) -> Candidate:
    before, after, counts = drawn.pooled(reference.losses, measured.losses, drawn.counts)
    change = paired_change(before, after, counts, SEED, samples)
    lines = judge(
        target,
        file_size=figure(measured.file_bytes, "byte"),
        memory=figure(measured.peak_memory, "byte"),
        decode=measured.decode_figure(),
        loss_rise=(change.relative or change.absolute).figure("share"),
    )
    return Candidate(file_type, stored, measured, change, lines)


def _keep_only(best: Candidate, candidates: list[Candidate], work: Path) -> None:
    """Remove the files of all others: of a large model, several would fill the disk."""
    for candidate in candidates:
        if candidate is not best:
            (work / f"{candidate.type}.gguf").unlink(missing_ok=True)


def _in_words(candidate: Candidate) -> str:
    rise = (candidate.change.relative or candidate.change.absolute).value
    return (
        f"{candidate.type}: {amount(candidate.measured.file_bytes, 'byte')}, "
        f"{candidate.measured.decode_figure()['value']:,.0f} token/s, loss {rise:+.2%}"
    )


def _why(candidate: Candidate, best: Candidate, prefer: str) -> str:
    """Why a candidate is kept or not, and what about it is not as its name says."""
    if candidate is best:
        reason = f"the {prefer} that meets the target" if best.meets else f"nearest to the target. {best.missed}"
    elif candidate.missed:
        reason = candidate.missed
    else:
        reason = f"meets the target too, but is not the {prefer}"
    return f"{reason}. {candidate.stored.words}" if candidate.stored.words else reason


def _record(candidate: Candidate, best: Candidate, settings: CompressSettings, drawn: Drawn) -> dict[str, Any]:
    """A row of candidates.json."""
    measured, by = candidate.measured, f"paired with F32; {drawn.words}"
    losses, counts = drawn.pooled(measured.losses, drawn.counts)
    loss = interval(losses, counts, SEED, settings.resamples)
    row = {
        "type": candidate.type,
        "bytes": measured.file_bytes,
        "loss": loss.figure("nat/token", drawn.words),
        "loss_change": candidate.change.absolute.figure("nat/token", by),
        "decode_tokens_per_second": measured.decode_figure(),
        "prefill_tokens_per_second": measured.prefill_figure(),
        "peak_memory": figure(measured.peak_memory, "byte"),
        "matrices": candidate.stored.plain(),
        "meets": candidate.meets,
        "chosen": candidate is best,
        "why": _why(candidate, best, settings.prefer),
    }
    if candidate.change.relative is not None:
        row["loss_rise"] = candidate.change.relative.figure("share", by)
    return row


def _figures(best: Candidate, candidates: list[Candidate], reference: Measurement, drawn: Drawn) -> Figures:
    rise = best.change.relative or best.change.absolute
    return {
        "type": best.type,
        "meets_target": best.meets,
        "candidates": figure(len(candidates), "types"),
        "candidates_meeting": figure(sum(each.meets for each in candidates), "types"),
        "file_size": figure(best.measured.file_bytes, "byte"),
        "file_size_f32": figure(reference.file_bytes, "byte"),
        "peak_memory": figure(best.measured.peak_memory, "byte"),
        "decode": best.measured.decode_figure(),
        "prefill": best.measured.prefill_figure(),
        "heldout_loss_rise": rise.figure("share", f"paired with F32; {drawn.words}"),
    }
