"""Matrices that a format holds already, as those of a model that was trained or stored in it.

Rounded plainly they stay what they are; moved to make up for the errors of others, they would be rounded anew and lose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from danlu.compress.quantizing.formats.grid import Form
from danlu.compress.quantizing.rounding import round_plainly

SAMPLE = 16  # rows, drawn evenly, that tell of a whole matrix
SAME = 1e-7  # of the square sum; rounding random numbers to 8 bits loses some 5e-5


def holds(form: Form, weight: Tensor) -> bool:
    """Whether a format's values are these weights, fp32 [rows, columns], but for the last bits of a float."""
    rows = weight[torch.linspace(0, len(weight) - 1, min(SAMPLE, len(weight))).long()]
    blocks = rows.reshape(-1, form.block)
    lost = (round_plainly(blocks, form).values - blocks).square().sum()
    return bool(lost <= SAME * blocks.square().sum())
