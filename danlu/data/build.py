"""The data stage: sources in, an artifact of packed rows and readable examples out.

Two passes, so that memory does not grow with the data. The first reads, understands and cleans every row, sets the
examples aside on disk and hashes them. Then copies and sides are decided. The second renders, tokenizes and packs.
"""

from __future__ import annotations

import itertools
import json
import shutil
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from danlu.artifact import WORK, Figures, figure
from danlu.console import progress, say, warn
from danlu.data import split
from danlu.data.clean import check, clean
from danlu.data.duplicates import EXACT, KEPT, NEAR, CopyFinder
from danlu.data.example import BadRow, Example, Origin, Row, preview, printable
from danlu.data.formats import LOOKED_AT, Layout, detect
from danlu.data.pack import Packer, PackFigures
from danlu.data.settings import DataSettings, Side, Source
from danlu.data.sources import read
from danlu.data.spill import Spill
from danlu.data.template import Document, Templater
from danlu.errors import DanluError
from danlu.tokenizer import Tokenizer

SIDES: tuple[Side, Side] = ("train", "heldout")
REJECTED = "rejected.jsonl"
COPIES = "duplicates.jsonl"
FIRST = "first.txt"
TOGETHER = 1024  # examples hashed, or rendered and tokenized, at a time: enough to keep all cores busy
CHARACTERS = 4_000_000  # or fewer, where they are long
PEEKED = 10_000  # unreadable rows at the beginning of a file that are passed over to find out its layout
REASONS_SHOWN = 3  # in the error where every row is rejected
SHOWN = 4_000  # characters of the first example on the screen


def build_data(settings: DataSettings, tokenizer: Tokenizer, out: Path, seed: int) -> Figures:
    """Fill `out` with train/ and heldout/ (tokens.npy, segments.npy, trained.npy), train.jsonl, heldout.jsonl,
    rejected.jsonl, duplicates.jsonl and first.txt.

    Args:
        settings: what to read, and how.
        tokenizer: of the checkpoint that will learn from it; chats are rendered with its own template.
        out: an existing directory. What an interrupted run left there is written anew.
        seed: shuffles documents before they are packed. It changes neither what is kept nor what is held out.

    Returns the figures: rows read = kept + exact and near duplicates + rejected, and for each side examples,
    documents, rows, tokens, trained tokens and packing efficiency.
    Raises DanluError where nothing can be learned from the sources or nothing can be held out; `out` is then as
    empty as before.
    """
    _clear(out)
    try:
        figures = _build(settings, tokenizer, out, seed)
    except BaseException:
        _clear(out)
        raise
    shutil.rmtree(out / WORK)
    return figures


def _build(settings: DataSettings, tokenizer: Tokenizer, out: Path, seed: int) -> Figures:
    with closing(Rejections(out / REJECTED)) as rejections, closing(Spill(out / WORK)) as spill:
        gathered = _gather(settings, spill, rejections, out / WORK)
        copies = Copies(*gathered.finder.leaders(lambda number: spill[number].wording()))
        if settings.deduplicate == "none":  # copies stay, all on the side of the first
            held = _held_out(settings, gathered, np.ones(len(spill), dtype=bool))[copies.leader]
            copies = Copies(copies.leader, np.zeros_like(copies.kind))
        else:
            held = _held_out(settings, gathered, copies.kind == KEPT)
        templater = Templater(tokenizer, settings.window)
        padding = next(number for number in (tokenizer.pad_id, tokenizer.eos_id, 0) if number is not None)
        with ExitStack() as stack:
            writers = [SideWriter(out, side, settings.window, padding, seed) for side in SIDES]
            for writer in writers:
                stack.callback(writer.close)
            for number, example, documents in _render(spill, copies, templater, rejections, out / COPIES):
                side = int(held[number])
                if side == 0 and not writers[side].examples:
                    _show_first(templater.show(documents[0]), out / FIRST)
                writers[side].add(example, documents)
        _check_sides(settings, rejections, writers)
        return _figures(settings, gathered.read, copies, rejections, templater, writers)


# --- What is counted ----------------------------------------------------------------------------------------------


class Rejections:
    """Writes what is refused to rejected.jsonl, and counts it by reason."""

    def __init__(self, path: Path) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}  # reason -> where it was met first, and the detail
        self._file = path.open("w", encoding="utf-8")

    def close(self) -> None:
        self._file.close()

    def add(self, origin: Origin, bad: BadRow, shown: str) -> None:
        """Count and write a refused row; `shown` is the beginning of what it holds."""
        self.counts[bad.kind] += 1
        self.first.setdefault(bad.kind, f"{origin.file}:{origin.line}: {printable(bad.detail)}")
        about = {"file": origin.file, "line": origin.line, "reason": bad.kind, "detail": printable(bad.detail)}
        _write_line(self._file, {**about, "preview": shown})


@dataclass
class Gathered:
    """What the first pass leaves behind, besides the spilled examples.

    Attributes:
        finder: knows which examples may be copies.
        read: rows read, good and bad.
        buckets: of each example's group or wording, see split.py.
        forced: for each example 0, or 1 + the index in SIDES its source puts it on.
    """

    finder: CopyFinder
    read: int = 0
    buckets: array[int] = field(default_factory=lambda: array("H"))
    forced: array[int] = field(default_factory=lambda: array("B"))


@dataclass(frozen=True)
class Copies:
    """For each example the number of the one it copies, its own if none, and KEPT, EXACT or NEAR."""

    leader: npt.NDArray[np.int64]
    kind: npt.NDArray[np.uint8]


class SideWriter:
    """Writes one side: its examples as text, and packed."""

    def __init__(self, out: Path, side: Side, window: int, padding: int, seed: int) -> None:
        self.side = side
        self.examples = 0
        self.groups: set[str] = set()
        self._lines = (out / f"{side}.jsonl").open("w", encoding="utf-8")
        self._packer = Packer(out / side, window, padding, seed)

    def close(self) -> None:
        self._lines.close()
        self._packer.close()

    @property
    def packed(self) -> PackFigures:
        """What has been packed; whole once the writer is closed."""
        return self._packer.figures

    def add(self, example: Example, documents: list[Document]) -> None:
        self.examples += 1
        if example.origin.group is not None:
            self.groups.add(example.origin.group)
        _write_line(self._lines, example.plain())
        for document in documents:
            self._packer.add(document)


# --- First pass ---------------------------------------------------------------------------------------------------


def _gather(settings: DataSettings, spill: Spill, rejections: Rejections, work: Path) -> Gathered:
    """Read every row; spill what can be learned from, reject the rest."""
    gathered = Gathered(CopyFinder(work, settings.deduplicate == "near", settings.similarity))
    # Held-out sources come first: of copies the first is kept, and a copy of a test must not be trained on.
    for source in sorted(settings.sources, key=lambda source: source.split != "heldout"):
        forced = 0 if source.split is None else 1 + SIDES.index(source.split)
        with progress(f"data: reading {source.path}", None, "rows") as tick:
            before = gathered.read
            for chunk in _chunks(_examples(source, settings, gathered, rejections)):
                for example in chunk:
                    spill.add(example)
                    gathered.buckets.append(split.bucket(example.origin.group or example.wording()))
                    gathered.forced.append(forced)
                gathered.finder.add([example.wording() for example in chunk])
                tick.advance(gathered.read - before - tick.done)
            tick.advance(gathered.read - before - tick.done)
    if not gathered.read:
        raise DanluError("there is no data: no row was found", where=", ".join(one.path for one in settings.sources))
    if not len(spill):
        raise _nothing_left(rejections, settings)
    return gathered


def _examples(source: Source, settings: DataSettings, gathered: Gathered, rejections: Rejections) -> Iterator[Example]:
    """What can be learned from, clean; the rest is rejected."""
    for row, layout in _rows(source):
        gathered.read += 1
        try:
            example = clean(layout.example(row), settings.system)
            check(example, settings)
        except BadRow as bad:
            rejections.add(row.origin, bad, preview(bad.raw or ("" if row.value is bad else row.value)))
        else:
            yield example


def _chunks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Examples some at a time, so many and so long that they fit in memory with ease."""
    chunk: list[Example] = []
    characters = 0
    for example in examples:
        chunk.append(example)
        characters += len(example.wording())
        if len(chunk) == TOGETHER or characters >= CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _rows(source: Source) -> Iterator[tuple[Row, Layout]]:
    """The rows of a source, each with the layout of its file; layouts are said, each once."""
    said: Counter[str] = Counter()
    for name, rows in read(source):
        head = _head(rows)
        if not head:
            warn(f"{name} holds no rows")
            continue
        layout = detect(head, source, name)
        if not said[str(layout)]:
            say(f"data: {name}: {layout}")
        said[str(layout)] += 1
        for row in itertools.chain(head, rows):
            yield row, layout
    if said.total() > len(said):
        say(f"data: {source.path}: {said.total()} files, laid out in {len(said)} way{'s' if len(said) > 1 else ''}")


def _head(rows: Iterator[Row]) -> list[Row]:
    """The first rows, until there are enough readable ones to tell the layout from."""
    head: list[Row] = []
    readable = 0
    for row in itertools.islice(rows, PEEKED):
        head.append(row)
        readable += not isinstance(row.value, BadRow)
        if readable == LOOKED_AT:
            break
    return head


def _held_out(settings: DataSettings, gathered: Gathered, kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which examples are held out, bool [examples]."""
    buckets = np.frombuffer(gathered.buckets, dtype=np.uint16)
    forced = np.frombuffer(gathered.forced, dtype=np.uint8)
    counts = np.bincount(buckets[kept & (forced == 0)], minlength=split.BUCKETS)
    chosen = split.choose(counts, settings.heldout)
    return np.where(forced == 0, chosen[buckets], forced == 1 + SIDES.index("heldout"))


def _nothing_left(rejections: Rejections, settings: DataSettings) -> DanluError:
    """The error where no row could be learned from: the most common reasons, each with its first place."""
    count = rejections.counts.total()
    common = rejections.counts.most_common(REASONS_SHOWN)
    shown = "".join(f"\n    {number:,} x {kind}, first {rejections.first[kind]}" for kind, number in common)
    return DanluError(
        f"no row is left to learn from: all {count:,} were rejected{shown}",
        where=", ".join(source.path for source in settings.sources),
        fix="mend the rows, or name format and columns of the source",
    )


# --- Second pass --------------------------------------------------------------------------------------------------


def _render(
    spill: Spill, copies: Copies, templater: Templater, rejections: Rejections, copied: Path
) -> Iterator[tuple[int, Example, list[Document]]]:
    """(number, example, its documents) of what is kept; copies are written down, what does not fit is rejected."""
    with copied.open("w", encoding="utf-8") as file, progress("data: packing", len(spill), "examples") as tick:
        begin = 0
        for chunk in _chunks(spill):
            kept = []
            for number, example in enumerate(chunk, begin):
                if copies.kind[number] == KEPT:
                    kept.append((number, example))
                    continue
                first = spill[int(copies.leader[number])].origin
                kind = "exact" if copies.kind[number] == EXACT else "near"
                _write_line(file, {**_place(example.origin), "kind": kind, "of": _place(first)})
            for (number, example), made in zip(kept, templater.documents([one for _, one in kept]), strict=True):
                if isinstance(made, BadRow):
                    rejections.add(example.origin, made, preview(example.wording()))
                else:
                    yield number, example, made
            begin += len(chunk)
            tick.advance(len(chunk))


def _check_sides(settings: DataSettings, rejections: Rejections, writers: list[SideWriter]) -> None:
    """Refuse to go on with nothing to train on, or nothing to measure on where that was asked for."""
    train, heldout = writers
    where = ", ".join(source.path for source in settings.sources)
    if not train.examples and not heldout.examples:
        raise _nothing_left(rejections, settings)
    if not train.examples:
        raise DanluError(
            "every example is held out, none is left to train on", where=where, fix="add a source to train on"
        )
    if settings.heldout and not heldout.examples:
        raise DanluError(
            "nothing could be held out: the examples left are one, or all of one group",
            where=where,
            fix="add data, or set data.heldout to 0 and measure on data of your own",
        )


def _place(origin: Origin) -> dict[str, Any]:
    return {"file": origin.file, "line": origin.line}


def _write_line(file: IO[str], value: dict[str, Any]) -> None:
    file.write(json.dumps(value, ensure_ascii=False) + "\n")


def _show_first(text: str, path: Path) -> None:
    """Keep the first example in a file, and say it."""
    path.write_text(text + "\n", encoding="utf-8")
    cut = f"{text[:SHOWN]}\n... ({len(text) - SHOWN:,} more characters in {FIRST})" if len(text) > SHOWN else text
    say("data: the first example as the model sees it; what it learns stands between ⟦ and ⟧:\n" + cut)


def _clear(out: Path) -> None:
    """Remove whatever this stage writes."""
    for name in (WORK, *SIDES):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in (REJECTED, COPIES, FIRST, *(f"{side}.jsonl" for side in SIDES)):
        (out / name).unlink(missing_ok=True)


# --- Figures ------------------------------------------------------------------------------------------------------


def _figures(
    settings: DataSettings,
    read_rows: int,
    copies: Copies,
    rejections: Rejections,
    templater: Templater,
    writers: list[SideWriter],
) -> Figures:
    kept = sum(writer.examples for writer in writers)
    exact, near = int((copies.kind == EXACT).sum()), int((copies.kind == NEAR).sum())
    rejected = rejections.counts.total()
    parts = f"{kept:,} kept, {exact:,} exact and {near:,} near duplicates left out, {rejected:,} rejected"
    say(f"data: {read_rows:,} rows read: {parts}")
    for kind, count in rejections.counts.most_common():
        say(f"data:   {count:,} rejected: {kind}, first {rejections.first[kind]}")
    for note, count in templater.notes.items():
        if count:
            say(f"data:   {count:,} {note}")
    return {
        "rows_read": figure(read_rows, "rows"),
        "examples_kept": figure(kept, "examples"),
        "exact_duplicates": figure(exact, "rows"),
        "near_duplicates": figure(near, "rows", by=f"wording shared by {settings.similarity:.0%} or more"),
        "rejected": figure(rejected, "rows"),
        "rejected_by_reason": {kind: figure(count, "rows") for kind, count in rejections.counts.most_common()},
        "notes": {note: figure(count, "times") for note, count in templater.notes.items() if count},
        **{writer.side: _side_figures(writer, settings.window) for writer in writers},
    }


def _side_figures(writer: SideWriter, window: int) -> Figures:
    packed = writer.packed
    say(
        f"data: {writer.side}: {writer.examples:,} examples, {packed.tokens:,} tokens ({packed.trained:,} learned) "
        f"in {packed.rows:,} rows of {window:,} ({packed.efficiency(window):.1%} filled)"
    )
    return {
        "examples": figure(writer.examples, "examples"),
        "documents": figure(packed.documents, "documents"),
        "groups": figure(len(writer.groups), "groups"),
        "rows": figure(packed.rows, "rows"),
        "tokens": figure(packed.tokens, "token"),
        "trained_tokens": figure(packed.trained, "token"),
        "packing_efficiency": figure(round(packed.efficiency(window), 6), "share"),
    }
