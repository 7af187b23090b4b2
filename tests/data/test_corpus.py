"""A corpus on disk: every text comes back, every token is learned once an epoch, and nothing half-written is read."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from danlu.data.build import REJECTED
from danlu.data.corpus import INDEX, PASSAGE, Corpus, Crops, Piece, Tokens, TokenWriter, build_corpus
from danlu.data.corpus_settings import CorpusSettings
from danlu.data.example import Origin
from danlu.data.mixing import MixtureStream, Packed, RowSource
from danlu.data.stream import IGNORED
from danlu.errors import DanluError
from tests.data.test_mixing import columns
from tests.data.test_stream import WINDOW, make_rows

GUIDE = (Path(__file__).parents[2] / "docs" / "pretraining-data.md").read_text(encoding="utf-8")
TEXTS = [f"Number {n}: lead becomes gold. 第{n}炉：铅化为金，naïve 🙂\n" for n in range(200)]
Write = Callable[[str, Any], Path]


def build(out: Path, sources: object, **chosen: object) -> Corpus:
    plain = {"sources": sources, "vocabulary": "bytes", "heldout": 0, **chosen}
    build_corpus(CorpusSettings.model_validate(plain), out)
    return Corpus.open(out)


def texts_of(corpus: Corpus, side: Any = "train") -> list[str]:
    """The texts of a side, each as its tokens say it, without what ends it."""
    tokens = corpus.side(side)
    borders = [*tokens.documents.mapped().tolist(), len(tokens)] if len(tokens) else [0]
    return [corpus.tokenizer.decode(line(tokens)[a:b]) for a, b in pairwise(borders)]


def line(tokens: Tokens) -> list[int]:
    """All tokens of a side."""
    return tokens.at(np.arange(len(tokens))).tolist()


def line_of(documents: list[list[int]], out: Path, shard_tokens: int = 7) -> Tokens:
    """Documents of given tokens, written and opened."""
    writer = TokenWriter(out, "train", 2**20, shard_tokens)
    for ids in documents:
        writer.add(Piece(Origin("file", 1), "text", first=True, last=True), ids, [], [], None)
    return Corpus(out, {"sides": {"train": writer.finish()}}).side("train")


# --- Writing and reading ------------------------------------------------------------------------------------------


def test_shakespeare_is_what_nanogpt_makes_of_it(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    file = real_data("tinyshakespeare.txt.gz")
    vocabulary = {"kind": "characters", "special": []}
    corpus = build(tmp_path / "corpus", file, vocabulary=vocabulary, heldout="10%", heldout_from="end")
    text = subprocess.run(["gzip", "-dc", file], capture_output=True, check=True).stdout.decode()
    letters = {letter: number for number, letter in enumerate(sorted(set(text)))}
    ids, border = np.array([letters[letter] for letter in text]), int(len(text) * 0.9)
    assert len(letters) == corpus.tokenizer.vocab_size == 65
    train, heldout = corpus.side("train"), corpus.side("heldout")
    assert (len(train), len(heldout)) == (1_003_854, 111_540)
    assert line(train) == ids[:border].tolist() and line(heldout) == ids[border:].tolist()
    assert np.array_equal(np.fromfile(tmp_path / "corpus/train-00000.bin", dtype="<u2"), ids[:border])


def test_every_kind_of_file_gives_its_texts_back(write: Write, tmp_path: Path) -> None:
    rows = [{"text": text, "other": 1} for text in TEXTS]
    files = [write("a.jsonl", rows), write("b.jsonl.gz", rows), write("c.txt", "".join(TEXTS)), write("d.md", TEXTS[0])]
    pyarrow.parquet.write_table(pyarrow.table({"内容": TEXTS}), tmp_path / "e.parquet")
    sources = [*map(str, files), {"path": str(tmp_path / "e.parquet"), "columns": {"text": "内容"}}]
    for kind in ({"kind": "characters"}, {"kind": "bytes"}, {"kind": "bpe", "size": 600}):
        corpus = build(tmp_path / str(kind["kind"]), sources, vocabulary=kind, shard_tokens=5000)
        assert texts_of(corpus) == [*TEXTS, *TEXTS, "".join(TEXTS), TEXTS[0], *TEXTS]
        about = corpus.index["sides"]["train"]
        assert len(about["shards"]) == -(-about["tokens"] // 5000) > 1 and about["unknown"] == 0
        assert about["characters"] == sum(map(len, TEXTS)) * 4 + len(TEXTS[0])


def test_each_text_stands_in_its_frame(write: Write, tmp_path: Path) -> None:
    file = write("rows.jsonl", [{"text": "<|endoftext|>"}, {"text": "ab"}])
    corpus = build(tmp_path / "bytes", file, vocabulary={"kind": "bytes", "special": ["bos", "eos"]})
    begin, end = corpus.tokenizer.bos_id, corpus.tokenizer.eos_id
    assert line(corpus.side("train")) == [begin, *b"<|endoftext|>", end, begin, *b"ab", end]
    pieces = build(tmp_path / "pieces", file, vocabulary={"kind": "wordpiece", "size": 50, "minimum_frequency": 1})
    ids = line(pieces.side("train"))
    assert ids[0] == ids[ids.index(3) + 1] == 2 and ids[-1] == 3 and ids.count(2) == ids.count(3) == 2


def test_a_long_text_is_cut_into_passages_and_stays_one(write: Write, tmp_path: Path) -> None:
    lined = "".join(f"line {n} of it\n" for n in range(4000))
    texts = [lined, lined.replace("\n", " "), "丹" * (3 * PASSAGE + 5)]
    corpus = build(tmp_path / "rows", write("rows.jsonl", [{"text": text} for text in texts]))
    assert texts_of(corpus) == texts
    assert texts_of(build(tmp_path / "text", write("one.txt", texts[2] + "\n"))) == [texts[2] + "\n"]


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    shard=st.integers(1, 20),
    places=st.lists(st.integers(0, 10**6), min_size=1, max_size=12),
)
@settings(max_examples=25, deadline=None)
def test_any_place_is_read_across_files(lengths: list[int], shard: int, places: list[int]) -> None:
    whole = np.arange(sum(lengths)) * 1000
    with tempfile.TemporaryDirectory() as out:
        tokens = line_of([part.tolist() for part in np.split(whole, np.cumsum(lengths)[:-1])], Path(out), shard)
        wanted = np.array(places) % len(whole)
        assert np.array_equal(tokens.at(wanted), whole[wanted]) and line(tokens) == whole.tolist()
        assert np.array_equal(tokens.documents.mapped(), np.cumsum([0, *lengths[:-1]]))
        assert max(part.count for part in tokens.shards) <= shard


def test_what_is_no_text_is_counted_and_kept_aside(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = b'{"text": "one"}\n{"text": "\xff"}\nnonsense\n{"text": ""}\n{"other": 1}\n{"text": "two"}\n'
    corpus = build(tmp_path / "corpus", write("rows.jsonl", rows))
    assert texts_of(corpus) == ["one", "two"]
    found = {"bad UTF-8": 1, "invalid JSON": 1, "empty": 1, "missing field": 1}
    assert corpus.index["rejected"] == found
    kept = (tmp_path / "corpus" / REJECTED).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["line"] for line in kept] == [2, 3, 4, 5]
    assert "4 rows hold no text" in capsys.readouterr().err
    block = b"good text here\n" * 600 + b"\n"
    broken = build(tmp_path / "broken", write("broken.txt", block + b"bad \xff\n" * 1500 + b"\n" + block))
    assert [text.strip() for text in texts_of(broken)] == [block.decode().strip()] * 2


def test_unknown_characters_are_named_or_counted(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, other = write("plain.txt", "abc abc\n"), write("other.txt", "abc\nab炉c\n")
    build(tmp_path / "corpus", plain, vocabulary="characters")
    known = {"kind": "from", "base": str(tmp_path / "corpus/tokenizer")}
    with pytest.raises(DanluError, match=r"other\.txt:2: the character '炉' \(U\+7089\) is not in the vocabulary"):
        build(tmp_path / "again", other, vocabulary=known)
    counted = build(tmp_path / "counted", other, vocabulary={"kind": "characters", "size": 5})
    assert counted.index["sides"]["train"]["unknown"] == 3  # the five are <unk>, a, b, c and the end of a text
    assert "3 tokens of train" in capsys.readouterr().err


# --- What is held out ---------------------------------------------------------------------------------------------


def test_held_out_texts_follow_from_their_wording(write: Write, tmp_path: Path) -> None:
    rows = [{"text": text} for text in TEXTS]
    one = build(tmp_path / "one", write("one.jsonl", rows), heldout="20%")
    other = build(tmp_path / "other", write("other.jsonl", rows[::-1]), heldout="20%")
    held = texts_of(one, "heldout")
    assert 20 <= len(held) <= 60 and sorted(held) == sorted(texts_of(other, "heldout"))
    assert sorted(held + texts_of(one)) == sorted(TEXTS)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.013])
def test_the_end_of_each_file_is_held_out(share: float, write: Write, tmp_path: Path) -> None:
    lined = "".join(f"line {n} of it\n" for n in range(3000))
    files = [write("a.txt", lined), write("b.jsonl", [{"text": text} for text in TEXTS]), write("c.txt", "0123456789")]
    corpus = build(tmp_path / "corpus", list(map(str, files)), heldout=share, heldout_from="end")
    wholes = [lined, "".join(TEXTS), "0123456789"]
    borders = [int(len(whole) * (1 - share)) for whole in wholes]
    parts = [(whole[:border], whole[border:]) for whole, border in zip(wholes, borders, strict=True)]
    assert "".join(texts_of(corpus)) == "".join(first for first, _ in parts)
    assert "".join(texts_of(corpus, "heldout")) == "".join(last for _, last in parts)
    ended = [side["tokens"] - len("".join(texts_of(corpus, name)).encode()) for name, side in _sides(corpus)]
    assert ended == [side["documents"] for _, side in _sides(corpus)]  # each text has its end, cut ones too


def _sides(corpus: Corpus) -> list[tuple[Any, dict[str, Any]]]:
    return list(corpus.index["sides"].items())


# --- Windows ------------------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 15), min_size=1, max_size=8),
    window=st.integers(1, 9),
    seed=st.one_of(st.none(), st.integers(0, 2**32 - 1)),
    cross=st.booleans(),
    epoch=st.integers(0, 10**9),
)
@settings(max_examples=60, deadline=None)
def test_every_token_is_learned_once_an_epoch(
    lengths: list[int], window: int, seed: int | None, cross: bool, epoch: int
) -> None:
    if sum(lengths) <= window:
        lengths = [*lengths, window]
    starts = np.cumsum([0, *lengths]).tolist()
    with tempfile.TemporaryDirectory() as out:
        tokens = line_of([list(range(a, b)) for a, b in pairwise(starts)], Path(out))
        crops = Crops(tokens, window, seed, cross)
        batch = crops.batch(epoch * len(crops) + np.arange(len(crops)))
    unlearned = {0} if cross else set(starts)
    assert sorted(batch.targets[batch.targets != IGNORED].tolist()) == sorted(set(range(starts[-1])) - unlearned)
    rows = zip(*(column.tolist() for column in columns(batch)), strict=True)
    for token, target, segment, position in rows:
        for at in range(window):
            if not segment[at]:
                assert target[at] == IGNORED and not any(segment[at:])
                continue
            border = not cross and token[at] + 1 in starts
            assert target[at] == (IGNORED if border else token[at] + 1)
            begins = at == 0 or segment[at] != segment[at - 1]
            assert position[at] == (0 if begins else position[at - 1] + 1)
            if not begins:
                assert token[at] == token[at - 1] + 1 and (cross or token[at] not in starts)
            elif at:
                assert segment[at] == segment[at - 1] + 1 and (token[at] == 0 or token[at] in starts)
    assert batch.size == starts[-1] - 1


def test_borders_move_and_rows_are_shuffled(tmp_path: Path) -> None:
    tokens = line_of([list(range(1000))], tmp_path, 128)
    crops, fixed = Crops(tokens, 16, seed=3), Crops(tokens, 16, seed=None)
    firsts = [crops.batch(epoch * len(crops) + np.arange(len(crops))).tokens[:, 0].tolist() for epoch in range(4)]
    assert len({first % 16 for epoch in firsts for first in epoch}) >= 4
    assert all(epoch != sorted(epoch) for epoch in firsts)
    for epoch in (0, 5):
        assert fixed.batch(epoch * 63 + np.arange(63)).tokens[:, 0].tolist() == list(range(0, 1000, 16))
    assert crops.batch(np.array([70])).tokens.equal(Crops(tokens, 16, seed=3).batch(np.array([69, 70])).tokens[1:])


def test_a_step_far_away_costs_no_more(tmp_path: Path) -> None:
    tokens = line_of([list(range(5000))], tmp_path, 1024)
    sources: dict[str, RowSource] = {"corpus": Crops(tokens, WINDOW, seed=0), "rows": Packed(make_rows(40), seed=0)}
    stream = MixtureStream(sources, 16)
    taken = []
    for step in (0, 10**12):
        started = time.perf_counter()
        for near in range(20):
            assert stream.batch(step + near).tokens.shape == (16, WINDOW)
        taken.append(time.perf_counter() - started)
    assert taken[1] < 5 * taken[0]


# --- What goes wrong ----------------------------------------------------------------------------------------------


def test_impossible_corpora_are_refused(write: Write, tmp_path: Path) -> None:
    file = write("tiny.txt", "tiny text")
    with pytest.raises(DanluError, match="no text to train on"):
        build(tmp_path / "none", write("empty.txt", ""))
    with pytest.raises(DanluError, match="nothing could be held out of 1 texts"):
        build(tmp_path / "none", file, heldout="1%")
    with pytest.raises(DanluError, match="the rows are not text"):
        build(tmp_path / "none", write("chat.jsonl", [{"prompt": "a", "completion": "b"}]))
    with pytest.raises(DanluError, match="there is no such file"):
        build(tmp_path / "none", tmp_path / "absent.txt")
    assert not any((tmp_path / "none").iterdir())
    corpus = build(tmp_path / "corpus", file)
    with pytest.raises(DanluError, match="10 tokens are fewer than a window of 10 and the one behind it"):
        Crops(corpus.side("train"), 10, 0)
    with pytest.raises(DanluError, match="fewer than a window"):
        Crops(corpus.side("heldout"), 1, 0)
    with pytest.raises(DanluError, match="corpus: 3 rows are fewer than the 4 that a batch"):
        MixtureStream({"corpus": Crops(corpus.side("train"), 3, 0)}, 4)
    with pytest.raises(DanluError, match="holds a corpus already"):
        build(tmp_path / "corpus", file)
    with pytest.raises(DanluError, match="holds other files"):
        build(tmp_path, file)
    located = CorpusSettings.model_validate({"sources": "a.txt", "vocabulary": {"kind": "from", "base": "b"}})
    located = located.beside(tmp_path)
    assert (located.sources[0].path, located.vocabulary.base) == (str(tmp_path / "a.txt"), tmp_path / "b")
    for wrong in ({"columns": {"prompt": "a", "completion": "b"}}, {"format": "alpaca"}, {"split": "heldout"}):
        with pytest.raises(ValidationError):
            CorpusSettings.model_validate({"sources": [{"path": "a", **wrong}], "vocabulary": "bytes"})


def test_damage_is_found(write: Write, tmp_path: Path) -> None:
    corpus = build(tmp_path / "corpus", write("rows.jsonl", [{"text": text} for text in TEXTS]))
    corpus.verify()
    build(tmp_path / "other", corpus.path.parent / "rows.jsonl", vocabulary="characters").tokenizer.save(
        corpus.path / "tokenizer"
    )
    with pytest.raises(DanluError, match="is another tokenizer"):
        Corpus.open(corpus.path).verify()
    shard = tmp_path / "corpus/train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DanluError, match=r"train-00000\.bin: differs from its checksum"):
        Corpus.open(corpus.path).verify()
    shard.write_bytes(content[:-2])
    with pytest.raises(DanluError, match=r"train-00000\.bin: has [\d,]+ bytes, the index says"):
        Corpus.open(corpus.path)
    shard.unlink()
    with pytest.raises(DanluError, match=r"train-00000\.bin: is missing"):
        Corpus.open(corpus.path)
    (corpus.path / INDEX).write_text('{"version": 9}')
    with pytest.raises(DanluError, match="no corpus of version 1"):
        Corpus.open(corpus.path)


WORKER = """
import resource, sys
from pathlib import Path
from danlu.artifact import peak_memory
from danlu.data.corpus import build_corpus
from danlu.data.corpus_settings import CorpusSettings
limit = int(sys.argv[1])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for source, out in zip(sys.argv[2::2], sys.argv[3::2]):
    build_corpus(CorpusSettings(sources=source, vocabulary={"kind": "characters"}, heldout_from="end"), Path(out))
    print(peak_memory())
"""


def run_worker(*places: Path, limit: int = 0) -> subprocess.Popen[str]:
    """A process that builds corpora: source, corpus, source, corpus; no file of it may exceed `limit` bytes."""
    command = [sys.executable, "-c", WORKER, str(limit), *map(str, places)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, **pipes)


def test_memory_does_not_grow_with_the_corpus(write: Write, tmp_path: Path) -> None:
    lines = [f"{n}: {TEXTS[n % 200]}\n" for n in range(100_000)]  # 1 MB, then 8 MB
    small, large = write("small.txt", "".join(lines[:12_500])), write("large.txt", "".join(lines))
    said, wrong = run_worker(small, tmp_path / "one", large, tmp_path / "other").communicate(timeout=300)
    assert len(said.split()) == 2, wrong
    before, after = map(int, said.split())
    assert after - before < 20 * 2**20


def test_a_killed_run_leaves_nothing_that_reads_as_whole(write: Write, tmp_path: Path) -> None:
    file, out = write("rows.txt", "".join(f"{n}: {TEXTS[n % 200]}\n" for n in range(15_000))), tmp_path / "corpus"
    worker = run_worker(file, out)
    deadline = time.monotonic() + 60
    while not list(out.glob("train-*.bin")) and time.monotonic() < deadline:
        time.sleep(0.01)
    worker.send_signal(signal.SIGKILL)
    worker.communicate(timeout=30)
    assert any(out.iterdir())
    with pytest.raises(DanluError, match="no finished corpus"):
        Corpus.open(out)
    small = write("small.txt", "small text")
    assert texts_of(build(out, small)) == ["small text"]


def test_a_full_disk_is_said_and_nothing_is_left(write: Write, tmp_path: Path) -> None:
    file = write("rows.txt", "".join(TEXTS) * 40)
    worker = run_worker(file, tmp_path / "corpus", limit=100_000)
    _, wrong = worker.communicate(timeout=120)
    assert worker.returncode and "DanluError" in wrong and "the corpus cannot be written: File too large" in wrong
    assert not any((tmp_path / "corpus").iterdir())


# --- The guide ----------------------------------------------------------------------------------------------------


def test_the_guide_runs(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write("data/tinyshakespeare.txt.gz", "".join(TEXTS) * 20)
    write("data/poems.jsonl", [{"text": text} for text in TEXTS])
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in re.findall(r"^```python\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL):
        exec(code, names)
    assert capsys.readouterr().out.splitlines()[-1] == "torch.Size([12, 64]) torch.Size([3, 256])"
    kinds = CorpusSettings.model_json_schema()["$defs"]["VocabularySettings"]["properties"]["kind"]["enum"]
    assert all(f"`{kind}`" in GUIDE for kind in kinds)
