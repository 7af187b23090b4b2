"""Documents find their groups again through packing, and are drawn together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from danlu.data.build import build_data
from danlu.data.settings import DataSettings
from danlu.data.stream import Rows
from danlu.evaluate.bootstrap import interval
from danlu.evaluate.groups import groups_of, pooled
from danlu.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model) -> Tokenizer:
    return Tokenizer.load(tiny_model)


def build(home: Path, tokenizer: Tokenizer, rows: list[dict], **options: object) -> Path:
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = {"path": str(home / "rows.jsonl"), "split": None, **options}
    trained = home / "train.jsonl"
    trained.write_text('{"prompt": "not", "completion": "held out"}\n', encoding="utf-8")
    sources = [{**source, "split": "heldout"}, {"path": str(trained), "split": "train"}]
    out = home / "data"
    out.mkdir()
    build_data(DataSettings(sources=sources, window=64, deduplicate="none"), tokenizer, out, seed=0)
    return out


def places(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    found = [(row, number) for row in range(len(rows)) for number in np.unique(rows.segments[row]) if number]
    row, segment = np.array(found, dtype=np.int64).T
    return row, segment


def test_each_document_gets_the_group_of_its_example(tmp_path, tokenizer):
    chats = [{"prompt": f"What is {n}?", "completion": f"It is {n * n}.", "module": f"group{n % 4}"} for n in range(30)]
    data = build(
        tmp_path, tokenizer, chats, columns={"prompt": "prompt", "completion": "completion", "group": "module"}
    )
    rows = Rows.open(data / "heldout")
    row, segment = places(rows)
    groups = groups_of(data / "heldout.jsonl", tokenizer, rows, row, segment)
    assert len(groups) == 30
    for place, group in enumerate(groups):
        words = tokenizer.decode(rows.tokens[row[place]][rows.segments[row[place]] == segment[place]].tolist())
        asked = int(words.split("What is ")[1].split("?")[0])
        assert group == f"group{asked % 4}"


def test_windows_of_one_text_stay_together(tmp_path, tokenizer):
    texts = [{"text": " ".join(f"{name}{n}" for n in range(60))} for name in ("alpha", "beta", "gamma")]
    data = build(tmp_path, tokenizer, texts)
    rows = Rows.open(data / "heldout")
    row, segment = places(rows)
    groups = groups_of(data / "heldout.jsonl", tokenizer, rows, row, segment)
    assert len(groups) > 3 and set(groups) == {"line 1", "line 2", "line 3"}


def test_a_document_of_unknown_origin_stands_alone_and_is_said(tmp_path, tokenizer, capfd):
    data = build(tmp_path, tokenizer, [{"prompt": f"a {n}", "completion": f"b {n}"} for n in range(3)])
    kept = (data / "heldout.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:2]
    (data / "heldout.jsonl").write_text("".join(kept), encoding="utf-8")
    rows = Rows.open(data / "heldout")
    groups = groups_of(data / "heldout.jsonl", tokenizer, rows, *places(rows))
    assert len(set(groups)) == 3
    assert "1 held-out documents are not in heldout.jsonl" in capfd.readouterr().err


def test_pooling_sums_over_groups():
    sums, counts = pooled(["a", "b", "a"], np.array([1.0, 2.0, 4.0]), np.array([1, 1, 3]))
    assert sums.tolist() == [5.0, 2.0] and counts.tolist() == [4.0, 1.0]


def test_documents_alike_within_groups_need_the_groups_drawn():
    """Twelve groups of thirty documents with a mean of their own: drawing documents claims far too much."""
    rng = np.random.default_rng(0)
    trials, hits, false_hits = 200, 0, 0
    for trial in range(trials):
        means = rng.normal(2.0, 0.3, 12).repeat(30)
        losses, groups = means + rng.normal(0, 0.3, 360), [f"g{n // 30}" for n in range(360)]
        sums, counts = pooled(groups, losses, np.ones(360))
        found, naive = interval(sums, counts, trial, 400), interval(losses, None, trial, 400)
        hits += found.low <= 2.0 <= found.high
        false_hits += naive.low <= 2.0 <= naive.high
    assert hits / trials > 0.87, "twelve groups are few, and yet"
    assert false_hits / trials < 0.5
