"""What the recipes come to: each from an empty directory to its last figure, by the commands that its head names.

    python bench/recipes.py [NAME ...] [--data DIRECTORY] [--steps N] [--home DIRECTORY] [--save]

Without names all of them, one after another; some take up where another ended, which then runs before them. Beside
each figure stands the bar it is held to, if it has one: what others reach (nanoGPT's 1.88 nat/character in the same
budget), what a task counts as solved from, or its dense twin. `--steps` trains that many steps only, to see that all of
it runs; such figures mean nothing. All together take hours: with `--home` what is finished is kept there, and the same
command goes on with the rest. What `--save` keeps of recipes that were not run now stays, each with its own commit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import arguments, commit, emit, with_saved

from danlu.artifact import write_json

HERE = Path(__file__).parents[1]
FOLDER = HERE / "recipes"
DATA = Path(os.environ.get("DANLU_DATA", HERE.parent / "shared" / "data"))
SHAKESPEARE = ("--set", "data.sources=data/tinyshakespeare.txt.gz")


@dataclass(frozen=True)
class Bar:
    """What a figure is held to: `figure` at most, or at least, `value`; or at most the same figure of `twin`."""

    figure: str
    at_most: bool
    value: float | None = None
    twin: str | None = None

    def of(self, found: dict[str, Any]) -> float | None:
        """The number to hold to; None where the twin has not run."""
        if self.twin is None:
            return self.value
        return found[self.twin]["figures"].get(self.figure) if self.twin in found else None

    def shown(self, figures: dict[str, float], bound: float) -> str:
        """In words, as in "validation_loss 1.68, bar 1.88: met"."""
        value = figures[self.figure]
        met = value <= bound if self.at_most else value >= bound
        return f"{self.figure} {value:.4g}, bar {bound:.4g}: {'met' if met else 'MISSED'}"


@dataclass(frozen=True)
class Recipe:
    """How one is run.

    Attributes:
        words: of its command, behind the recipe.
        prepare: the words of a script that makes its text.
        after: the recipe whose run it goes on from.
        bar: what it is held to.
        reads: whether it reads data sets.
    """

    words: tuple[str, ...] = ()
    prepare: tuple[str, ...] = ()
    after: str | None = None
    bar: Bar | None = None
    reads: bool = True


RECIPES = {
    "shakespeare": Recipe(SHAKESPEARE, bar=Bar("validation_loss", True, 1.88)),
    "switch-dense": Recipe(SHAKESPEARE),
    "switch": Recipe(SHAKESPEARE, bar=Bar("validation_loss", True, twin="switch-dense")),
    "bert-pretraining": Recipe(prepare=("recipes/bert_text.py", "recipes/data", "runs/bert-text")),
    "bert-sst2-scratch": Recipe(after="bert-pretraining"),
    "bert-sst2": Recipe(after="bert-pretraining", bar=Bar("test_accuracy", False, twin="bert-sst2-scratch")),
    "t5-multi30k": Recipe(bar=Bar("test_bleu", False, 15)),
    "resnet": Recipe(bar=Bar("accuracy", False, 0.9)),
    "vae": Recipe(bar=Bar("elbo", False, -245)),
    "gan": Recipe(bar=Bar("modes", False, 8), reads=False),
    "dqn": Recipe(bar=Bar("return", False, 475), reads=False),
}


def lay_out(home: Path, data: Path) -> None:
    """A folder as the recipes expect it: themselves in recipes/, the data sets in recipes/data/."""
    if (home / "recipes").is_dir():
        return
    shutil.copytree(FOLDER, home / "recipes", ignore=shutil.ignore_patterns("data", "__pycache__"))
    (home / "recipes" / "data").symlink_to(data)


def command(name: str, steps: int | None) -> list[str]:
    """The words of a recipe's own command."""
    script = f"recipes/{name}.py"
    begin = [script] if (FOLDER.parent / script).exists() else ["-m", "danlu", "train", f"recipes/{name}.yaml"]
    only = [] if steps is None else ["--steps", str(steps)]
    return [*begin, *RECIPES[name].words, *only, "--out", f"runs/{name}", "--json"]


def call(name: str, words: Sequence[str], home: Path) -> str:
    """What a command prints. Ends the bench with its message where it fails."""
    environment = os.environ | {"DANLU_DATA": str(home / "recipes" / "data"), "PYTHONPATH": str(HERE)}
    made = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True, cwd=home, env=environment)
    if made.returncode:
        raise SystemExit(f"{name} ended with exit code {made.returncode}: {' '.join(words)}")
    return made.stdout


def carry_out(name: str, home: Path, steps: int | None) -> dict[str, Any]:
    """Run one, unless it has run there; returns its steps, seconds, figures and the commit they are of."""
    kept = home / f"{name}.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    started = time.perf_counter()
    if RECIPES[name].prepare:
        call(name, RECIPES[name].prepare, home)
    told = numbers(json.loads(call(name, command(name, steps), home)))
    seconds = time.perf_counter() - started
    done = {"steps": int(told.pop("steps")), "seconds": seconds, "figures": told, "commit": commit()}
    write_json(kept, done)
    return done


def numbers(told: dict[str, Any], before: str = "") -> dict[str, float]:
    """The figures of what a command printed: plain numbers, and those with a unit; nested ones as in "test bleu"."""
    found: dict[str, float] = {}
    for name, value in told.items():
        if isinstance(value, dict) and "value" not in value:
            found |= numbers(value, f"{before}{name} ")
            continue
        number = value["value"] if isinstance(value, dict) else value
        if isinstance(number, int | float):
            found[before + name] = number
    return found


def ordered(names: Sequence[str]) -> list[str]:
    """The named recipes and those they go on from, in the order of the table."""
    wanted = set(names)
    for name in reversed(RECIPES):
        after = RECIPES[name].after
        if name in wanted and after is not None:
            wanted.add(after)
    return [name for name in RECIPES if name in wanted]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of data sets")
    parser.add_argument("--steps", type=int, help="train so many steps only")
    parser.add_argument("--home", type=Path, help="the folder of the runs; else a temporary one")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in RECIPES]
    if unknown:
        parser.error(f"{unknown[0]} is none of {', '.join(RECIPES)}")
    names = ordered(given.names or list(RECIPES))
    reading = [] if given.data.is_dir() else [name for name in names if RECIPES[name].reads]
    if reading and given.names:
        parser.error(f"{', '.join(reading)}: {given.data} is not there; name the folder with --data or DANLU_DATA")
    if reading:
        print(f"left out, because {given.data} is not there: {', '.join(reading)}")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="danlu-recipes-") as temporary:
        home = (given.home or Path(temporary)).resolve()
        home.mkdir(parents=True, exist_ok=True)
        lay_out(home, given.data.resolve())
        for name in (name for name in names if name not in reading):
            found[name] = carry_out(name, home, given.steps)
    print(f"{'recipe':16} {'steps':>7} {'minutes':>8}  figures")
    for name, one in found.items():
        figures, bar = one["figures"], RECIPES[name].bar
        bound = None if bar is None else bar.of(found)
        if bar is not None and bound is not None:
            one["bar"] = {"figure": bar.figure, "at most" if bar.at_most else "at least": bound}
            print(f"{name:16} {one['steps']:7,} {one['seconds'] / 60:8.1f}  {bar.shown(figures, bound)}")
        shown = ", ".join(f"{label} {value:.4g}" for label, value in figures.items())
        print(f"{name:16} {one['steps']:7,} {one['seconds'] / 60:8.1f}  {shown}")
    emit("recipes", with_saved("recipes", found) if given.save else found, given.save)


if __name__ == "__main__":
    main()
