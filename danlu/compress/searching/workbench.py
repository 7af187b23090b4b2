"""Where files are made and measured; what is finished is kept in a folder, so that a search goes on where it ended."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from danlu.artifact import write_json
from danlu.compress.quantizing.mixes import matrices, matrices_of
from danlu.compress.quantizing.quantizer import calibration_rows, quantize_model
from danlu.compress.searching.asked import Asked, parts
from danlu.compress.searching.choice import Mix, able, best_mix, best_of, correct, most_own, rise_of, with_doubt
from danlu.compress.searching.costs import Costs
from danlu.compress.searching.outcome import Outcome
from danlu.compress.searching.sensitivity import Sensitivities, formats, sensitivities
from danlu.compress.searching.starts import WHOLE, Start, read_shape, smaller_config, smaller_shapes, write_smaller
from danlu.console import say, warn
from danlu.device.clock import probe_device
from danlu.device.divergence import Divergences, score_divergence
from danlu.device.engine import CACHES
from danlu.device.measure import Document
from danlu.device.profile import DeviceProfile
from danlu.device.proof import Subject, quality, speed_and_memory
from danlu.device.texts import FEWEST, documents_of
from danlu.model.checkpoint import Checkpoint
from danlu.model.config import ModelConfig
from danlu.model.gguf import write_gguf

PROFILE, ORIGINAL, OWN, KEPT_CACHES = "device.json", "original.gguf", "own.json", "caches.json"


class Bench:
    """The folder of one search.

    Args:
        asked: what is searched.
        work: the folder.
        started: time.monotonic() when the search began.
    """

    def __init__(self, asked: Asked, work: Path, started: float) -> None:
        self.asked, self.work, self.started = asked, work, started
        self.fitted, apart = parts(asked.calibration)
        settings, tokenizer = asked.settings, asked.checkpoint.tokenizer
        length = min(asked.context, settings.chosen_tokens // FEWEST)
        self.documents = documents_of(apart, tokenizer, settings.chosen_tokens, "--calibration", length)
        self.shapes = smaller_shapes(asked.checkpoint.config, settings.pruning)
        self.original = work / ORIGINAL
        if not self.original.is_file():
            write_gguf(asked.checkpoint.load(), tokenizer, self.original)
        self._starts: dict[str, Start] = {}

    # What is told

    def start(self, name: str) -> Start:
        """The model as it is, or a smaller one, with what rounding it costs, as told."""
        if name not in self._starts:
            self._starts[name] = self._whole() if name == WHOLE else self._smaller(name)
        return self._starts[name]

    def _whole(self) -> Start:
        return Start(WHOLE, self.asked.checkpoint, self._costs(self.asked.checkpoint, self.original, "sensitivities"))

    def _smaller(self, name: str) -> Start:
        file = self._smaller_file(name)
        checkpoint = Checkpoint.open(file)
        return Start(name, checkpoint, self._costs(checkpoint, file, f"sensitivities-{name}"), self.own(name))

    def _smaller_file(self, name: str) -> Path:
        file = self.work / f"{name}.gguf"
        if not file.is_file():
            say(f"search: a smaller model, {name}")
            tokens = self.asked.settings.calibration_tokens
            write_smaller(self.asked.checkpoint, read_shape(name), self.fitted, tokens, file)
        return file

    def own(self, name: str) -> float:
        """The divergence, nat a token, that a smaller model has in F32."""
        kept = self._kept(OWN)
        if name not in kept:
            kept[name] = self._divergence(self._smaller_file(name), CACHES[0], self.documents, name)
            write_json(self.work / OWN, kept)
        return kept[name]

    def caches(self) -> dict[str, float]:
        """The divergence that each format of keys and values brings, measured with the original's weights."""
        wanted = self.asked.caches
        kept = {CACHES[0]: 0.0} | self._kept(KEPT_CACHES)
        for cache in wanted:
            if cache not in kept:
                kept[cache] = self._divergence(self.original, cache, self.documents[:2], f"cache of {cache}")
                write_json(self.work / KEPT_CACHES, kept)
        return {cache: kept[cache] for cache in wanted}

    def _kept(self, name: str) -> dict[str, float]:
        file = self.work / name
        found: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return found

    def _costs(self, checkpoint: Checkpoint, file: Path, name: str) -> Costs:
        """What is told of every matrix of a model, whose F32 GGUF is `file`; kept by this name."""
        shapes, kept = matrices(checkpoint), self.work / f"{name}.json"
        profile = self._profile()
        if not kept.is_file():
            rows = calibration_rows(checkpoint, self.fitted, self.asked.settings.gradient_tokens)
            write_json(kept, asdict(sensitivities(checkpoint, rows, self.asked.types)))
        told = Sensitivities(**json.loads(kept.read_text(encoding="utf-8")))
        plain = sum(4 * int(np.prod(shape)) for shape in shapes.values())
        fixed = file.stat().st_size - plain
        return Costs(checkpoint.config, shapes, told.rounding, told.inputs, profile, fixed, {})

    def possible(self) -> dict[str, Costs]:
        """Sizes and times, and no divergence, of the model and of all smaller ones that may be made of it."""
        whole = self.start(WHOLE).costs
        smaller = {name: config for name, config in self.configs().items() if name != WHOLE}
        return {WHOLE: whole} | {name: whole.of_config(config, self.asked.types) for name, config in smaller.items()}

    def configs(self) -> dict[str, ModelConfig]:
        """Of the model and of all smaller ones that may be made of it, by name."""
        whole = self.asked.checkpoint.config
        return {WHOLE: whole} | {name: smaller_config(whole, shape) for name, shape in self.shapes.items()}

    def _profile(self) -> DeviceProfile:
        """The one given; else this device is measured, for the matrices of this model alone."""
        if self.asked.profile is not None:
            return self.asked.profile
        kept, settings = self.work / PROFILE, self.asked.settings
        if not kept.is_file() or not DeviceProfile.load(kept).knows(self.asked.caches):
            columns = _columns(self.asked.checkpoint.config)
            every = columns.union(*map(_columns, self.configs().values()))
            types = {form for width in every for form in formats(self.asked.types, width)}
            probe_device(
                sorted(types),
                sorted(columns),
                tuple(dict.fromkeys([CACHES[0], *settings.caches])),
                settings.threads,
                settings.probe_rounds,
                batches=(),
            ).save(kept)
        return DeviceProfile.load(kept)

    # What is made and measured

    def run(self, show: Callable[[list[Outcome]], None]) -> list[Outcome]:
        """Choose, make, measure, correct, until nothing new is chosen or the time is over; Ctrl-C ends it too.

        Args: show: is given what was made so far, after each file.
        """
        settings = self.asked.settings
        found = sorted(self.work.glob("[0-9]*.json"), key=lambda path: int(path.stem))
        outcomes = [Outcome.load(path) for path in found]
        try:
            while self._tries(outcomes) < settings.candidates and not (able(self.asked, outcomes) and self._is_late()):
                mix = self._next(outcomes)
                if mix is None:
                    break
                outcomes.append(self._make(len(outcomes), mix))
                self._tell(outcomes)
                show(outcomes)
        except KeyboardInterrupt:
            if not able(self.asked, outcomes):
                raise
            warn("stopped: the best so far is kept and certified; press Ctrl-C again to leave without that")
        return outcomes

    def _tries(self, outcomes: Sequence[Outcome]) -> int:
        return sum(each.limits == self.asked.limits for each in able(self.asked, outcomes))

    def _is_late(self) -> bool:
        return time.monotonic() - self.started > 60 * self.asked.settings.minutes

    def _tell(self, outcomes: Sequence[Outcome]) -> None:
        newest = outcomes[-1]
        best = best_of(self.asked, outcomes)
        say(f"search: candidate {newest.number + 1} ({newest.start}): {newest.words}; best so far: {best.number + 1}")

    def corrected(self, outcomes: Sequence[Outcome], names: Sequence[str] = ()) -> dict[str, Start]:
        """The model, those that outcomes were made of and these, by name, as what was measured has corrected them."""
        wanted = dict.fromkeys([WHOLE, *(each.start for each in outcomes), *names])
        kept = {CACHES[0]: 0.0} | self._kept(KEPT_CACHES)
        return correct({name: self.start(name) for name in wanted}, kept, outcomes)

    def best(self, starts: Sequence[Start], outcomes: Sequence[Outcome]) -> Mix:
        """The best mix of these models. See `best_mix`."""
        return best_mix(self.asked, starts, self.caches(), rise_of(self.asked, outcomes))

    def _next(self, outcomes: Sequence[Outcome]) -> Mix | None:
        """The best mix, if it was not made yet. Smaller models are looked at once there is something to beat, or where
        the whole one cannot keep the limits, even if the clock should be off."""
        first = None if outcomes else self._first()
        if first is not None:
            return first
        starts = self.corrected(outcomes, self.pursued(outcomes))
        mix = self.best(list(starts.values()), outcomes)
        return None if any(map(mix.is_of, outcomes)) else mix

    def _first(self) -> Mix | None:
        """The best mix of the whole model, if it may keep the limits. Where by this machine's clock speed and loss do
        not go together, it is the best that is slower by what the clock may be off: once made, it tells more."""
        starts, caches, rise = list(self.corrected([]).values()), self.caches(), rise_of(self.asked, [])
        strict, patient = (best_mix(asked, starts, caches, rise) for asked in (self.asked, with_doubt(self.asked)))
        if not (strict.within or patient.within):
            return None
        loss, timed_here = self.asked.target.quality_loss, self.asked.profile is None
        most = np.inf if loss is None else rise.most_divergence(loss)
        doubted = timed_here and not strict.keeps(most) and patient.keeps(most)
        return patient if doubted else strict

    def pursued(self, outcomes: Sequence[Outcome]) -> list[str]:
        """Smaller models that may still win."""
        most = most_own(self.asked, outcomes)
        return [name for name in self.shapes if self.own(name) < most]

    def _make(self, number: int, mix: Mix) -> Outcome:
        settings, file = self.asked.settings, self.work / f"{number}.gguf"
        self.write(mix.start.name, mix.forms, file)
        scored = self._score(file, mix.cache, self.documents, f"candidate {number + 1}")
        _, about = speed_and_memory(self.subject(file, mix.cache, mix.start.name), self.documents, settings.repeats)
        figures = quality(scored, settings.resamples) | about
        made = Outcome(number, mix.forms, mix.cache, mix.told, figures, mix.start.name, self.asked.limits)
        made.save(self.work)
        return made

    def write(self, name: str, forms: Mapping[str, str], file: Path) -> None:
        """A model of this name, rounded."""
        settings, checkpoint = self.asked.settings, self.start(name).checkpoint
        tokens, steps, passes = settings.calibration_tokens, settings.tuning_steps, settings.refining_passes
        quantize_model(checkpoint, forms, self.fitted, file, tokens, steps, passes=passes)

    def subject(self, file: Path, cache: str, name: str) -> Subject:
        """What is certified of a file that was made of the model of this name."""
        context, threads = self.asked.context, self.asked.settings.threads
        held = self.start(name).costs.cache_bytes(cache, context)
        return Subject(self.original, file, cache, held, context, threads, self.asked.profile)

    def _divergence(self, file: Path, cache: str, documents: Sequence[Document], label: str) -> float:
        """From the original, nat a token."""
        scored = self._score(file, cache, documents, label)
        return float(scored.divergence.sum() / scored.counts.sum())

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

    def account(self, name: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """What became of a smaller model, as in frontier.json."""
        own, most = self._kept(OWN).get(name), most_own(self.asked, outcomes)
        told, made = None, any(each.start == name for each in outcomes)
        if own is None:
            why = "not looked at: the search ended before"
        elif own >= most and not made:
            why = f"not gone on with: {own:.4f} nat/token from the original unrounded; {most:.4f} is to be beaten"
        elif self._is_told(name):
            mix = self.best([self.corrected(outcomes, [name])[name]], outcomes)
            told = asdict(mix.told)
            beside = "" if mix.within else ", and beyond a limit"
            why = f"told {mix.told.divergence:.4f} nat/token with the best mix{beside}; {'' if made else 'not '}made"
        else:
            why = "not made: the search ended before"
        return {"name": name, "divergence": own, "told": told, "why": why}

    def _is_told(self, name: str) -> bool:
        return (self.work / f"sensitivities-{name}.json").is_file()

    def told_of(self, outcomes: Sequence[Outcome]) -> list[Start]:
        """All models whose costs are known by now, corrected."""
        return list(self.corrected(outcomes, [name for name in self.shapes if self._is_told(name)]).values())


def _columns(config: ModelConfig) -> set[int]:
    return {shape[-1] for shape in matrices_of(config).values()}
