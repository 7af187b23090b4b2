"""The search: name the memory, the speed and the quality, and get the best mix of number formats that meets them.

What each matrix costs in each format is told (sensitivity.py, and danlu/device/profile.py); a mix is chosen under the
limits, made, measured as a whole, and what that says of the telling goes into the next choice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
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
from danlu.compress.searching.asked import Asked, check, heldout_documents, ingredients
from danlu.compress.searching.choice import check_possible
from danlu.compress.searching.frontier import sweep
from danlu.compress.searching.outcome import Outcome, choose, plain
from danlu.compress.searching.workbench import PROFILE, Bench
from danlu.console import say
from danlu.device.engine import library
from danlu.device.proof import Effort, Subject, prove
from danlu.device.task import questions_of

MODEL, FRONTIER, CERTIFICATE = "model.gguf", "frontier.json", "certificate.json"
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
        bench = Bench(asked, work, started)
        check_possible(asked, bench.possible())
        outcomes = bench.run()
        best = choose(outcomes, asked.target, asked.prefer)
        return _finish(asked, bench, best, outcomes, out, resumed)


def _is_done(asked: Asked, out: Path) -> bool:
    """Whether OUT holds what this very search makes."""
    try:
        card = json.loads((out / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    whole = all((out / name).is_file() for name in (MODEL, FRONTIER, CERTIFICATE))
    wanted = content_id("compressed", *ingredients(asked), code_version(CODE))
    return whole and card.get("id") == wanted


def _finish(
    asked: Asked, bench: Bench, best: Outcome, outcomes: list[Outcome], out: Path, resumed: bool
) -> dict[str, Any]:
    """Certify the best and write what OUT holds."""
    file = best.file(bench.work)
    if not file.is_file():  # an earlier search with another target made it, and kept what it measured alone
        bench.write(best.start, best.forms, file)
    certificate = _certify(asked, bench.subject(file, best.cache, best.start))
    starts = bench.told_of(outcomes)
    seconds = np.inf if asked.target.speed is None else 1 / asked.target.speed
    caches = {best.cache: bench.caches().get(best.cache, 0.0)}
    costs = starts[0].costs
    frontier = {
        "chosen": best.number,
        "why": _why(asked, best, outcomes),
        "told": [point.plain() for point in sweep(starts, best.cache, caches[best.cache], seconds)],
        "measured": [plain(each, asked.target, each is best) for each in outcomes],
        "smaller": [bench.account(name, outcomes) for name in bench.shapes],
        "corrections": {"divergence": dict(costs.slopes), "seconds": costs.pace},
        "certificate": certificate,
    }
    file.replace(out / MODEL)
    for left in bench.work.glob("*.gguf"):
        left.unlink()
    costs.profile.save(out / PROFILE)
    write_json(out / CERTIFICATE, certificate)
    write_json(out / FRONTIER, frontier)
    _sign(asked, certificate, out, bench.started, resumed)
    return frontier


def _certify(asked: Asked, subject: Subject) -> dict[str, Any]:
    settings, tokenizer = asked.settings, asked.checkpoint.tokenizer
    questions = questions_of(asked.task, tokenizer, asked.checkpoint.config.context) if asked.task else []
    effort = Effort(settings.repeats, settings.answers, settings.answer_tokens, settings.sustained, settings.resamples)
    return prove(subject, asked.target, heldout_documents(asked), questions, tokenizer, effort)


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
