"""Which weights decay, how fast each learns, and from when on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from danlu.errors import DanluError
from danlu.model.lora import chosen_names
from danlu.train.optimizing.settings import OptimizerSettings

BLOCK = re.compile(r"(?P<stack>(?:.*?\.)?)blocks\.(?P<number>\d+)\.")
BOTTOM = re.compile(r"(?P<stack>(?:.*?\.)?)(?:embedding|relative)\.")


@dataclass(frozen=True)
class Group:
    """How one weight learns.

    Attributes:
        decays: whether decay and penalties act on it.
        factor: what its learning rate is multiplied by.
        thaw: updates of others before its first; None where it never learns.
        muon: whether Muon learns it.
    """

    decays: bool
    factor: float = 1.0
    thaw: int | None = 0
    muon: bool = False


def group_weights(
    weights: Mapping[str, Tensor], settings: OptimizerSettings, multipliers: Mapping[str, float] | None = None
) -> dict[str, Group]:
    """How every weight of a model learns.

    Args:
        weights: those that learn, by name, of the whole model also where this process holds a part of it: how far a
            block is from the top depends on how many there are. Only shapes are looked at.
        multipliers: what `danlu.model.initialize.mup_multipliers` says, where `settings.mup_base_width` asks for it.

    Raises DanluError where a glob matches no weight, none is left to learn, or the settings speak of blocks and the
    model has none.
    """
    names = list(weights)
    frozen = _matching(names, settings.frozen, "frozen")
    if names and len(frozen) == len(names):
        raise DanluError("nothing is left to learn", where="optimizer.frozen", fix="freeze fewer weights")
    decays = {name for name, weight in weights.items() if is_matrix(name, weight)}
    decays |= _matching(names, settings.decay, "decay")
    decays -= _matching(names, settings.no_decay, "no_decay")
    factors = _factors(names, settings, multipliers)
    depths = _depths(names)
    if settings.layer_decay < 1 or settings.thaw_steps is not None:
        _need_blocks(depths, "layer_decay" if settings.layer_decay < 1 else "thaw_steps")
    named = _matching(names, settings.muon or (), "muon")
    matrices = {name for name in named if is_matrix(name, weights[name]) and weights[name].dim() in (2, 3)}
    muon = matrices - frozen
    if settings.name == "muon" and not muon:
        what = "muon learns matrices, and its globs name none that learns"
        raise DanluError(what, where="optimizer.muon", fix="name some, or take another optimizer")
    return {
        name: Group(
            decays=name in decays,
            factor=factors[name] * settings.layer_decay ** depths[name],
            thaw=None if name in frozen else max(depths[name] - 1, 0) * (settings.thaw_steps or 0),
            muon=name in muon,
        )
        for name in names
    }


def is_matrix(name: str, weight: Tensor) -> bool:
    """A bank of experts stacks biases and magnitudes, which are vectors all the same."""
    return weight.dim() >= 2 and not name.endswith(("bias", "lora_magnitude"))


def _factors(
    names: Iterable[str], settings: OptimizerSettings, multipliers: Mapping[str, float] | None
) -> dict[str, float]:
    """muP's multiplier of every weight, times those of all globs that match it."""
    names = list(names)
    if settings.mup_base_width is not None and multipliers is None:
        what = "muP's multipliers are known for Danlu's own models only"
        raise DanluError(what, where="optimizer.mup_base_width", fix="leave it out, or set optimizer.factors")
    factors = {name: 1.0 if multipliers is None else multipliers[name] for name in names}
    for glob, factor in settings.factors.items():
        for name in _matching(names, (glob,), "factors"):
            factors[name] *= factor
    return factors


def _depths(names: Iterable[str]) -> dict[str, int]:
    """How far each weight is from the top of its stack: 1 for the last block, most for embeddings, 0 for heads."""
    names = list(names)
    heights: dict[str, int] = {}
    for found in filter(None, map(BLOCK.match, names)):
        stack = found["stack"]
        heights[stack] = max(heights.get(stack, 0), int(found["number"]) + 1)
    depths = {}
    for name in names:
        inside, below = BLOCK.match(name), BOTTOM.match(name)
        if inside:
            depths[name] = heights[inside["stack"]] - int(inside["number"])
        elif below:
            depths[name] = 1 + max((n for stack, n in heights.items() if stack.startswith(below["stack"])), default=0)
        else:
            depths[name] = 0
    return depths


def _need_blocks(depths: Mapping[str, int], field: str) -> None:
    if not any(depths.values()):
        raise DanluError("the model has no blocks to tell apart", where=f"optimizer.{field}", fix="leave it out")


def _matching(names: list[str], globs: tuple[str, ...], field: str) -> set[str]:
    """The names that match one of the globs. Raises DanluError where a glob matches none."""
    return set(chosen_names(names, globs, "weight that learns", f"optimizer.{field}"))
