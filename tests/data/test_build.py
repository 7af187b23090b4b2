"""The whole stage: everything read is accounted for, nothing half-written, the same files from the same rows."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from danlu.data.build import build_data
from danlu.data.settings import DataSettings
from danlu.data.stream import Rows, Stream
from danlu.errors import DanluError
from danlu.tokenizer import Tokenizer

Write = Callable[[str, Any], Path]
Build = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture
def build(smollm: Tokenizer, tmp_path: Path) -> Build:
    """Runs the stage into a new directory: `build(sources, seed=0, heldout=0.2, ...)`."""
    count = iter(range(100))

    def make(sources: Any, seed: int = 0, **settings: Any) -> tuple[Path, dict[str, Any]]:
        out = tmp_path / f"out{next(count)}"
        out.mkdir()
        values = {"sources": sources, "heldout": 0.2, **settings}
        return out, build_data(DataSettings.model_validate(values), smollm, out, seed)

    return make


def pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    chance = random.Random(seed)
    words = ["gold", "lead", "mercury", "sulphur", "salt", "antimony", "iron", "copper", *"丹炉火汞铅砂"]
    return [
        {"question": " ".join(chance.choices(words, k=12)), "answer": " ".join(chance.choices(words, k=12))}
        for _ in range(count)
    ]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def value(figures: dict[str, Any], *names: str) -> Any:
    for name in names:
        figures = figures[name]
    return figures["value"]


def test_every_row_is_accounted_for(build: Build, write: Write) -> None:
    good = pairs(40)
    near = {"question": good[0]["question"], "answer": good[0]["answer"] + " end"}
    long = {"question": "q", "answer": "word " * 200}
    raw = [json.dumps(row).encode() for row in [*good, good[3], near, long]]
    broken = [
        b'{"question": "\xff", "answer": "x"}',
        b'{"question"',
        b'{"question": "x"}',
        b'{"question": 1, "answer": "x"}',
    ]
    broken += [b'{"question": "x", "answer": " "}', b'{"question": "x", "answer": "a<|im_end|>b"}', b"[1]"]
    path = write("rows.jsonl", b"\n".join(raw + broken))
    out, figures = build(str(path), window=128)

    assert value(figures, "rows_read") == len(raw) + len(broken)
    kept, exact, near_found, rejected = (
        value(figures, name) for name in ("examples_kept", "exact_duplicates", "near_duplicates", "rejected")
    )
    assert (kept, exact, near_found, rejected) == (40, 1, 1, 1 + len(broken))
    assert kept + exact + near_found + rejected == value(figures, "rows_read")

    found = lines(out / "rejected.jsonl")
    assert {one["file"] for one in found} == {str(path)} and all(one["preview"] for one in found)
    by_line = {one["line"]: (one["reason"], one["detail"]) for one in found}
    assert by_line == {
        43: ("longer than the window", "it has 232 tokens, the window is 128"),
        44: ("bad UTF-8", "byte 0xff at column 15"),
        45: ("invalid JSON", "Expecting ':' delimiter at column 12"),
        46: ("missing field", "there is no 'answer'"),
        47: ("wrong type", "'question' is a number, not text"),
        48: ("empty", "the assistant's message is empty"),
        49: ("special token", "the assistant's message holds <|im_end|>, which marks a turn"),
        50: ("wrong type", "the row is a list, not an object with named fields"),
    }
    counted = {kind: one["value"] for kind, one in figures["rejected_by_reason"].items()}
    assert counted == Counter(one["reason"] for one in found)
    assert lines(out / "duplicates.jsonl") == [
        {"file": str(path), "line": 41, "kind": "exact", "of": {"file": str(path), "line": 4}},
        {"file": str(path), "line": 42, "kind": "near", "of": {"file": str(path), "line": 1}},
    ]


def test_the_artifact_holds_what_its_figures_say(build: Build, write: Write, smollm: Tokenizer) -> None:
    out, figures = build(str(write("rows.jsonl", pairs(60))), window=96)
    arrays = {f"{side}/{name}.npy" for side in ("train", "heldout") for name in ("tokens", "segments", "trained")}
    texts = {"train.jsonl", "heldout.jsonl", "rejected.jsonl", "duplicates.jsonl", "first.txt"}
    assert set(content(out)) == arrays | texts
    for side in ("train", "heldout"):
        rows, examples = Rows.open(out / side), lines(out / f"{side}.jsonl")
        assert value(figures, side, "examples") == len(examples)
        assert value(figures, side, "rows") == len(rows) and rows.window == 96
        assert value(figures, side, "tokens") == int((rows.segments > 0).sum())
        assert value(figures, side, "trained_tokens") == int(rows.trained.sum())
        assert value(figures, side, "documents") == int(rows.segments.max(axis=1).sum()) == len(examples)
        filled = (rows.segments > 0).mean()
        assert value(figures, side, "packing_efficiency") == pytest.approx(filled, abs=1e-6)
        answers = sum(len(smollm.encode(one["messages"][-1]["content"])) + 1 for one in examples)
        assert int(rows.trained.sum()) == answers
        assert all(set(one) == {"messages", "origin"} and one["origin"]["line"] for one in examples)
    assert value(figures, "heldout", "examples") == 12  # a fifth of 60


def test_the_first_example_is_shown_with_what_is_learned(
    build: Build, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"number {n}", "completion": f"answer {n}"} for n in range(9)]
    out, _ = build(str(write("rows.jsonl", rows)))
    first = lines(out / "train.jsonl")[0]["messages"]
    shown = (out / "first.txt").read_text(encoding="utf-8")
    assert shown.endswith(
        f"<|im_start|>user\n{first[0]['content']}<|im_end|>\n<|im_start|>assistant\n⟦{first[1]['content']}<|im_end|>⟧\n"
    )
    said = capsys.readouterr().err
    assert shown.strip() in said
    assert "rows.jsonl: prompt-completion (prompt, completion)" in said
    assert "9 rows read: 9 kept, 0 exact and 0 near duplicates left out, 0 rejected" in said


def test_the_same_rows_give_the_same_files(build: Build, write: Write) -> None:
    path = str(write("rows.jsonl", pairs(80)))
    one, other, reseeded = (build(path, seed=seed)[0] for seed in (5, 5, 6))
    assert content(one) == content(other)
    differing = {name for name, data in content(one).items() if content(reseeded)[name] != data}
    assert differing and all(name.startswith(("train/", "heldout/")) for name in differing)  # only the packing


def test_what_is_held_out_does_not_depend_on_order(build: Build, write: Write) -> None:
    rows = pairs(80)
    one, _ = build(str(write("a.jsonl", rows)))
    other, _ = build(str(write("b.jsonl", rows[::-1])))
    for side in ("train", "heldout"):
        first, second = ({str(x["messages"]) for x in lines(out / f"{side}.jsonl")} for out in (one, other))
        assert first == second and first


@pytest.mark.parametrize("deduplicate", ["none", "exact", "near"])
def test_no_content_is_on_both_sides(build: Build, write: Write, deduplicate: str) -> None:
    rows = [{**row, "book": str(number % 7)} for number, row in enumerate(pairs(30) * 3)]
    columns = {"prompt": "question", "completion": "answer", "group": "book"}
    path = write("rows.jsonl", rows)
    out, figures = build({"path": str(path), "columns": columns}, deduplicate=deduplicate)
    train, heldout = ({str(one["messages"]) for one in lines(out / f"{side}.jsonl")} for side in ("train", "heldout"))
    assert train and heldout and not train & heldout
    assert value(figures, "examples_kept") == (90 if deduplicate == "none" else 30)
    if deduplicate != "none":
        groups = [{one["origin"]["group"] for one in lines(out / f"{side}.jsonl")} for side in ("train", "heldout")]
        assert not groups[0] & groups[1]


def test_a_source_can_be_held_out_whole_and_wins(build: Build, write: Write) -> None:
    train, test = pairs(30), pairs(10, seed=1)
    first = write("train.jsonl", train + test[:4])
    second = write("test.jsonl", test)
    out, figures = build([{"path": str(first), "split": "train"}, {"path": str(second), "split": "heldout"}], heldout=0)
    assert value(figures, "train", "examples") == 30 and value(figures, "heldout", "examples") == 10
    assert value(figures, "exact_duplicates") == 4
    assert {one["origin"]["file"] for one in lines(out / "duplicates.jsonl") if "origin" in one} == set()
    assert {one["file"] for one in lines(out / "duplicates.jsonl")} == {str(first)}


def test_plain_text_is_cut_into_windows_and_said(
    build: Build, write: Write, smollm: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "".join(f"Paragraph {n} is about the number {n * n}.\n\n" for n in range(2000))
    out, figures = build(str(write("book.txt", text)), window=64)
    assert value(figures, "rejected") == 0
    pieces = figures["notes"]["texts longer than the window, cut into windows"]["value"]
    assert pieces == value(figures, "examples_kept")
    assert f"{pieces:,} texts longer than the window, cut into windows" in capsys.readouterr().err
    learned = sum(value(figures, side, "trained_tokens") for side in ("train", "heldout"))
    passages = [one["text"] for side in ("train", "heldout") for one in lines(out / f"{side}.jsonl")]
    assert learned == sum(
        len(smollm.encode(passage, special=False)) for passage in passages
    )  # its first not, its end too


def test_a_system_message_for_chats_without(build: Build, write: Write) -> None:
    own = [{"role": r, "content": f"own {r}"} for r in ("system", "user", "assistant")]
    path = write("rows.jsonl", [{"messages": own}, {"messages": own[1:]}])
    out, _ = build(str(path), system="Be brief.", heldout=0, deduplicate="none")
    systems = [one["messages"][0]["content"] for one in lines(out / "train.jsonl")]
    assert systems == ["own system", "Be brief."]


def test_mixed_sources(build: Build, write: Write) -> None:
    write("d/a.jsonl", pairs(20))
    write("d/b.csv.gz", "prompt,completion\n" + "".join(f"问题 {n}？,答案 {n * 7}。\n" for n in range(20)))
    root = write("d/c.md", "# 标题\n\n一段话。\n").parent
    _, figures = build(str(root))
    assert value(figures, "rows_read") == value(figures, "examples_kept") == 41


@pytest.mark.parametrize(
    ("name", "raw", "settings", "message"),
    [
        ("a.jsonl", "", {}, "there is no data: no row was found"),
        ("a.csv", "question,answer\n", {}, "there is no data: no row was found"),
        ("a.json", "[]", {}, "there is no data: no row was found"),
        ("a.txt", " \n\n", {}, "there is no data: no row was found"),
        (
            "a.jsonl",
            '{"question": "x"\n{"question": "", "answer": "b"}\n{"question": "", "answer": "c"}\n',
            {},
            r"all 3 were rejected\n    2 x empty, first .*a\.jsonl:2: the user's message is empty"
            r"\n    1 x invalid JSON, first .*a\.jsonl:1: Expecting ',' delimiter at column 17",
        ),
        ("a.jsonl", "broken\n" * 5, {}, r"all 5 were rejected\n    5 x invalid JSON, first .*a\.jsonl:1: "),
        (
            "a.jsonl",
            '{"prompt": "a", "completion": "b"}\n',
            {"window": 8},
            "longer than the window, first .* it has .* tokens",
        ),
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n', {}, "nothing could be held out"),
        ("a.jsonl", '{"label": 1, "review": "b"}\n', {}, "the rows fit no known format"),
    ],
)
def test_nothing_half_written_is_left(
    build: Build, write: Write, tmp_path: Path, name: str, raw: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DanluError, match=message) as caught:
        build(str(write(name, raw)), **settings)
    assert name in str(caught.value)
    assert not any((tmp_path / "out0").iterdir())


def test_every_example_held_out_is_refused(build: Build, write: Write) -> None:
    source = {"path": str(write("a.jsonl", pairs(5))), "split": "heldout"}
    with pytest.raises(DanluError, match="none is left to train on"):
        build(source)


def test_an_interrupted_run_is_done_anew(write: Write, smollm: Tokenizer, tmp_path: Path) -> None:
    settings = DataSettings.model_validate({"sources": str(write("a.jsonl", pairs(20))), "heldout": 0.2})
    whole, again = tmp_path / "whole", tmp_path / "again"
    for out in (whole, again):
        (out / "work").mkdir(parents=True)
    for leftover in ("work/pairs-0", "work/hashes-3", "train.jsonl", "rejected.jsonl"):
        (again / leftover).write_bytes(b"left over" * 100)
    for out in (whole, again):
        build_data(settings, smollm, out, seed=0)
    assert content(whole) == content(again)


def test_batches_come_out_of_it(build: Build, write: Write, smollm: Tokenizer) -> None:
    out, _ = build(str(write("rows.jsonl", pairs(60))), window=128)
    rows = Rows.open(out / "train")
    stream = Stream(rows, 2, seed=0)
    drawn = [stream.batch(step) for step in range(len(rows) // 2)]
    learned = sum(batch.count for batch in drawn)
    assert learned <= int(rows.trained.sum())
    if len(rows) % 2 == 0:
        assert learned == int(rows.trained.sum())
    assert all(bool((batch.tokens < smollm.vocab_size).all()) for batch in drawn)


@pytest.mark.parametrize(
    ("name", "source", "kept"),
    [
        ("gsm8k_test.jsonl.gz", {"limit": 400}, 390),
        ("waimai_11987.csv.gz", {"limit": 400, "columns": {"prompt": "review", "completion": "label"}}, 350),
        ("csl_ts_dev.tsv.gz", {"limit": 400, "columns": {"prompt": 2, "completion": 3}}, 300),
        ("tinyshakespeare.txt.gz", {}, 100),
    ],
)
def test_real_data(
    build: Build, real_data: Callable[[str], Path], name: str, source: dict[str, Any], kept: int
) -> None:
    _, figures = build({"path": str(real_data(name)), **source}, window=512)
    counts = [value(figures, one) for one in ("examples_kept", "exact_duplicates", "near_duplicates", "rejected")]
    assert sum(counts) == value(figures, "rows_read")
    assert counts[0] >= kept
