"""English text for recipes/bert-pretraining.yaml, out of small public data sets:

python recipes/bert_text.py DATA runs/bert-text

Writes reviews.jsonl, the sentences of SST-2's training side without their labels, and other.jsonl: captions, abstracts,
encyclopedia, and questions. Nothing of SST-2's development or test side is read.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from danlu.console import result
from danlu.data.datasets import read_labelled, read_lines, read_questions


def reviews(data: Path) -> Iterator[str]:
    """Sentences about films."""
    return (one.text for one in read_labelled(data / "sentconv_stsa.binary.train.gz"))


def other(data: Path) -> Iterator[str]:
    """What else is English there."""
    yield from read_lines(data / "multi30k_train.en.gz")
    yield from (" ".join(row["source"]) for row in _rows(data / "scitldr_a_train.jsonl.gz"))
    yield from dict.fromkeys(one.passage for one in read_questions(data / "xquad_en_1190.json.gz"))
    yield from (row["question"] for row in _rows(data / "gsm8k_train.jsonl.gz"))
    abstracts = gzip.decompress((data / "cranfield_cran.all.1400.gz").read_bytes()).decode("latin-1")
    yield from (" ".join(text.split()) for text in re.findall(r"\n\.W\n(.*?)(?=\n\.I |\Z)", abstracts, re.DOTALL))


def _rows(file: Path) -> Iterator[dict[str, str]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def write(texts: Iterable[str], file: Path) -> None:
    """One JSON object a line, texts without words left out."""
    kept = [text for text in texts if text.strip()]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in kept), encoding="utf-8")
    result(f"{file}: {len(kept):,} texts, {sum(len(text.split()) for text in kept):,} words")


def main(data: Path, out: Path) -> None:
    """Write both files."""
    out.mkdir(parents=True, exist_ok=True)
    write(reviews(data), out / "reviews.jsonl")
    write(other(data), out / "other.jsonl")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
