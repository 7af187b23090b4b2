"""The search: name the memory, the speed and the quality, and get the best mix of number formats that meets them.

What each matrix costs in each format is told (sensitivity.py, and danlu/device/profile.py); a mix is chosen under the
limits, made, measured as a whole, and what that says of the telling goes into the next choice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from danlu.artifact import (
    CARD,
    WORK,
    code_version,
    content_id,
    inventory,
    make_card,
    only_writer,
    peak_memory,
    write_json,
)
from danlu.compress.quantizing.mixes import matrices
from danlu.compress.quantizing.quantizer import calibration_rows, quantize_model
from danlu.compress.searching.asked import Asked, check, heldout_documents, ingredients, parts
from danlu.compress.searching.choice import best_mix, check_possible, correct, rise_by_divergence
from danlu.compress.searching.costs import BYTES, DIVERGENCE, SECONDS, Costs
from danlu.compress.searching.frontier import sweep
from danlu.compress.searching.outcome import Outcome, Told, choose, plain
from danlu.compress.searching.sensitivity import formats, sensitivities
from danlu.console import say, warn
from danlu.device.clock import probe_device
from danlu.device.divergence import Divergences, score_divergence
from danlu.device.engine import CACHES, library
from danlu.device.measure import Document
from danlu.device.profile import DeviceProfile
from danlu.device.proof import Effort, Subject, prove, quality, speed_and_memory
from danlu.device.task import questions_of
from danlu.device.texts import documents_of
from danlu.model.gguf import write_gguf

MODEL, FRONTIER, CERTIFICATE, PROFILE, ORIGINAL = (
    "model.gguf", "frontier.json", "certificate.json", "device.json", "original.gguf",
)  # fmt: skip
CODE = "compress/searching/search"


def search(asked: Asked, out: Path) -> dict[str, Any]:
    """Find, make and certify the best file: OUT/model.gguf, frontier.json, certificate.json, card.json.

    The same call goes on from what was kept in OUT/work; Ctrl-C ends the search and keeps the best so far.

    Returns: what is in frontier.json, and the certificate.

    Raises DanluError where the texts are too short or not apart, or no mix could ever meet the target (the nearest is
    named). A target that is missed in the end is no error here: the certificate says so.
    """
    started = time.monotonic()
    library()
    check(asked)
    with only_writer(out):
        if _is_done(asked, out):
            say(f"{out}: finished already, by the same search")
            read: dict[str, Any] = json.loads((out / FRONTIER).read_text(encoding="utf-8"))
            return read
        work = out / WORK / asked.digest
        resumed = work.is_dir()
        work.mkdir(parents=True, exist_ok=True)
        if resumed:
            say("search: going on from where it was cut short")
        bench = _Bench(asked, work)
        costs = bench.costs()
        check_possible(asked, costs)
        outcomes = bench.run(costs, started)
        best = choose(outcomes, asked.target, asked.prefer)
        return _finish(asked, bench, best, outcomes, out, started, resumed)


def _is_done(asked: Asked, out: Path) -> bool:
    """Whether OUT holds what this very search makes."""
    try:
        card = json.loads((out / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    whole = all((out / name).is_file() for name in (MODEL, FRONTIER, CERTIFICATE))
    wanted = content_id("compressed", *ingredients(asked), code_version(CODE))
    return whole and card.get("id") == wanted


class _Bench:
    """Where files are made and measured; what is finished is kept in a folder."""

    def __init__(self, asked: Asked, work: Path) -> None:
        self.asked, self.work = asked, work
        self.fitted, apart = parts(asked.calibration)
        settings, tokenizer = asked.settings, asked.checkpoint.tokenizer
        self.documents = documents_of(apart, tokenizer, settings.chosen_tokens, "--calibration", asked.context)
        self.original = work / ORIGINAL
        if not self.original.is_file():
            write_gguf(asked.checkpoint.load(), tokenizer, self.original)

    def costs(self) -> Costs:
        """What is told of every matrix."""
        checkpoint, settings = self.asked.checkpoint, self.asked.settings
        shapes = matrices(checkpoint)
        profile = self._profile({shape[-1] for shape in shapes.values()})
        kept = self.work / "sensitivities.json"
        if not kept.is_file():
            rows = calibration_rows(checkpoint, self.fitted, settings.gradient_tokens)
            write_json(kept, sensitivities(checkpoint, rows, settings.types))
        losses = json.loads(kept.read_text(encoding="utf-8"))
        plain = sum(4 * int(np.prod(shape)) for shape in shapes.values())
        return Costs(checkpoint.config, shapes, losses, profile, self.original.stat().st_size - plain, {})

    def _profile(self, columns: set[int]) -> DeviceProfile:
        """The one given; else this device is measured, for the matrices of this model alone."""
        if self.asked.profile is not None:
            return self.asked.profile
        kept, settings = self.work / PROFILE, self.asked.settings
        if not kept.is_file():
            types = {form for width in columns for form in formats(settings.types, width)}
            probe_device(
                sorted(types),
                sorted(columns),
                tuple(dict.fromkeys([CACHES[0], *settings.caches])),
                settings.threads,
                settings.probe_rounds,
                batches=(),
            ).save(kept)
        return DeviceProfile.load(kept)

    def run(self, costs: Costs, started: float) -> list[Outcome]:
        """Choose, make, measure, correct, until nothing new is chosen or the time is over."""
        settings, target = self.asked.settings, self.asked.target
        found = sorted(self.work.glob("[0-9]*.json"), key=lambda path: int(path.stem))
        outcomes = [Outcome.load(path) for path in found]
        caches = self._caches() if target.memory is not None and len(settings.caches) > 1 else {CACHES[0]: 0.0}
        try:
            while len(outcomes) < settings.candidates:
                corrected = correct(costs, outcomes)
                mix = self._choose(corrected, caches, outcomes)
                if mix is None or (outcomes and time.monotonic() - started > 60 * settings.minutes):
                    break
                outcomes.append(self._make(len(outcomes), corrected, *mix))
                say(f"search: candidate {len(outcomes)}: {outcomes[-1].words}")
        except KeyboardInterrupt:
            if not outcomes:
                raise
            warn("stopped: the best so far is kept and certified; press Ctrl-C again to leave without that")
        return outcomes

    def _caches(self) -> dict[str, float]:
        """The divergence that each format of keys and values brings, measured with the original's weights."""
        kept = self.work / "caches.json"
        found: dict[str, float] = json.loads(kept.read_text()) if kept.is_file() else {CACHES[0]: 0.0}
        for cache in self.asked.settings.caches:
            if cache not in found:
                scored = self._score(self.original, cache, self.documents[:2], f"cache of {cache}")
                found[cache] = float(scored.divergence.sum() / scored.counts.sum())
                write_json(kept, found)
        return {cache: found[cache] for cache in self.asked.settings.caches}

    def _score(self, file: Path, cache: str, documents: Sequence[Document], label: str) -> Divergences:
        return score_divergence(
            self.original,
            file,
            documents,
            context=self.asked.context,
            threads=self.asked.settings.threads,
            cache=cache,
            label=label,
        )

    def _choose(
        self, costs: Costs, caches: dict[str, float], outcomes: Sequence[Outcome]
    ) -> tuple[dict[str, str], str] | None:
        """The best mix that was not made yet; None where the best one was. See `best_mix`."""
        loss = median([each.value("heldout_loss_original") for each in outcomes]) if outcomes else None
        forms, cache, _ = best_mix(self.asked, costs, caches, loss, rise_by_divergence(outcomes))
        if any(each.forms == forms and each.cache == cache for each in outcomes):
            return None
        return forms, cache

    def _make(self, number: int, costs: Costs, forms: dict[str, str], cache: str) -> Outcome:
        settings = self.asked.settings
        totals = costs.totals(forms)
        told = Told(
            float(totals[DIVERGENCE]),
            float(totals[BYTES]) + costs.fixed,
            float(totals[SECONDS]) + costs.rest_seconds(cache),
        )
        file = self.work / f"{number}.gguf"
        quantize_model(self.asked.checkpoint, forms, self.fitted, file, settings.calibration_tokens)
        scored = self._score(file, cache, self.documents, f"candidate {number + 1}")
        _, about = speed_and_memory(self.subject(file, cache, costs), self.documents, settings.repeats)
        made = Outcome(number, forms, cache, told, quality(scored, settings.resamples) | about)
        made.save(self.work)
        return made

    def subject(self, file: Path, cache: str, costs: Costs) -> Subject:
        """What is certified of a file."""
        context, threads = self.asked.context, self.asked.settings.threads
        held = costs.cache_bytes(cache, context)
        return Subject(self.original, file, cache, held, context, threads, self.asked.profile)


def _finish(
    asked: Asked, bench: _Bench, best: Outcome, outcomes: list[Outcome], out: Path, started: float, resumed: bool
) -> dict[str, Any]:
    """Certify the best and write what OUT holds."""
    settings = asked.settings
    costs = correct(bench.costs(), outcomes)
    heldout = heldout_documents(asked)
    questions = (
        questions_of(asked.task, asked.checkpoint.tokenizer, asked.checkpoint.config.context) if asked.task else []
    )
    effort = Effort(settings.repeats, settings.answers, settings.answer_tokens, settings.sustained, settings.resamples)
    file = best.file(bench.work)
    if not file.is_file():  # an earlier search with another target made it, and kept what it measured alone
        quantize_model(asked.checkpoint, best.forms, bench.fitted, file, settings.calibration_tokens)
    subject = bench.subject(file, best.cache, costs)
    certificate = prove(subject, asked.target, heldout, questions, asked.checkpoint.tokenizer, effort)
    seconds = np.inf if asked.target.speed is None else 1 / asked.target.speed
    points = sweep(costs, best.cache, seconds)
    frontier = {
        "chosen": best.number,
        "why": _why(asked, best, outcomes),
        "told": [point.plain() for point in points],
        "measured": [plain(each, asked.target, each is best) for each in outcomes],
        "corrections": {"divergence": dict(costs.slopes), "seconds": costs.pace},
        "certificate": certificate,
    }
    file.replace(out / MODEL)
    for left in bench.work.glob("*.gguf"):
        left.unlink()
    costs.profile.save(out / PROFILE)
    write_json(out / CERTIFICATE, certificate)
    write_json(out / FRONTIER, frontier)
    _sign(asked, certificate, out, started, resumed)
    return frontier


def _why(asked: Asked, best: Outcome, outcomes: Sequence[Outcome]) -> str:
    missed = best.missed(asked.target)
    count = f"{len(outcomes)} file{'s' if len(outcomes) > 1 else ''} made and measured"
    if missed:
        return f"nearest to the target, of {count}: {missed}"
    return f"the {asked.prefer} that meets the target, of {count}"


def _sign(asked: Asked, certificate: dict[str, Any], out: Path, started: float, resumed: bool) -> None:
    files = {name: about for name, about in inventory(out).items() if not name.startswith((WORK, ".", CARD))}
    card = make_card(
        "compressed",
        *ingredients(asked),
        code_version(CODE),
        {"passed": certificate["passed"], **certificate["figures"]},
        files,
        seconds=time.monotonic() - started,
        memory=peak_memory(),
        resumed=resumed,
    )
    write_json(out / CARD, card)
