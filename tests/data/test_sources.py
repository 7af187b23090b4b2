"""Reading: every kind of file, gzipped or not; a broken row is yielded with file, line and reason."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from danlu.data import sources
from danlu.data.example import BadRow, Row
from danlu.data.settings import DataSettings, Source
from danlu.data.sources import PASSAGE, find_files, fingerprint, read
from danlu.errors import DanluError

Write = Callable[[str, Any], Path]
PAIRS = [{"question": "几加几？", "answer": "二。"}, {"question": "1+1?", "answer": "2"}]


def rows_of(path: Path, **settings: Any) -> list[Row]:
    return [row for _, rows in read(Source(path=str(path), **settings)) for row in rows]


def values(rows: list[Row]) -> list[tuple[int, Any]]:
    return [(row.origin.line, row.value) for row in rows]


def reasons(rows: list[Row]) -> list[tuple[int, str, str]]:
    return [(row.origin.line, row.value.kind, row.value.detail) for row in rows if isinstance(row.value, BadRow)]


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.jsonl", "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in PAIRS), [1, 2]),
        ("bom.jsonl", "\ufeff" + "\r\n\n".join(json.dumps(pair) for pair in PAIRS), [1, 3]),
        ("a.ndjson", "\n".join(json.dumps(pair) for pair in PAIRS), [1, 2]),
        ("a.json", json.dumps(PAIRS, indent=1), [2, 6]),
        ("wrapped.json", json.dumps({"version": 1, "data": PAIRS}), [1, 2]),
        ("lines.json", "\n".join(json.dumps(pair) for pair in PAIRS), [1, 2]),
        ("a.csv", "question,answer\n几加几？,二。\n1+1?,2\n", [2, 3]),
        ("bom.csv", '\ufeffquestion,answer\r\n"几加几？",二。\r\n1+1?,2', [2, 3]),
        ("a.tsv", "question\tanswer\n几加几？\t二。\n1+1?\t2\n", [2, 3]),
    ],
)
def test_kinds_of_files(write: Write, name: str, content: str, lines: list[int], ending: str) -> None:
    rows = rows_of(write(name + ending, content))
    assert values(rows) == list(zip(lines, PAIRS, strict=True))
    assert rows[0].origin.file.endswith(name + ending)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_parquet(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS * 300), path, row_group_size=70)
    if ending:
        path = path.with_name("a.parquet.gz")
        path.write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert values(rows_of(path)) == list(enumerate(PAIRS * 300, 1))


def test_parquet_text_that_is_no_utf8_costs_one_row(tmp_path: Path) -> None:
    text = pyarrow.array([b"good", b"\xff", b"fine"], type=pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    rows = rows_of(tmp_path / "a.parquet")
    assert [row.value for row in rows[::2]] == [{"text": "good"}, {"text": "fine"}]
    assert reasons(rows) == [(2, "bad UTF-8", "byte 0xff in a text column")]


def test_broken_json_lines(write: Write) -> None:
    good = json.dumps(PAIRS[1]).encode()
    path = write("a.jsonl", b"\n".join([good, b'{"question": "\xff"}', b'{"question": ', good, b"[" * 100_000]))
    rows = rows_of(path)
    assert [row.value for row in rows if isinstance(row.value, dict)] == [PAIRS[1]] * 2
    found = reasons(rows)
    assert [(line, kind) for line, kind, _ in found] == [(2, "bad UTF-8"), (3, "invalid JSON"), (5, "invalid JSON")]
    assert found[0][2] == "byte 0xff at column 15"


def test_a_line_too_long_to_hold_is_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LONGEST_ROW", 64)
    path = write("a.jsonl", json.dumps(PAIRS[1]) + "\n" + "x" * 1000 + "\n" + json.dumps(PAIRS[1]))
    rows = rows_of(path)
    assert [row.origin.line for row in rows] == [1, 2, 3]
    assert [kind for _, kind, _ in reasons(rows)] == ["too long"]


def test_broken_table_rows(write: Write) -> None:
    path = write("a.csv", 'question,answer\none,1\ntwo\n"a\nb",2\n"x"y,3\nlast,4\n')
    rows = rows_of(path)
    assert [row.value["question"] for row in rows if isinstance(row.value, dict)] == ["one", "a\nb", "last"]
    assert reasons(rows) == [
        (3, "invalid table row", "it has 1 fields, the header names 2"),
        (6, "invalid table row", "',' expected after '\"'"),
    ]
    assert rows[-1].origin.line == 7


def test_a_table_without_header(write: Write) -> None:
    path = write("a.tsv", 'Hi.\t嗨。\n"Hello\t你好\n')
    rows = rows_of(path, columns={"prompt": 1, "completion": 2})
    assert values(rows) == [(1, {1: "Hi.", 2: "嗨。"}), (2, {1: '"Hello', 2: "你好"})]


def test_a_long_json_list_is_read_in_chunks(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK", 16)
    content = [{"text": "长" * size, "n": [size]} for size in range(60)]
    assert [row.value for row in rows_of(write("a.json", json.dumps(content, indent=2)))] == content


@pytest.mark.parametrize(
    ("content", "line"), [('[{"a": 1},\n {"a": 2', 2), ('{"a": 1,\n\n', 3), ("[1, 2", 1), ('[{"a": 1}\n}', 2)]
)
def test_a_broken_json_file_is_named_with_its_line(write: Write, content: str, line: int) -> None:
    with pytest.raises(DanluError, match=rf"a\.json:{line}: is no valid JSON"):
        rows_of(write("a.json", content))


def test_text_is_read_in_passages_at_blank_lines(write: Write) -> None:
    paragraph = "一段话。\n" * 100 + "\n"
    path = write("a.txt", paragraph * 60)
    rows = rows_of(path)
    assert "".join(row.value["text"] for row in rows) == paragraph * 60
    assert all(row.value["text"].endswith("\n\n") for row in rows)
    assert all(PASSAGE <= len(row.value["text"]) < PASSAGE + len(paragraph) for row in rows[:-1])
    starts = [row.origin.line for row in rows]
    assert starts[0] == 1 and all((start - 1) % 101 == 0 for start in starts)


def test_text_of_one_line_is_cut(write: Write) -> None:
    rows = rows_of(write("a.md", "字" * (5 * PASSAGE)))
    assert [len(row.value["text"]) for row in rows] == [2 * PASSAGE, 2 * PASSAGE, PASSAGE]


def test_a_directory_is_read_in_order(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write("d/b.jsonl", PAIRS)
    write("d/sub/a.jsonl.gz", PAIRS)
    write("d/notes.pdf", b"%PDF")
    root = write("d/.hidden/c.jsonl", PAIRS).parents[1]
    found = list(read(Source(path=str(root))))
    assert [Path(name).name for name, _ in found] == ["b.jsonl", "a.jsonl.gz"]
    assert "1 files are of no kind that is read here (1 .pdf); 2 are read" in capsys.readouterr().err
    assert [file.path.name for file in find_files(Source(path=str(root / "**" / "*.jsonl*")))] == [
        "b.jsonl",
        "a.jsonl.gz",
    ]


def test_a_limit_counts_rows_over_files_and_broken_ones(write: Write) -> None:
    write("d/a.jsonl", '{"a": 1}\nbroken\n{"a": 3}\n')
    root = write("d/b.jsonl", '{"a": 4}\n{"a": 5}\n').parent
    assert [row.origin.line for row in rows_of(root, limit=4)] == [1, 2, 3, 1]


@pytest.mark.parametrize(
    ("make", "path", "message"),
    [
        ("rows.jsonl", "rowz.jsonl", r"there is no such file\n  did you mean .*rows\.jsonl\?"),
        ("rows.jsonl", "nowhere/rows.jsonl", "there is no directory"),
        ("rows.jsonlx", "rows.jsonlx", r"files ending in \.jsonlx are not read here\n  did you mean \.jsonl\?"),
        ("rows", "rows", "files without an ending are not read here"),
        ("d/a.pdf", "d", r"holds no file with data\n  it holds only 1 \.pdf"),
        ("d/a.pdf", "d/*.jsonl", "holds no file with data"),
        ("bad.jsonl.gz2", "bad.jsonl.gz2", "are not read here"),
    ],
)
def test_places_without_data(write: Write, tmp_path: Path, make: str, path: str, message: str) -> None:
    write(make, b"x")
    with pytest.raises(DanluError, match=message):
        list(read(Source(path=str(tmp_path / path))))


def test_damaged_files_are_named(write: Write, tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps(PAIRS[0]).encode() * 100)
    for name, content in (("cut.jsonl.gz", whole[:-20]), ("no.jsonl.gz", b"plain"), ("no.parquet", b"PAR1 no")):
        with pytest.raises(DanluError, match=rf"{name}: (the gzip stream is damaged|is no readable Parquet)"):
            (tmp_path / name).write_bytes(content)
            rows_of(tmp_path / name)
    with pytest.raises(DanluError, match="the header is not UTF-8\n  convert it"):
        rows_of(write("gbk.csv", "问题,答案\n几,二\n".encode("gb18030")))
    with pytest.raises(DanluError, match="the header names 'a' twice"):
        rows_of(write("twice.csv", "a,b,a\n1,2,3\n"))


def test_the_fingerprint_is_of_content(write: Write) -> None:
    root = write("d/a.jsonl", PAIRS).parent
    settings = DataSettings(sources=(Source(path=str(root)), Source(path="python-docs")))
    one = fingerprint(settings)
    assert list(one) == [str(root / "a.jsonl"), "python-docs"] and {len(digest) for digest in one.values()} == {64}
    assert fingerprint(settings, lambda path: path.name)[str(root / "a.jsonl")] == "a.jsonl"
    write("d/a.jsonl", PAIRS[:1])
    other = fingerprint(settings)
    assert other[str(root / "a.jsonl")] != one[str(root / "a.jsonl")]
    assert other["python-docs"] == one["python-docs"]


@pytest.mark.parametrize(
    ("name", "settings", "count"),
    [
        ("gsm8k_test.jsonl.gz", {}, 1319),
        ("waimai_11987.csv.gz", {}, 11987),
        ("csl_ts_dev.tsv.gz", {"columns": {"prompt": 2, "completion": 3}}, 1000),
        ("tatoeba_en_zh_20133.tsv.gz", {"columns": {"prompt": 1, "completion": 2}}, 20133),
        ("scitldr_a_dev.jsonl.gz", {}, 619),
    ],
)
def test_real_data(real_data: Callable[[str], Path], name: str, settings: dict[str, Any], count: int) -> None:
    rows = rows_of(real_data(name), **settings)
    assert len(rows) == count and not reasons(rows)
