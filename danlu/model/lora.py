"""Which weights learn: low-rank adapters beside frozen layers (LoRA, arXiv:2106.09685; DoRA, arXiv:2402.09353), or some
of the weights themselves, chosen by name."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.errors import DanluError, nearest
from danlu.model.mixture import Bank, bank_linear

LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Adapter(nn.Module):
    """A frozen layer, its weight W changed to W + scale * lora_up lora_down.

    With a magnitude (DoRA) every row of that sum is then scaled to the length that `lora_magnitude` says. `lora_down`
    starts random, `lora_up` at zero and `lora_magnitude` at the lengths of W's rows, so the layer starts as its base.
    They start in fp32, whatever the base's dtype, and are cast where they are used; an optimizer that keeps masters
    (train/optimizer.py) makes them rounded copies, and then no cast is left.

    Attributes:
        base: the frozen layer; its weight is [out, in], or [experts, out, in].
        lora_down, lora_up: [rank, in] and [out, rank], or those of every expert.
        lora_magnitude: [out] or [experts, out]; None for plain LoRA.
        scale: alpha / rank.
        dropout: share of the adapter's inputs that training hides; the base sees them all.
    """

    base: nn.Linear | Bank

    def __init__(
        self,
        base: nn.Linear | Bank,
        rank: int,
        alpha: float,
        dropout: float,
        generator: torch.Generator,
        dora: bool = False,
    ) -> None:
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        self.dropout = dropout
        weight = base.weight
        *experts, outputs, inputs = weight.shape
        # Kaiming uniform with a = sqrt(5), as in the authors' code: bound = 1 / sqrt(fan_in).
        bound = 1 / math.sqrt(inputs)
        start = torch.empty(*experts, rank, inputs).uniform_(-bound, bound, generator=generator)
        self.lora_down = nn.Parameter(start.to(weight.device))
        self.lora_up = nn.Parameter(torch.zeros(*experts, outputs, rank, device=weight.device))
        self.lora_magnitude = nn.Parameter(self.lengths()) if dora else None

    @property
    def rank(self) -> int:
        """Inner features of the adapter."""
        return self.lora_down.shape[-2]

    @property
    def weight(self) -> Tensor:
        """The changed weight as one matrix, in the base's dtype; with a gradient, without dropout."""
        own = self.base.weight
        wide = torch.promote_types(own.dtype, torch.float32)
        whole = own.to(wide) + (self.lora_up.to(wide) * self.scale) @ self.lora_down.to(wide)
        if self.lora_magnitude is not None:
            whole = whole * self.gain()[..., None]
        return whole.to(own.dtype)

    def gain(self) -> Tensor:
        """What DoRA multiplies each output by, fp32 [..., out]: the magnitude over the length of the changed row.

        The length counts as a constant to the gradient (section 4.3 of the paper).
        """
        assert self.lora_magnitude is not None
        return self.lora_magnitude / self.lengths()

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """The length of every row of W + scale * up down, fp32 [..., out], without making that sum.

        |w + s u D|^2 = |w|^2 + 2 s <w D^T, u> + s^2 <u D D^T, u>, for a row w of W and the row u of lora_up.
        """
        own = self.base.weight
        wide = torch.promote_types(own.dtype, torch.float32)
        down, up = self.lora_down.to(wide), self.lora_up.to(wide) * self.scale
        across = (own @ down.to(own.dtype).mT).to(wide) * 2 + up @ (down @ down.mT)
        squares = torch.linalg.vector_norm(own, dim=-1, dtype=wide).square() + (across * up).sum(-1)
        return squares.clamp(min=1e-12).sqrt()  # a row of zeros stays one

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """An ordinary layer with the changed weight, in the base's dtype; this one stays as it is."""
        weight = nn.Parameter(self.weight, requires_grad=self.base.weight.requires_grad)
        # All but the weights is copied: what the memo names is taken from it.
        return copy.deepcopy(self.base, {id(self.base.weight): weight, id(self.base.bias): self.base.bias})


class LoraLinear(Adapter):
    """An adapted `nn.Linear`."""

    base: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        inner = F.linear(dropped, self.lora_down.to(x.dtype)) * self.scale
        if self.lora_magnitude is None:
            return self.base(x) + F.linear(inner, self.lora_up.to(x.dtype))
        made = F.linear(x, self.base.weight) + F.linear(inner, self.lora_up.to(x.dtype))
        made = made * self.gain().to(x.dtype)
        return made if self.base.bias is None else made + self.base.bias


class LoraBank(Adapter):
    """An adapted `Bank`: every expert has an adapter of its own."""

    base: Bank

    def forward(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        inner = bank_linear(dropped, sizes, self.lora_down.to(x.dtype)) * self.scale
        change = bank_linear(inner, sizes, self.lora_up.to(x.dtype))
        if self.lora_magnitude is None:
            return self.base(x, sizes) + change
        rows = torch.tensor(sizes, device=x.device)
        gain = self.gain().to(x.dtype).repeat_interleave(rows, 0)
        made = (bank_linear(x, sizes, self.base.weight) + change) * gain
        return made if self.base.bias is None else made + self.base.bias.repeat_interleave(rows, 0)


def add_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    seed: int,
    dora: bool = False,
) -> list[str]:
    """Freeze `model` and put an adapter beside every linear layer, and every bank of experts' linear layers, whose name
    matches one of the globs `targets`.

    Args:
        model: any module.
        rank, alpha: the change is lora_up lora_down of this rank, times alpha / rank.
        dropout: share of the adapters' inputs that training hides.
        targets: as in "blocks.*.attention.*".
        seed: of the adapters' start.
        dora: the length of every row of a weight learns apart from its direction (arXiv:2402.09353).

    Returns the names of the adapted layers. Raises DanluError where a glob matches no such layer, or the model has
    adapters already.
    """
    layers = adaptable(model)
    chosen = chosen_names(list(layers), targets, "linear layer", "lora targets")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name in chosen:
        attach(model, name, rank=rank, alpha=alpha, dropout=dropout, generator=generator, dora=dora)
    return chosen


def adaptable(model: nn.Module) -> dict[str, nn.Linear | Bank]:
    """The layers that can be adapted, by name. Raises DanluError where the model has adapters already."""
    if any(adapters(model)):
        raise DanluError("the model has adapters already", fix="merge them first: merge_lora(model)")
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Bank)}


def attach(
    model: nn.Module,
    name: str,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    generator: torch.Generator,
    dora: bool,
) -> Adapter:
    """Put an adapter in the place of one layer; see `add_lora`."""
    base = model.get_submodule(name)
    made: Adapter
    if isinstance(base, Bank):
        made = LoraBank(base, rank, alpha, dropout, generator, dora)
    else:
        assert isinstance(base, nn.Linear), name
        made = LoraLinear(base, rank, alpha, dropout, generator, dora)
    _replace(model, name, made.train(base.training))
    return made


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Every adapted layer with its name."""
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            yield name, module


def merge_lora(model: nn.Module, *, keep: bool = False) -> dict[str, Adapter]:
    """Fold every adapter into its base layer; the model becomes an ordinary one.

    Args:
        keep: return what was folded, for `unmerge_lora`. It holds the weights as they were, so with it every adapted
            weight is in memory twice; without it one at a time is.

    Returns the adapters by their layers' names, none unless `keep`.
    """
    kept: dict[str, Adapter] = {}
    for name in [name for name, _ in adapters(model)]:
        adapter = model.get_submodule(name)
        assert isinstance(adapter, Adapter)
        _replace(model, name, adapter.merged())
        if keep:
            kept[name] = adapter
    return kept


def unmerge_lora(model: nn.Module, kept: Mapping[str, Adapter]) -> None:
    """Undo `merge_lora(model, keep=True)`, bit for bit in any dtype. What was done to the merged weights is lost."""
    for name, adapter in kept.items():
        _replace(model, name, adapter.train(model.get_submodule(name).training))


def train_only(model: nn.Module, globs: Sequence[str]) -> list[str]:
    """Let the weights learn whose names match one of the globs, as in "*.bias" (arXiv:2106.10199), and freeze the rest.

    Returns their names. Raises DanluError where a glob matches no weight.
    """
    chosen = chosen_names([name for name, _ in model.named_parameters()], globs, "weight", "weights to train")
    learning = set(chosen)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in learning)
    return chosen


def freeze(model: nn.Module, globs: Sequence[str]) -> list[str]:
    """Freeze the weights whose names match one of the globs, as in "blocks.[0-5].*"; the others stay as they are.

    Returns their names. Raises DanluError where a glob matches no weight.
    """
    weights = dict(model.named_parameters())
    chosen = chosen_names(list(weights), globs, "weight", "weights to freeze")
    for name in chosen:
        weights[name].requires_grad_(False)
    return chosen


def chosen_names(names: Sequence[str], globs: Sequence[str], kind: str, where: str) -> list[str]:
    """The names that match one of the globs, in their own order.

    Args: kind: what is named, say "weight"; where: the setting that holds the globs; both for the error.

    Raises DanluError where a glob matches none, with the nearest name and all that there are.
    """
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            known = sorted({LAYER_NUMBER.sub("*", name) for name in names})
            close = nearest(glob, known)
            hint = f"the nearest is {close}; " if close else ""
            raise DanluError(f"no {kind} is named like {glob}", where=where, fix=f"{hint}there are {', '.join(known)}")
    return [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
