"""Where rows come from: jsonl, json, csv, tsv, parquet, txt and md files (gzipped too), the hub, and python-docs.

Every reader streams: whatever the size of a file, only a few rows of it are in memory. A row that cannot be read is
yielded with the reason, never skipped.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from danlu.artifact import hash_file
from danlu.console import say
from danlu.data import hub, python_docs
from danlu.data.example import BadRow, Origin, Row
from danlu.data.settings import PYTHON_DOCS, DataSettings, Source
from danlu.errors import DanluError, nearest, one_of

LONGEST_ROW = 64 * 2**20  # bytes or characters; a longer line or field is refused rather than read into memory
PASSAGE = 8_000  # characters; a text file is read in passages of about this length, cut at a blank line
CHUNK = 2**20  # characters read at a time from a .json file
WRAPPERS = ("data", "rows", "examples", "train")  # keys under which a .json object keeps its list of rows


@dataclass(frozen=True)
class File:
    """A file to read: where it lies, and the name people know it by."""

    path: Path
    name: str


def read(source: Source) -> Iterator[tuple[str, Iterator[Row]]]:
    """The rows of a source, file by file: (the file's name, its rows).

    A source's `limit` counts all rows read, across files, the unreadable ones included.
    Raises DanluError where a file is missing, of no known kind, or cannot be read at all.
    """
    left = source.limit

    def within(rows: Iterator[Row]) -> Iterator[Row]:
        nonlocal left
        while left != 0 and (row := next(rows, None)) is not None:
            left = left and left - 1
            yield row

    if source.is_python_docs:
        yield PYTHON_DOCS, within(python_docs.rows())
        return
    for file in find_files(source, tell=True):
        if left == 0:
            return
        yield file.name, within(_rows(file, source))


def fingerprint(settings: DataSettings, digest: Callable[[Path], str] = hash_file) -> dict[str, str]:
    """SHA-256 of every file the sources name, by name: what the identity of a data artifact is made from.

    For python-docs it covers the interpreter's version and the text of its library.

    Args:
        settings: names the sources.
        digest: gives the SHA-256 of a file; say one that remembers files it has seen.

    Raises DanluError where a file is missing.
    """
    found: dict[str, str] = {}
    for source in settings.sources:
        if source.is_python_docs:
            found[PYTHON_DOCS] = python_docs.fingerprint()
        else:
            found |= {file.name: digest(file.path) for file in find_files(source)}
    return found


def find_files(source: Source, tell: bool = False) -> list[File]:
    """The files a source names, in order of their names. Raises DanluError where there are none.

    With `tell`, files of a directory or glob that are of no kind read here are counted and said.
    """
    if source.is_hub:
        return [File(path, name) for path, name in hub.fetch(source.path)]
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _known_files(
            source, path, [file for file in path.rglob("*") if not _hidden(file.relative_to(path))], tell
        )
    if path.is_file():
        _reader(path)
        return [File(path, source.name_of(path))]
    if any(sign in source.path for sign in "*?["):
        found = glob.glob(str(path), recursive=True)  # noqa: PTH207  # pathlib's would find hidden files too
        return _known_files(source, path, list(map(Path, found)), tell)
    raise DanluError("there is no such file", where=path, fix=_nearby(path))


# --- Finding files ------------------------------------------------------------------------------------------------


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _known_files(source: Source, place: Path, found: list[Path], tell: bool) -> list[File]:
    """The ones of a known kind among files found in a directory or by a glob."""
    files = sorted(file for file in found if file.is_file())
    known = [File(file, source.name_of(file)) for file in files if _suffix(file) in READERS]
    others = Counter(_suffix(file) or file.name for file in files if _suffix(file) not in READERS)
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items())[:10])
    if not known:
        beside = f"it holds only {kinds}; " if others else ""
        raise DanluError("holds no file with data", where=place, fix=f"{beside}known are {', '.join(READERS)}, and .gz")
    if others and tell:
        say(f"data: {place}: {others.total()} files are of no kind that is read here ({kinds}); {len(known)} are read")
    return known


def _nearby(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no directory {folder} either"
    meant = nearest(path.name, [entry.name for entry in folder.iterdir()])
    return f"did you mean {folder / meant}?" if meant else f"nothing in {folder} has a name like it"


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _reader(path: Path) -> Callable[[File, Source], Iterator[Row]]:
    suffix = _suffix(path)
    if suffix not in READERS:
        ending = f"files ending in {suffix}" if suffix else "files without an ending"
        fix = f"{one_of(suffix, list(READERS))}, and .gz"
        raise DanluError(f"{ending} are not read here", where=path, fix=fix)
    return READERS[suffix]


# --- Reading files ------------------------------------------------------------------------------------------------


def _rows(file: File, source: Source) -> Iterator[Row]:
    """The rows of one file; damage of the file itself becomes a DanluError naming it."""
    reader = _reader(file.path)
    try:
        yield from reader(file, source)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DanluError(f"the gzip stream is damaged: {error}", where=file.name, fix="fetch the file again") from None
    except PermissionError:
        raise DanluError("may not be read", where=file.name, fix=f"chmod u+r {file.path}") from None


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file:
        yield file  # type: ignore[misc]  # GzipFile is an IO[bytes] in all but name


@contextmanager
def _open_text(path: Path, newline: str | None) -> Iterator[io.TextIOWrapper]:
    """As text. Bytes that are not UTF-8 become lone surrogates, so that only the row they stand in is refused."""
    with (
        _open(path) as file,
        io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline) as text,
    ):
        yield text


def _read_jsonl(file: File, source: Source) -> Iterator[Row]:
    """One JSON object a line; blank lines are no rows."""
    with _open(file.path) as stream:
        for number, line in enumerate(_lines(stream), 1):
            if isinstance(line, BadRow) or line.strip():
                yield Row(Origin(file.name, number), _json_line(line, number))


def _lines(stream: IO[bytes]) -> Iterator[bytes | BadRow]:
    while line := stream.readline(LONGEST_ROW):
        if len(line) < LONGEST_ROW or line.endswith(b"\n"):
            yield line
            continue
        while (more := stream.readline(LONGEST_ROW)) and not more.endswith(b"\n"):
            pass
        yield BadRow("too long", f"the line is longer than {LONGEST_ROW // 2**20} MiB")


def _json_line(line: bytes | BadRow, number: int) -> Any:
    if isinstance(line, BadRow):
        return line
    try:
        return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip())
    except UnicodeDecodeError as error:
        shown = line.decode("utf-8", "backslashreplace")
        return BadRow("bad UTF-8", f"byte 0x{line[error.start]:02x} at column {error.start + 1}", shown.strip())
    except (ValueError, RecursionError) as error:
        return BadRow("invalid JSON", _json_trouble(error), line.decode("utf-8").strip())


def _json_trouble(error: Exception) -> str:
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _read_json(file: File, source: Source) -> Iterator[Row]:
    """A list of objects, an object that holds such a list, or JSON Lines under another ending."""
    with _open_text(file.path, newline=None) as text:
        first = text.readline(CHUNK)
    if first.startswith("{"):
        try:
            value = json.loads(first)
        except ValueError:
            value = None  # an object over several lines
        if isinstance(value, dict) and _wrapped(value) is None:
            yield from _read_jsonl(file, source)
            return
    with _open_text(file.path, newline=None) as text:
        for line, value in _json_values(text, file.name):
            yield Row(Origin(file.name, line), value)


def _json_values(text: io.TextIOWrapper, name: str) -> Iterator[tuple[int, Any]]:
    """(line, value) of each item of a JSON list, or of the list inside a JSON object, a chunk in memory at a time."""
    decoder = json.JSONDecoder()
    buffer = text.read(CHUNK).lstrip()
    if not buffer.startswith("["):
        yield from _json_object(buffer + text.read(), name)
        return
    line, buffer, wanted = 1, buffer[1:], CHUNK
    while True:
        start = len(buffer) - len(buffer.lstrip(" \t\r\n,"))
        line, buffer = line + buffer.count("\n", 0, start), buffer[start:]
        if buffer.startswith("]"):
            return
        try:
            value, end = decoder.raw_decode(buffer)
            trouble = None if end < len(buffer) else "the list does not end"
        except (ValueError, RecursionError) as error:
            trouble = _json_trouble(error)
        if trouble is None:
            yield line, value
            line, buffer, wanted = line + buffer.count("\n", 0, end), buffer[end:], CHUNK
            continue
        more = text.read(wanted) if len(buffer) < LONGEST_ROW else ""
        if not more:
            raise _broken_json(name, line, trouble)
        buffer, wanted = buffer + more, 2 * wanted  # doubling: an item of n characters is scanned O(n) in all


def _json_object(text: str, name: str) -> Iterator[tuple[int, Any]]:
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken_json(name, getattr(error, "lineno", 1), _json_trouble(error)) from None
    rows = _wrapped(value) if isinstance(value, dict) else None
    yield from ((number, row) for number, row in enumerate(rows, 1)) if rows is not None else [(1, value)]


def _wrapped(value: dict[str, Any]) -> list[Any] | None:
    """The rows in `{"data": [{...}, ...]}`."""
    lists = [value[key] for key in WRAPPERS if isinstance(value.get(key), list)]
    return lists[0] if len(lists) == 1 and all(isinstance(item, dict) for item in lists[0]) else None


def _broken_json(name: str, line: int, trouble: str) -> DanluError:
    return DanluError(
        f"is no valid JSON: {trouble}",
        where=f"{name}:{line}",
        fix="mend the file, or write one object a line as .jsonl: then only broken rows are refused",
    )


def _read_table(file: File, source: Source, delimiter: str, quoting: int) -> Iterator[Row]:
    numbered = any(isinstance(column, int) for column in source.columns.values())
    csv.field_size_limit(LONGEST_ROW)
    with _open_text(file.path, newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
        header = None if numbered else _header(reader, file.name)
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield Row(Origin(file.name, line), BadRow("invalid table row", str(error)))
                continue
            if cells is None:
                return
            if cells:
                yield Row(Origin(file.name, line), _table_row(cells, header))


def _header(reader: Any, name: str) -> list[str]:
    try:
        header: list[str] = next(reader, [])
    except csv.Error as error:
        raise DanluError(f"the header cannot be read: {error}", where=f"{name}:1") from None
    if any(not cell.isprintable() and "\udc80" <= max(cell) <= "\udcff" for cell in header if cell):
        raise DanluError("the header is not UTF-8", where=f"{name}:1", fix="convert it: iconv -f GB18030 -t UTF-8")
    twice = [cell for cell, count in Counter(header).items() if count > 1]
    if twice:
        raise DanluError(f"the header names {twice[0]!r} twice", where=f"{name}:1", fix="give each column its own name")
    return header


def _table_row(cells: list[str], header: list[str] | None) -> Any:
    if header is None:
        return dict(enumerate(cells, 1))
    if len(cells) != len(header):
        trouble = f"it has {len(cells)} fields, the header names {len(header)}"
        return BadRow("invalid table row", trouble, " | ".join(cells))
    return dict(zip(header, cells, strict=True))


def _read_csv(file: File, source: Source) -> Iterator[Row]:
    """Comma-separated (RFC 4180) with a header; without one where the columns are named by number."""
    return _read_table(file, source, ",", csv.QUOTE_MINIMAL)


def _read_tsv(file: File, source: Source) -> Iterator[Row]:
    """Tab-separated; a quotation mark is an ordinary character, as in most such files."""
    return _read_table(file, source, "\t", csv.QUOTE_NONE)


def _read_parquet(file: File, source: Source) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    with _open(file.path) as stream, tempfile.TemporaryFile() as unpacked:
        if file.path.name.lower().endswith(".gz"):  # Parquet is read from its end, gzip only from its beginning
            shutil.copyfileobj(stream, unpacked)
            stream = unpacked
        try:
            table = pyarrow.parquet.ParquetFile(stream, pre_buffer=False)
            number = 0
            for batch in table.iter_batches(batch_size=256, use_threads=False):
                for value in _parquet_values(batch):
                    number += 1
                    yield Row(Origin(file.name, number), value)
        except (pyarrow.ArrowException, OSError) as error:
            trouble = str(error).splitlines()[0]
            raise DanluError(
                f"is no readable Parquet: {trouble}", where=file.name, fix="fetch the file again"
            ) from None


def _parquet_values(batch: Any) -> Iterator[Any]:
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass  # some text of the batch is not UTF-8: find out which
    for number in range(batch.num_rows):
        try:
            yield batch.slice(number, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield BadRow("bad UTF-8", f"byte 0x{error.object[error.start]:02x} in a text column")


def _read_text(file: File, source: Source) -> Iterator[Row]:
    """Passages of a text, each as long as paragraphs fill about PASSAGE characters; the line is where it begins."""
    with _open_text(file.path, newline=None) as text:
        passage: list[str] = []
        begin = line = 1
        length = 0
        for piece in iter(lambda: text.readline(PASSAGE), ""):
            passage.append(piece)
            length += len(piece)
            line += piece.endswith("\n")
            if length >= 2 * PASSAGE or (length >= PASSAGE and not piece.strip()):
                yield Row(Origin(file.name, begin), {"text": "".join(passage)})
                passage, begin, length = [], line, 0
        if "".join(passage).strip():
            yield Row(Origin(file.name, begin), {"text": "".join(passage)})


READERS: dict[str, Callable[[File, Source], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".md": _read_text,
}
