"""What training softwares do that tables of their runs leave unsaid."""

from __future__ import annotations

import re
from dataclasses import dataclass

Row = dict[str, str]


@dataclass(frozen=True)
class Stack:
    """What a training software does that its tables do not say.

    Attributes:
        name: the software.
        words: of the table's `framework` that tell it.
        flash, sequence, gated, tied, balanced: as in Jobs.
        biased: matrices have biases, and norms have them too.
        zero: where the table is silent.
        gradient_bytes, state_bytes, weight_bytes: as in Jobs.
        vocab: where the table is silent, before padding; `padded` to so many rows for each tensor process.
        pads: the vocabulary that a table tells is padded too.
        recompute: 0, 1, 2 where the table is silent; -1 for whole blocks where the job spans nodes, else nothing.
        redone, uneven: as in Jobs; beside: the same, of models without experts.
        first_stage: the memory told is that of the first stage, not of the fullest.
        gpu, precision: where the table is silent.
        micro_rows: where the table is silent; None where that cannot be known.
        accumulates: whether a step may have several micro-batches where the table tells neither how many nor the batch.
        half: printed operations count half the pairs of tokens in causal attention, not all of them.
    """

    name: str
    words: tuple[str, ...]
    flash: bool = True
    sequence: bool = True
    gated: bool = True
    tied: bool = False
    biased: bool = False
    balanced: bool = False
    zero: int = 0
    weight_bytes: int = 2
    gradient_bytes: int = 4
    state_bytes: int = 12
    vocab: int | None = None
    padded: int = 128
    pads: bool = False
    recompute: int = 0
    redone: float = 0.0
    uneven: bool = False
    beside: bool = False
    first_stage: bool = False
    gpu: str = ""
    precision: str = "bf16"
    micro_rows: float | None = None
    accumulates: bool = True
    half: bool = False


# Megatron as its papers of 2021 and 2022 ran it: scores written down, GPT's plain blocks.
CLASSIC = Stack("megatron-classic", ("allocation / megatron",), flash=False, sequence=False, gated=False, tied=True,
                biased=True, vocab=50257)  # fmt: skip

# The first whose words stand in a row's framework counts.
STACKS = (
    Stack("megatron-ci", ("megatron-lm ci",), sequence=False, gated=False, tied=True, biased=True, vocab=50257,
          pads=True),
    # Tables of this one leave out vocabulary and recomputing: the head's time asks for GPT-2's vocabulary, unpadded
    # where it is not cut, and the layers' time for no recomputing in one node.
    Stack("megatron-deepspeed", ("megatron-deepspeed", "megatron + deepspeed"), flash=False, sequence=False,
          gated=False, tied=True, biased=True, gradient_bytes=2, vocab=50257, recompute=-1),
    # Cuts nothing but what its copies share out; gradients stay in 16 bits.
    Stack("deepspeed", ("deepspeed",), zero=3, gradient_bytes=2, gated=True, accumulates=False, half=True),
    Stack("nanotron", ("nanotron",), balanced=True, first_stage=True),
    Stack("llm-foundry", ("llm-foundry",), gated=False, tied=True, zero=3, weight_bytes=2, gradient_bytes=4),
    # Every second product, or every second layer, is computed again where its recomputing is selective.
    Stack("torchtitan", ("torchtitan",), zero=3, redone=0.5, uneven=True, accumulates=False),
    # Releases whose rows name no precision run at the pace of the next one's 8-bit rows: no bf16 product is as fast.
    Stack("megatron-bridge", ("megatron-bridge", "nemo/"), zero=1, precision="fp8", beside=True, half=True),
    CLASSIC,
    # A study of the vocabulary's place in a pipeline (arXiv:2411.05288), on A100s as its text says.
    Stack("megatron-fork", ("megatron-lm fork",), sequence=False, gated=False, biased=True, gpu="a100"),
    Stack("megatron", ("megatron-lm", "megatron"), zero=1),
    # Its long rows are trained one at a time.
    Stack("nemo", ("nemo",), zero=1, beside=True, micro_rows=1),
)  # fmt: skip

# Layers, width and heads by model and 10^9 weights, where a study's scripts tell them and its table does not.
SIZES = {
    ("gpt2-style", 18): (40, 6144, 32), ("gpt2-style", 25): (40, 7168, 32), ("gpt2-style", 30): (48, 7168, 32),
    ("gpt2-style", 39): (48, 8192, 32), ("gpt2-style", 52): (64, 8192, 32), ("gpt2-style", 116): (64, 12288, 32),
    ("gpt-1.3b", 1.3): (24, 2048, 16),
}  # fmt: skip

# Latent attention of Megatron-LM's tests, as their scripts tell it, by width and `kv-channels`: what queries and keys
# are squeezed to, features of a head that are not turned and that are, features of a value.
LATENT: dict[tuple[float, str | None], tuple[int, int, int, int, int]] = {
    (512, None): (192, 64, 16, 8, 16), (512, "128"): (256, 128, 128, 64, 128),
    (1024, "128"): (1536, 512, 128, 64, 128), (7168, "128"): (1536, 512, 128, 64, 128),
}  # fmt: skip

FLASH = (2205, 14135)  # arXiv's number of the paper that attention without written scores came with


def stack_of(row: Row) -> Stack | None:
    """The software of a row, None where it is not known."""
    told = row["framework"].lower()
    found = next((stack for stack in STACKS if any(word in told for word in stack.words)), None)
    if found is not None and found.name == "megatron":
        paper = re.search(r"arxiv\D{0,9}(\d{4})\.(\d{5})", row.get("source", "").lower())
        if paper and (int(paper.group(1)), int(paper.group(2))) < FLASH:
            return CLASSIC
    return found


def told_elsewhere(row: Row) -> Row:
    """Cells that a row leaves blank and its study's scripts tell: layers, hidden, heads."""
    try:
        size = SIZES.get((row["model"].lower(), float(row.get("params_b", "") or 0)))
    except ValueError:
        return {}
    names = ("layers", "hidden", "heads")
    return {name: str(value) for name, value in zip(names, size or (), strict=False) if not row.get(name)}
