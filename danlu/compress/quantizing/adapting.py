"""Adapters of low rank beside a rounded model learn to guess as the original does, and are then rounded into it.

Codes cannot follow a gradient: half a step apart, they stay where they are or jump. What can are adapters (LoRA,
arXiv:2106.09685) on the rounded weights: they learn what the whole model lacks, and the sum is what codes and steps are
then refined towards, from where they are. What they cannot follow is left to the next round. Nothing of the adapters
is in the file. Continuous and discrete steps by turns are those of PV-tuning (arXiv:2405.14852).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from danlu.compress.beside import Beside
from danlu.compress.compensate import Inputs
from danlu.compress.quantizing.blockwise import round_blocks
from danlu.compress.quantizing.formats.grid import Grid
from danlu.compress.quantizing.formats.known import Format
from danlu.compress.quantizing.lesson import Lesson
from danlu.compress.quantizing.rounding import Rounded, round_again
from danlu.compress.quantizing.spool import Spool
from danlu.model.checkpoint import Checkpoint
from danlu.model.lora import Adapter, adapters, attach
from danlu.train.precision import choose_precision

RATE = 2e-3  # of Adam, rising at first, then falling to 0
BETAS = 0.9, 0.95

Changes = dict[str, tuple[Tensor, Tensor]]  # by a weight's name, fp32 [outputs, rank] and [rank, inputs]


def adapt(
    checkpoint: Checkpoint,
    spool: Spool,
    text: Tensor,
    rows: Tensor,
    steps: int,
    rank: int,
    tick: Callable[[int, str], None],
) -> None:
    """One round: adapters learn, and the blocks' matrices are refined towards what they make of them.

    Args:
        checkpoint: the original.
        spool: with grids; what the matrices become replaces what lay there.
        text: int64 [n, T], token ids that adapters learn from.
        rows: int64 [m, T], those that matrices are fitted on.
        steps: of 4 rows of the text.
        rank: of the adapters.
        tick: told of every step, with the divergence from the original, and of every block.
    """
    changes = _learn(Lesson(checkpoint, spool), spool, text, steps, rank, tick)
    makers = {name: partial(_changed, spool, name, changes.get(name)) for name in checkpoint.model.makers()}
    walk = Beside(checkpoint.config, makers, rows, choose_precision("auto")[0])
    with torch.no_grad():
        walk.embed()
        round_blocks(walk, dict(spool.forms), spool, partial(_again, spool), tick)


def _learn(
    lesson: Lesson, spool: Spool, text: Tensor, steps: int, rank: int, tick: Callable[[int, str], None]
) -> Changes:
    """What adapters of every rounded matrix of the blocks learned."""
    _attach(lesson.student, spool, rank)
    found: dict[str, Adapter] = dict(adapters(lesson.student))
    learning = [weight for adapter in found.values() for weight in (adapter.lora_down, adapter.lora_up)]
    optimizer = torch.optim.Adam(learning, RATE, BETAS)
    for share, apart in lesson.steps(text, steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * share
        optimizer.step()
        optimizer.zero_grad()
        tick(1, f"{apart:.4f} nat from the original")
    return {
        f"{name}.weight": (each.lora_up.detach() * each.scale, each.lora_down.detach()) for name, each in found.items()
    }


def _attach(student: nn.Module, spool: Spool, rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [
        name for name, layer in student.named_modules() if type(layer) is nn.Linear and name.startswith("blocks.")
    ]
    for name in layers:
        if spool.forms.get(f"{name}.weight") is not None:
            attach(student, name, rank=rank, alpha=rank, dropout=0.0, generator=generator, dora=False)


def _changed(spool: Spool, name: str, change: tuple[Tensor, Tensor] | None) -> Tensor:
    """A weight with what its adapter adds, fp32, in memory of its own."""
    weight = spool.values(name)
    return weight.clone() if change is None else torch.addmm(weight, *change)


def _again(
    spool: Spool, names: Sequence[str], weight: Tensor, rows: slice, form: Format, inputs: Inputs | None
) -> Rounded:
    values = torch.cat([spool.values(name).view(-1, weight.shape[-1]) for name in names])[rows]
    grids = [Grid.joined(each).rows(rows) for each in zip(*(spool.grids[name] for name in names), strict=True)]
    return round_again(weight, form, inputs, values, grids)
