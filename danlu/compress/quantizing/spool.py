"""Packed matrices on disk, so that none has to stay in memory until the file is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from danlu.compress.quantizing.formats.grid import Grid
from danlu.compress.quantizing.formats.known import Format
from danlu.compress.quantizing.rounding import Rounded
from danlu.gguf_numbers import dequantize
from danlu.model.gguf import Packed, forget_pages


@dataclass
class Spool:
    """What a model's weights have become.

    Attributes:
        folder: where packed matrices lie.
        grids_too: grids are kept as well, 1/32 of the weights in size, so that codes can be changed on them.
        weights: by their names in the model; vectors and what stays exact as they are.
        forms: how each matrix is stored: a format, or None for fp32.
        grids: of each packed matrix, one for each of its blocks of columns.
        shapes: of each packed matrix, or bank of them.
    """

    folder: Path
    grids_too: bool = False
    weights: dict[str, Tensor | Packed] = field(default_factory=dict)
    forms: dict[str, Format | None] = field(default_factory=dict)
    grids: dict[str, tuple[Grid, ...]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def keep(self, name: str, rounded: Rounded, form: Format, shape: tuple[int, ...]) -> None:
        """Put a matrix, or a bank of them, of this shape aside; again, where its codes have changed."""
        file = self.folder / f"{name}.bin"
        rounded.packed.numpy().tofile(file)
        mapped = torch.from_file(str(file), shared=True, size=rounded.packed.numel(), dtype=torch.uint8)
        data = mapped.view(*shape[:-1], -1)
        self.weights[name], self.forms[name], self.shapes[name] = Packed(form.kind, data), form, shape
        if self.grids_too:
            self.grids[name] = rounded.grids

    def keep_exact(self, name: str, weight: Tensor) -> None:
        """Put aside as it is what no format holds, or must not."""
        self.weights[name] = weight.clone()
        if weight.dim() > 1:
            self.forms[name] = None

    def values(self, name: str) -> Tensor:
        """What is stored for a weight, fp32, as a reader of the file computes it."""
        weight = self.weights[name]
        if not isinstance(weight, Packed):
            return weight
        made = dequantize(weight.data.reshape(-1, weight.data.shape[-1]).numpy(), weight.kind)
        forget_pages(weight.data)
        return torch.from_numpy(made).view(self.shapes[name])
