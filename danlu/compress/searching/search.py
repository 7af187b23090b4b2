"""The search: name the memory, the speed and the quality, and get the best mix of number formats that meets them.

What each matrix costs in each format is told (sensitivity.py, and danlu/device/profile.py); a mix is chosen under the
limits, made, measured as a whole, and what that says of the telling goes into the next choice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
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
from danlu.compress.searching.asked import Asked, Question, check, heldout_documents, questions
from danlu.compress.searching.choice import best_of, check_possible
from danlu.compress.searching.frontier import sweep
from danlu.compress.searching.outcome import Outcome, plain
from danlu.compress.searching.stand_ins import say_stand_ins
from danlu.compress.searching.starts import WHOLE
from danlu.compress.searching.workbench import PROFILE, Bench
from danlu.console import say
from danlu.device.engine import library
from danlu.device.proof import Effort, Subject, prove

MODEL, FRONTIER, CERTIFICATE = "model.gguf", "frontier.json", "certificate.json"
CODE = "compress/searching/search"
SIGNED = (MODEL, FRONTIER, CERTIFICATE, PROFILE)

Show = Callable[[dict[str, Any]], None]


def search(asked: Asked, out: Path, show: Show = lambda _: None) -> dict[str, Any]:
    """Find, make and certify the best file: OUT/model.gguf, frontier.json, certificate.json, card.json.

    The same call goes on from what was kept in OUT/work; Ctrl-C ends the search and keeps the best so far. After each
    file that was made frontier.json holds what is known by then, "finished" being false in it.

    Args: show: is given the same, as a file is made and in the end.

    Returns: what is in frontier.json, and the certificate.

    Raises DanluError where the texts are too short or not apart, the task holds no question, a profile does not know
    what is needed, or no mix could ever meet the target (the nearest is named). A target that is missed in the end is
    no error here: the certificate says so.
    """
    started = time.monotonic()
    library()
    check(asked)
    asks = questions(asked)
    with only_writer(out):
        done = _finished(asked, out)
        if done is not None:
            say(f"{out}: finished already, by the same search")
            show(done)
            return done
        work = out / WORK / asked.digest
        resumed = work.is_dir()
        work.mkdir(parents=True, exist_ok=True)
        if resumed:
            say("search: going on from where it was cut short")
        bench = Bench(asked, work, started)
        say_stand_ins(asked, bench.configs())
        check_possible(asked, bench.possible())

        def grow(outcomes: list[Outcome]) -> None:
            frontier = _frontier(asked, bench, outcomes, None)
            (out / CARD).unlink(missing_ok=True)  # of another search, which signed another frontier
            write_json(out / FRONTIER, frontier)
            show(frontier)

        outcomes = bench.run(grow)
        frontier = _finish(asked, bench, asks, outcomes, out, resumed)
        show(frontier)
        return frontier


def _finished(asked: Asked, out: Path) -> dict[str, Any] | None:
    """What is in frontier.json where OUT holds what this very search makes."""
    wanted = content_id("compressed", *asked.ingredients, code_version(CODE))
    try:
        card, found = (json.loads((out / name).read_text(encoding="utf-8")) for name in (CARD, FRONTIER))
    except (OSError, ValueError):
        return None
    whole = found.get("finished") and all((out / name).is_file() for name in (MODEL, CERTIFICATE))
    return found if whole and card.get("id") == wanted else None


def _finish(
    asked: Asked, bench: Bench, asks: list[Question], outcomes: list[Outcome], out: Path, resumed: bool
) -> dict[str, Any]:
    """Certify the best and write what OUT holds."""
    best = best_of(asked, outcomes)
    file = best.file(bench.work)
    if not file.is_file():  # an earlier search with another target made it, and kept what it measured alone
        bench.write(best.start, best.forms, file)
    certificate = _certify(asked, bench.subject(file, best.cache, best.start), asks)
    frontier = _frontier(asked, bench, outcomes, certificate)
    (out / CARD).unlink(missing_ok=True)  # between two results there is none that is signed
    file.replace(out / MODEL)
    for left in bench.work.glob("*.gguf"):
        left.unlink()
    bench.start(WHOLE).costs.profile.save(out / PROFILE)
    write_json(out / CERTIFICATE, certificate)
    write_json(out / FRONTIER, frontier)
    _sign(asked, certificate, out, bench.started, resumed)
    return frontier


def _frontier(
    asked: Asked, bench: Bench, outcomes: list[Outcome], certificate: dict[str, Any] | None
) -> dict[str, Any]:
    """What can be had at which size, as far as these files tell; without a certificate it is not finished."""
    best = best_of(asked, outcomes)
    starts = bench.told_of(outcomes)
    seconds = np.inf if asked.target.speed is None else 1 / asked.target.speed
    costs = starts[0].costs
    return {
        "finished": certificate is not None,
        "chosen": best.number,
        "why": _why(asked, best, outcomes),
        "told": [point.plain() for point in sweep(starts, best.cache, bench.caches().get(best.cache, 0.0), seconds)],
        "measured": [plain(each, asked.target, each is best) for each in outcomes],
        "smaller": [bench.account(name, outcomes) for name in bench.shapes],
        "corrections": {"divergence": dict(costs.slopes), "seconds": costs.pace},
        "certificate": certificate,
    }


def _certify(asked: Asked, subject: Subject, asks: list[Question]) -> dict[str, Any]:
    settings, tokenizer = asked.settings, asked.checkpoint.tokenizer
    effort = Effort(settings.repeats, settings.answers, settings.answer_tokens, settings.sustained, settings.resamples)
    return prove(subject, asked.target, heldout_documents(asked), asks, tokenizer, effort)


def _why(asked: Asked, best: Outcome, outcomes: Sequence[Outcome]) -> str:
    missed = best.missed(asked.target)
    count = f"{len(outcomes)} file{'s' if len(outcomes) > 1 else ''} made and measured"
    if missed:
        return f"nearest to the target, of {count}: {missed}"
    return f"the {asked.prefer} that meets the target, of {count}"


def _sign(asked: Asked, certificate: dict[str, Any], out: Path, started: float, resumed: bool) -> None:
    files = {name: about for name, about in inventory(out).items() if name in SIGNED}
    card = make_card(
        "compressed",
        *asked.ingredients,
        code_version(CODE),
        {"passed": certificate["passed"], **certificate["figures"]},
        files,
        seconds=time.monotonic() - started,
        memory=peak_memory(),
        resumed=resumed,
    )
    write_json(out / CARD, card)
