"""Low-rank adapters (LoRA, arXiv:2106.09685): train two thin matrices beside each frozen linear layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.errors import DanluError


class LoraLinear(nn.Module):
    """A frozen linear layer plus scale * lora_up(lora_down(x)).

    `lora_down` starts random and `lora_up` at zero, so the layer starts as its base. Both start in fp32, whatever the
    base's dtype, and are cast where they are used; an optimizer that keeps masters (train/optimizer.py) makes them
    rounded copies, and then no cast is left.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        self.dropout = dropout
        device = base.weight.device
        # Kaiming uniform with a = sqrt(5), as in the authors' code: bound = 1 / sqrt(fan_in).
        bound = 1 / math.sqrt(base.in_features)
        start = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_down = nn.Parameter(start.to(device))
        self.lora_up = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        inner = F.linear(dropped, self.lora_down.to(x.dtype)) * self.scale
        return self.base(x) + F.linear(inner, self.lora_up.to(x.dtype))

    def merged(self) -> nn.Linear:
        """The base with the adapter added to its weight, in the base's dtype."""
        change = (self.lora_up * self.scale) @ self.lora_down
        with torch.no_grad():
            self.base.weight.copy_(self.base.weight.float() + change)
        return self.base


def add_lora(
    model: nn.Module, *, rank: int, alpha: float, dropout: float, targets: Sequence[str], seed: int
) -> list[str]:
    """Freeze `model` and put an adapter beside every linear layer whose name matches one of the globs `targets`.

    Returns the names of the adapted layers. Raises DanluError where a glob matches no linear layer.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for glob in targets:
        if not any(fnmatch(name, glob) for name in linears):
            kinds = sorted({"*." + ".".join(name.split(".")[-2:]) for name in linears})
            raise DanluError(
                f"no linear layer is named like {glob}", where="lora targets", fix=f"there are {', '.join(kinds)}"
            )
    model.requires_grad_(False)
    chosen = [name for name in linears if any(fnmatch(name, glob) for glob in targets)]
    generator = torch.Generator().manual_seed(seed)
    for name in chosen:
        _replace(model, name, LoraLinear(linears[name], rank, alpha, dropout, generator))
    return chosen


def adapters(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Every adapted layer with its name."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def merge_lora(model: nn.Module) -> None:
    """Fold every adapter into its base layer; the model becomes an ordinary one."""
    for name, module in list(adapters(model)):
        _replace(model, name, module.merged())


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
