"""Examples out of the files that data sets with labels, tags, answers or translations are published in."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from danlu.console import warn
from danlu.errors import DanluError

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A text, or two, and the name of its label; `where` it stands, as file:line."""

    text: str
    label: str
    second: str | None = None
    where: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class TaggedWords:
    """A sentence word by word (in Chinese, character by character), with a tag for each; `where` it begins."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    where: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a passage, the characters [begin, end) of it that answer it, and all answers that are right."""

    question: str
    passage: str
    begin: int
    end: int
    answers: tuple[str, ...] = ()


def read_labelled(file: Path, encoding: str = "utf-8") -> list[LabelledText]:
    """Texts from lines of a label, a space, and the text. Raises DanluError for a line of any other form."""
    found = []
    for number, line in enumerate(read_lines(file, encoding), 1):
        label, _, text = line.partition(" ")
        if not label or not text.strip():
            raise DanluError("is no label, a space, and a text", where=f"{file}:{number}")
        found.append(LabelledText(text, label, where=f"{file}:{number}"))
    return found


def read_tagged(file: Path, encoding: str = "utf-8") -> list[TaggedWords]:
    """Sentences from lines of a word, a tab, and its tag, with an empty line between two (as CoNLL writes them).

    Raises DanluError for a line of any other form.
    """
    found: list[TaggedWords] = []
    open_rows: list[tuple[str, str]] = []
    for number, line in enumerate([*read_lines(file, encoding), ""], 1):
        cells = line.split("\t")
        if len(cells) == 2 and all(cells):
            open_rows.append((cells[0], cells[1]))
        elif line.strip():
            raise DanluError("is no word, a tab, and its tag", where=f"{file}:{number}")
        elif open_rows:
            words, tags = zip(*open_rows, strict=True)
            found.append(TaggedWords(words, tags, f"{file}:{number - len(words)}"))
            open_rows = []
    return found


def read_questions(file: Path, encoding: str = "utf-8") -> list[Question]:
    """Questions from a file laid out as SQuAD's (arXiv:1606.05250), each with its answers; the first is learned.

    Questions without an answer, or whose answer does not stand where the file says, are left out, counted and said.
    Raises DanluError where the file is laid out otherwise.
    """
    found, without, misplaced = [], 0, 0
    try:
        articles = json.loads(read_text(file, encoding))["data"]
        passages = [passage for article in articles for passage in article["paragraphs"]]
        asked_of = [(passage["context"], asked) for passage in passages for asked in passage["qas"]]
        for context, asked in asked_of:
            if not asked["answers"]:
                without += 1
                continue
            text, begin = asked["answers"][0]["text"], int(asked["answers"][0]["answer_start"])
            if context[begin : begin + len(text)] != text or not text:
                misplaced += 1
                continue
            answers = tuple(str(answer["text"]) for answer in asked["answers"])
            found.append(Question(asked["question"], context, begin, begin + len(text), answers))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DanluError(f"is not laid out as SQuAD's files: {error!r}", where=file) from None
    if without or misplaced:
        total = len(found) + without + misplaced
        reasons = f"{without:,} have no answer, {misplaced:,} one that does not stand where the file says"
        warn(f"{file}: {without + misplaced:,} of {total:,} questions are left out: {reasons}")
    return found


def read_parallel(source: Path, target: Path, encoding: str = "utf-8") -> list[Pair]:
    """Pairs from two text files (.gz and .zip too) whose lines belong together.

    Raises DanluError where one has more lines than the other, or a line says nothing.
    """
    sides = read_lines(source, encoding), read_lines(target, encoding)
    if len(sides[0]) != len(sides[1]):
        what = f"has {len(sides[0]):,} lines, but {target} has {len(sides[1]):,}"
        raise DanluError(what, where=source, fix="lines of the same number must belong together")
    for file, lines in zip((source, target), sides, strict=True):
        empty = next((number for number, line in enumerate(lines, 1) if not line.strip()), None)
        if empty is not None:
            raise DanluError("is an empty line", where=f"{file}:{empty}", fix="take it out of both files")
    return list(zip(*sides, strict=True))


def read_pairs(file: Path, encoding: str = "utf-8") -> list[Pair]:
    """Pairs from lines of a text, a tab, and another text. Raises DanluError for a line of any other form."""
    found = []
    for number, line in enumerate(read_lines(file, encoding), 1):
        cells = line.split("\t")
        if len(cells) != 2 or not all(cell.strip() for cell in cells):
            raise DanluError("is no text, a tab, and another text", where=f"{file}:{number}")
        found.append((cells[0], cells[1]))
    return found


def read_lines(file: Path, encoding: str = "utf-8") -> list[str]:
    """The lines of a text file, without their ends. Raises DanluError as `read_text` does."""
    lines = read_text(file, encoding).split("\n")
    return [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


def read_text(file: Path, encoding: str = "utf-8") -> str:
    """The text of a file; of a .gz file what was compressed, of a .zip file its only member.

    Raises DanluError where it cannot be read, is damaged, or is in another encoding.
    """
    try:
        raw = file.read_bytes()
        if file.suffix == ".gz":
            raw = gzip.decompress(raw)
        elif file.suffix == ".zip":
            with zipfile.ZipFile(io.BytesIO(raw)) as archive:
                [name] = archive.namelist()
                raw = archive.read(name)
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise DanluError(f"is not in {encoding}: {error}", where=file, fix="name its encoding") from None
    except LookupError:
        raise DanluError(f"there is no encoding {encoding}", where=file) from None
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, ValueError) as error:
        raise DanluError(f"cannot be read: {error}", where=file) from None


def names_of(examples: Sequence[LabelledText] | Sequence[TaggedWords]) -> tuple[str, ...]:
    """The names of all labels, sorted; their places are the labels' numbers."""
    names: set[str] = set()
    for one in examples:
        names.update(one.tags if isinstance(one, TaggedWords) else (one.label,))
    return tuple(sorted(names))
