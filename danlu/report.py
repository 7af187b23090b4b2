"""A run as one self-contained page: what went in, what came out, and every figure with its unit and interval.

The page shows nothing that is not in the cards and files of the artifacts it is given, loads nothing, and runs no
script. A stage that is absent is left out.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain, combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from danlu import __version__
from danlu.artifact import Artifact, Figures, figure, write_aside
from danlu.errors import DanluError
from danlu.figures import parts_of, show_amount, show_change, show_range, show_seconds, show_value

if TYPE_CHECKING:
    import jinja2

PAGE = "report.html"
ANSWERS_OPEN = 4  # answers shown at once; the others are a click away
MOST_NAMES = 10  # files and directories of an artifact whose selections are all tried: 2^10 digests
MOST_CHARACTERS = 2000  # shown of any one text; what is cut is said

# What a browser may not be given: control characters, lone surrogates, and marks that reverse the text after them.
UNSHOWABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)

METRICS = (
    ("heldout_loss", "Held-out loss", "lower"),
    ("perplexity", "Perplexity", "lower"),
    ("token_accuracy", "Token accuracy", "higher"),
    ("rouge_l", "ROUGE-L of answers", "higher"),
    ("exact_match", "Exact match", "higher"),
)
HEADLINES = ("heldout_loss", "rouge_l")
FATES = (  # figure, label, class: together they are all rows read
    ("examples_kept", "kept", "kept"),
    ("exact_duplicates", "exact duplicates", "copy"),
    ("near_duplicates", "near duplicates", "near"),
    ("rejected", "rejected", "refused"),
)
SIDES = ("train", "heldout")
STAGES = {
    "data": ("Data", "数据"),
    "tune": ("Tune", "微调"),
    "evaluate": ("Evaluate", "评测"),
    "compress": ("Compress", "压缩"),
    "certify": ("Certify", "认证"),
}


def write_report(out: Path, artifacts: Mapping[str, Artifact], name: str) -> Figures:
    """Write `out`/report.html about the artifacts of a run.

    Args:
        out: an existing directory.
        artifacts: stage -> artifact, in the order they were made; any may be missing.
        name: the run's name, the page's title.

    Returns: the page's size as a figure.
    Raises DanluError where an artifact's file is damaged or matplotlib is missing.
    """
    page = render(artifacts, name)
    write_aside(out / PAGE, page)
    return {"page": figure(len(page.encode()), "byte")}


def environment() -> jinja2.Environment:
    """Where pages are made: every value is escaped, none may be missing, and numbers are shown as people write them."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=showable,
    )
    made.filters |= {
        "value": show_value,
        "parts": parts_of,
        "range": show_range,
        "amount": show_amount,
        "seconds": show_seconds,
        "pretty": pretty,
    }
    return made


def render(artifacts: Mapping[str, Artifact], name: str) -> str:
    """The page as text."""
    sections = {kind: SECTIONS[kind](artifact) for kind, artifact in artifacts.items() if kind in SECTIONS}
    template = environment().get_template("report.html.j2")
    return template.render(
        name=name,
        version=__version__,
        made=max((str(artifact.card["made"]) for artifact in artifacts.values()), default=""),
        machine=machine(artifacts) + sections.get("certify", {}).get("machine", []),
        verdict=verdict(sections),
        tiles=list(tiles(artifacts, sections)),
        lineage=lineage(artifacts, sections),
        cards=[(STAGES.get(kind, (kind, ""))[0], artifact.card) for kind, artifact in artifacts.items()],
        seconds=sum(float(artifact.card["seconds"]) for artifact in artifacts.values()),
        **{kind: sections.get(kind) for kind in SECTIONS},
    )


def showable(value: object) -> object:
    """Text without what would break the page or mislead the eye; each such character becomes U+FFFD."""
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return UNSHOWABLE.sub("\ufffd", value)
    return value


# The head of the page


class Verdict(NamedTuple):
    """What the page says first.

    Attributes:
        state: "met", "missed" or "measured", where no certificate was asked for.
        headline: in a few words.
        lines: the sentences under it.
    """

    state: str
    headline: str
    lines: list[str]


def verdict(sections: Mapping[str, dict[str, Any]]) -> Verdict:
    """Whether the target was met, and by how much the held-out loss moved."""
    lines = list(_loss_sentences(sections.get("evaluate")))
    certificate = sections.get("certify")
    if certificate is None:
        return Verdict("measured", "Measured, not certified", lines)
    asked = [line for line in certificate["lines"] if line["judged"]]
    missed = [line for line in asked if not line["passed"]]
    if not certificate["passed"]:
        lines = [f"{line['name']}: {line['short']}" for line in missed] + lines
        return Verdict("missed", f"Target missed in {len(missed)} of {len(asked)} points", lines)
    if not asked:
        return Verdict("met", "Measured on this machine; no target was set", lines)
    return Verdict("met", f"Certified: all {len(asked)} points asked for were measured and met", lines)


def _loss_sentences(evaluate: dict[str, Any] | None) -> Iterator[str]:
    if evaluate is None:
        return
    row = next((row for row in evaluate["metrics"] if row["name"] == "heldout_loss"), None)
    if row is None:
        return
    change, share = row["change"], evaluate["figures"].get("heldout_loss_change_relative")
    verb = "fell" if change["value"] < 0 else "rose"
    said = f"Held-out loss {verb} from {parts_of(row['before'])[0]} to {show_value(row['after'])}"
    if share is not None:
        said += f", a change of {show_value(share)}"
        said += f" (95 % interval {show_range(share)})" if "low" in share else ""
    yield said + "."
    if row["unclear"]:
        yield "The interval of the change includes zero: no clear effect was shown."


def tiles(artifacts: Mapping[str, Artifact], sections: Mapping[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The few figures a reader takes away."""
    for row in sections.get("evaluate", {}).get("metrics", []):
        if row["name"] in HEADLINES:
            note = f"change {row['changed']}" + (", not clear" if row["unclear"] else "")
            yield {"label": row["label"], "before": row["before"], "after": row["after"], "note": note}
    chosen = sections.get("compress", {}).get("chosen")
    if chosen is None:
        return
    whole = _weight_bytes(artifacts["tune"]) if "tune" in artifacts else 0
    yield {
        "label": "File size",
        "before": figure(whole, "byte") if whole else None,
        "after": figure(chosen["bytes"], "byte"),
        "note": f"as {chosen['type']}",
    }
    speed = sections.get("certify", {}).get("figures", {}).get("decode") or chosen["speed"]
    if speed is not None:
        yield {"label": "Decoding speed", "before": None, "after": speed, "note": "on this machine"}


def _weight_bytes(tuned: Artifact) -> int:
    files = tuned.card["files"].items()
    return sum(about["bytes"] for name, about in files if name.startswith("model/") and name.endswith(".safetensors"))


class Lane(NamedTuple):
    """One line of the lineage picture: something made, or brought from outside, and the stages that read it.

    Attributes:
        label: the role or stage, and the first digits of the digest.
        kind: the stage that made it, or "outside".
        start: column of that stage; -1 for what comes from outside.
        taps: (column, what is read) of each stage that reads it.
    """

    label: str
    kind: str
    start: int
    taps: list[tuple[int, str]]


def lineage(artifacts: Mapping[str, Artifact], sections: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The lineage picture: one column a stage, one lane for each thing read, matched by digest to its maker."""
    columns = list(artifacts)
    makers = {digest: kind for kind, artifact in artifacts.items() for digest in _digests(artifact)}
    lanes: dict[str, Lane] = {}
    for column, (kind, artifact) in enumerate(artifacts.items()):
        for role, digest in artifact.card["inputs"].items():
            maker = makers.get(str(digest), "outside")
            made = maker != "outside"
            key = maker if made else f"{role} {digest}"
            label = f"{maker if made else role} {(artifacts[maker].digest if made else str(digest))[:8]}"
            lane = lanes.setdefault(key, Lane(label, maker, columns.index(maker) if made else -1, []))
            lane.taps.append((column, f"{kind} reads {role} {str(digest)[:8]}"))
    ordered = sorted(lanes.values(), key=lambda lane: lane.start)
    nodes = []
    for column, (kind, artifact) in enumerate(artifacts.items()):
        touched = [row for row, lane in enumerate(ordered) if column in (lane.start, *(tap[0] for tap in lane.taps))]
        nodes.append(
            {
                "kind": kind,
                "title": STAGES.get(kind, (kind, ""))[0],
                "id": artifact.card["id"],
                "seconds": artifact.card["seconds"],
                "memory": artifact.card.get("peak_memory_bytes"),
                "key": [shorten(line, 24) for line in sections.get(kind, {}).get("key", [])[:2]],
                "depth": max(touched, default=-1),  # the lowest lane its stem must reach
            }
        )
    return {"nodes": nodes, "lanes": ordered}


def _digests(artifact: Artifact) -> set[str]:
    """The digests of every selection of the artifact's files and directories: a later stage reads some of them."""
    names = sorted({name.split("/")[0] + "/" * ("/" in name) for name in artifact.card["files"]})
    most = len(names) if len(names) <= MOST_NAMES else 1
    chosen = chain.from_iterable(combinations(names, size) for size in range(1, most + 1))
    return {artifact.digest, *(artifact.digest_of(*selection) for selection in chosen)}


def machine(artifacts: Mapping[str, Artifact]) -> list[tuple[str, str]]:
    """Where the run was made and with which versions, each said once; several if stages differ."""
    about: dict[str, set[str]] = {}
    for artifact in artifacts.values():
        card = artifact.card
        about.setdefault("machine", set()).add(str(card["machine"]))
        about.setdefault("danlu", set()).add(str(card["danlu"]))
        for library, version in card.get("libraries", {}).items():
            about.setdefault(library, set()).add(str(version))
    return [(name, ", ".join(sorted(values))) for name, values in about.items()]


# The sections, one function a stage


def data_section(artifact: Artifact) -> dict[str, Any]:
    """Where every row that was read went, how it was packed, and the first example as the model sees it."""
    figures = _flat(artifact.figures)
    refused = Counter(str(row.get("reason", "no reason")) for row in _json_lines(artifact.path / "rejected.jsonl"))
    first = artifact.path / "first.txt"
    fates = [(label, kind, figures[name]["value"]) for name, label, kind in FATES if name in figures]
    sides = [side for side in SIDES if any(name.startswith(f"{side}.") for name in figures)]
    packed = dict.fromkeys(name.partition(".")[2] for name in figures if name.partition(".")[0] in sides)
    return {
        "figures": figures,
        "key": [
            shown
            for name, text in (("examples_kept", "examples kept"), ("train.tokens", "tokens"))
            if (shown := f"{show_amount(figures[name]['value'])} {text}" if name in figures else "")
        ],
        "fates": [fate for fate in fates if fate[2]],
        "read": sum(count for _, _, count in fates),
        "sides": sides,
        "packed": [(name.replace("_", " "), [figures.get(f"{side}.{name}") for side in sides]) for name in packed],
        "notes": [(name.removeprefix("notes."), fig) for name, fig in figures.items() if name.startswith("notes.")],
        "refused": refused.most_common(),
        "first": first_example(first.read_text(encoding="utf-8", errors="replace")) if first.is_file() else None,
    }


def first_example(text: str) -> list[tuple[str, bool]]:
    """The pieces of first.txt, each with whether the model learns it: ⟦ and ⟧ stand around what it does."""
    pieces = re.split("[⟦⟧]", cut(text))
    return [(piece, place % 2 == 1) for place, piece in enumerate(pieces) if piece]


def tune_section(artifact: Artifact) -> dict[str, Any]:
    """Loss, learning rate and speed by step."""
    import numpy as np

    from danlu.pictures import loss_curve, smooth, step_curve

    by_step = {row["step"]: row for row in _json_lines(artifact.path / "metrics.jsonl") if "step" in row}
    rows = [by_step[step] for step in sorted(by_step)]

    def column(name: str) -> Any:
        return np.array([row.get(name, math.nan) for row in rows], dtype=np.float64)

    pictures, key = [], []
    if rows:
        steps, losses = column("step"), column("loss")
        smoothed = smooth(losses, len(losses) / 20)
        key = [f"{len(rows):,} steps", f"loss {smoothed[-1]:.3f} at the end"]
        pictures.append(loss_curve(steps, losses, smoothed))
        for name, label in (("learning_rate", "learning rate"), ("tokens_per_second", "token/s")):
            if np.isfinite(column(name)).all():
                pictures.append(step_curve(name, label, steps, column(name)))
    return {"figures": _flat(artifact.figures), "key": key, "pictures": pictures}


def evaluate_section(artifact: Artifact) -> dict[str, Any]:
    """The metrics before and after, the documents as a picture, and the answers."""
    import numpy as np

    from danlu.pictures import before_after, change_histogram

    figures = _flat(artifact.figures)
    documents = list(_json_lines(artifact.path / "documents.jsonl"))
    answers = [_answer(row) for row in _json_lines(artifact.path / "answers.jsonl")]
    pictures, fell = [], 0
    if documents:
        before, after, tokens = (
            np.array([row[name] for row in documents], dtype=np.float64)
            for name in ("loss_before", "loss_after", "tokens")
        )
        pictures = [
            before_after(before / tokens, after / tokens, tokens),
            change_histogram((after - before) / tokens),
        ]
        fell = int((after < before).sum())
    metrics = [row for name, label, better in METRICS if (row := _metric(figures, name, label, better))]
    return {
        "figures": figures,
        "key": [
            f"{row['label'].removesuffix(' of answers')} {show_change({**row['change'], 'unit': ''})}"
            for row in metrics
            if row["name"] in HEADLINES
        ],
        "metrics": metrics,
        "answers": answers,
        "open": ANSWERS_OPEN,
        "pictures": pictures,
        "documents": len(documents),
        "fell": fell,
    }


def _metric(figures: Figures, name: str, label: str, better: str) -> dict[str, Any] | None:
    """One row of the before/after table with its two intervals on a common scale, or None if it was not measured."""
    if f"{name}_before" not in figures or f"{name}_after" not in figures:
        return None
    before, after = figures[f"{name}_before"], figures[f"{name}_after"]
    change, relative = figures.get(f"{name}_change"), figures.get(f"{name}_change_relative")
    if change is None:
        change = relative or figure(after["value"] - before["value"], before["unit"])
    ends = [each[key] for each in (before, after) for key in ("low", "value", "high") if key in each]
    low, spread = min(ends), (max(ends) - min(ends)) or 1.0

    def place(value: float) -> float:
        return round(4 + 92 * (value - low) / spread, 2)

    bars = []
    for each in (before, after):
        left, right = place(each.get("low", each["value"])), place(each.get("high", each["value"]))
        bars.append({"at": place(each["value"]), "from": left, "wide": round(right - left, 2)})
    unclear = "low" not in change or change["low"] <= 0 <= change["high"]
    good = (change["value"] < 0) == (better == "lower")
    return {
        "name": name,
        "label": label,
        "before": before,
        "after": after,
        "change": change,
        "changed": show_change(change, points=change is not relative),
        "bars": bars,
        "unclear": unclear,
        "state": "unclear" if unclear else "good" if good else "bad",
    }


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    made = {key: cut(str(row.get(key, ""))) for key in ("prompt", "reference", "before", "after")}
    return made | {key: row.get(key) for key in ("rouge_before", "rouge_after", "cut_before", "cut_after")}


def compress_section(artifact: Artifact) -> dict[str, Any]:
    """Every form that was tried, the one that was kept, and why."""
    from danlu.pictures import candidates_scatter

    candidates = _json(artifact.path / "candidates.json")
    for row in candidates:
        row["loss_change"] = as_figure(row.get("loss_change"), "nat/token")
        row["speed"] = as_figure(row.get("decode_tokens_per_second"), "token/s")
        row["memory"] = as_figure(row.get("peak_memory"), "byte")
    chosen = next((place for place, row in enumerate(candidates) if row.get("chosen")), -1)
    measured = [row for row in candidates if row["loss_change"] is not None]
    pictures = []
    if measured:
        marked = next((place for place, row in enumerate(measured) if row.get("chosen")), -1)
        changes, names = [row["loss_change"] for row in measured], [shorten(str(row["type"]), 16) for row in measured]
        sizes = [row["bytes"] / 1e6 for row in measured]
        pictures.append(candidates_scatter("size", "file size, MB", sizes, changes, names, marked))
        if all(row["speed"] is not None for row in measured):
            speeds = [row["speed"]["value"] for row in measured]
            pictures.append(candidates_scatter("speed", "decoding, token/s", speeds, changes, names, marked))
    kept = candidates[chosen] if chosen >= 0 else None
    return {
        "figures": _flat(artifact.figures),
        "key": [f"{len(candidates)} forms tried"]
        + ([f"{kept['type']}, {show_amount(kept['bytes'], 'byte')}"] if kept else []),
        "candidates": candidates,
        "memory": any(row["memory"] for row in candidates),
        "chosen": kept,
        "pictures": pictures,
    }


def certify_section(artifact: Artifact) -> dict[str, Any]:
    """The certificate, line by line, and the proof that training, export and serving agree."""
    certificate = _json(artifact.path / "certificate.json")
    lines = [_line(row) for row in certificate["lines"]]
    judged = [line for line in lines if line["judged"]]
    proof = _flat(certificate.get("parity") or {})
    return {
        "figures": _flat(artifact.figures),
        "key": [f"{sum(line['passed'] for line in judged)} of {len(judged)} points met"],
        "passed": certificate["passed"],
        "lines": lines,
        "proof": [(name.replace("_", " "), fig) for name, fig in proof.items()],
        "differences": [cut(str(each)) for each in certificate.get("differences") or ()],
        "machine": _words({**(certificate.get("machine") or {}), **(certificate.get("engine") or {})}),
    }


def _line(row: Mapping[str, Any]) -> dict[str, Any]:
    """A certificate's line with the bar that shows what was measured as a share of what was asked."""
    measured = as_figure(row["measured"], "") or figure(math.nan, "")
    asked = as_figure(row.get("asked"), measured["unit"])
    share = measured["value"] / asked["value"] if asked is not None and asked["value"] else None
    return {
        "name": row["name"],
        "asked": asked,
        "measured": measured,
        "passed": row["passed"],
        "judged": asked is not None,
        "short": row.get("short", ""),
        "share": share,
        "bar": None if share is None else round(50 * min(2.0, max(0.0, share)), 2),  # what was asked is the middle
    }


SECTIONS = {
    "data": data_section,
    "tune": tune_section,
    "evaluate": evaluate_section,
    "compress": compress_section,
    "certify": certify_section,
}


# Reading files


def as_figure(value: Any, unit: str) -> Any:
    """A bare number as a figure of the given unit; a figure, or nothing, as it is."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return figure(value, unit)
    return value


def cut(text: str) -> str:
    """At most MOST_CHARACTERS of a text; what is missing is said."""
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]} … ({len(text) - MOST_CHARACTERS:,} more characters)"


def shorten(text: str, most: int) -> str:
    """A text that must fit in a line of a picture."""
    text = str(showable(text))
    return text if len(text) <= most else text[: most - 1] + "…"


def pretty(value: object) -> str:
    """Settings as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def _words(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A flat mapping as lines of a table."""
    joined = {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in about.items()}
    return [(name.replace("_", " "), show_amount(value)) for name, value in joined.items()]


def _flat(figures: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested figures by one dotted name each; bare numbers and words become figures without a unit."""
    made: dict[str, Any] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping) and "value" not in value:
            made |= _flat(value, f"{before}{name}.")
        else:
            made[before + name] = value if isinstance(value, Mapping) else {"value": value, "unit": ""}
    return made


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DanluError(f"cannot be read: {error}", where=path, fix="delete its artifact and run again") from None


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON lines file; none if the stage wrote no such file."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DanluError(
                    f"is no JSON: {error}", where=f"{path}:{number}", fix="delete its artifact and run again"
                ) from None
