"""Adam with moments of 8 bits (arXiv:2110.02861)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from danlu.errors import DanluError
from danlu.train.optimizing.parts import Weight, beside, cuts, local

SMALLEST = 4096  # weights of a matrix; what is smaller is kept in fp32, as in the paper
BLOCKS = (64, 32, 16)  # values of a row that share a scale; the first that rows divide into


def block_of(weight: Weight) -> int | None:
    """Values that share a scale, or None where the moments of a weight stay fp32: vectors, and what is small.

    Blocks lie within rows, so that the moments can be cut along rows wherever the weight is. Where columns are cut, the
    cut must fall between blocks. Raises DanluError where it does not.
    """
    shape = weight.master.shape
    if len(shape) < 2 or weight.master.numel() < SMALLEST:
        return None
    block = next((size for size in BLOCKS if shape[-1] % size == 0), None)
    parts = cuts(weight.master, -1)
    if block is not None and shape[-1] % (block * parts):
        what = f"rows of {shape[-1]} are cut into {parts} parts, which are no multiples of {block}"
        raise DanluError(what, where=weight.name, fix="cut it into fewer parts, or set optimizer.state to fp32")
    return block


def dynamic_map(signed: bool) -> Tensor:
    """256 numbers from -1 or 0 to 1, ascending fp32: every power of ten has twice as many as the one below it."""
    tens = []
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (power + (0 if signed else 1)) + 1, dtype=torch.float64)
        tens.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (power - 6))
    numbers = torch.cat(tens)
    numbers = torch.cat([numbers, -numbers] if signed else [numbers])
    return torch.cat([numbers, torch.tensor([0.0, 1.0], dtype=torch.float64)]).sort().values.float()


class Code:
    """Numbers of one sign or both as bytes: a place in the dynamic map, times the largest of a block.

    Attributes:
        numbers: those of the map, fp32 [256].
        places: of the number nearest to every bf16 value, by its bits as an int16 plus 2^15, uint8 [65536]. A look-up
            takes a thirtieth of the time of a search among the numbers, and errs by the rounding to bf16 at most.
    """

    def __init__(self, signed: bool, device: torch.device) -> None:
        numbers = dynamic_map(signed)
        values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()
        places = torch.bucketize(values, (numbers[1:] + numbers[:-1]) / 2).to(torch.uint8)
        self.numbers, self.places = numbers.to(device), places.to(device)

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """uint8 [..., N] and fp32 [..., N / block] -> fp32 [..., N]."""
        numbers = self.numbers.index_select(0, codes.flatten().int()).view(*scales.shape, -1)
        return numbers.mul_(scales[..., None]).view(codes.shape)

    def encode(self, values: Tensor, codes: Tensor, scales: Tensor) -> None:
        """fp32 [..., N] -> the nearest, to rounding, into `codes` and `scales`."""
        blocks = values.view(*scales.shape, -1)
        torch.maximum(blocks.amax(-1), -blocks.amin(-1), out=scales)
        shares = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        bits = shares.bfloat16().view(torch.int16).flatten().int().add_(2**15)
        codes.copy_(self.places.index_select(0, bits).view(codes.shape))


class Adam8:
    """AdamW whose moments are bytes, with one fp32 scale for every block of a row.

    Args:
        weights: those that have a block (see `block_of`), on one device.
    """

    def __init__(self, weights: Sequence[Weight], betas: tuple[float, float], epsilon: float) -> None:
        self.weights, self.betas, self.epsilon = weights, betas, epsilon
        self.state = {weight.name: self._start(weight) for weight in weights}
        device = weights[0].part.device
        self.codes = {"exp_avg": Code(True, device), "exp_avg_sq": Code(False, device)}

    @staticmethod
    def _start(weight: Weight) -> dict[str, Tensor]:
        block = block_of(weight)
        assert block is not None
        *rows, last = weight.master.shape
        *own_rows, own_last = weight.part.shape
        state = {"step": torch.zeros(())}
        for moment, zero in (("exp_avg", 127), ("exp_avg_sq", 0)):
            codes = torch.full_like(weight.part, zero, dtype=torch.uint8)
            scales = weight.part.new_zeros(*own_rows, own_last // block)
            state[moment] = beside(codes, weight.master)
            state[f"{moment}_scale"] = beside(scales, weight.master, (*rows, last // block))
        return state

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], rate: float) -> None:
        """See `danlu.train.optimizing.rules.Rule`."""
        for weight in self.weights:
            if weight.name in gradients:
                self._learn(weight, gradients[weight.name], rate * weight.factor)

    def _learn(self, weight: Weight, gradient: Tensor, rate: float) -> None:
        state = {name: local(tensor) for name, tensor in self.state[weight.name].items()}
        count = float(state["step"].add_(1))
        if not weight.part.numel():
            return  # more processes than rows
        first, second = (code.decode(state[moment], state[f"{moment}_scale"]) for moment, code in self.codes.items())
        fast, slow = self.betas
        first.lerp_(gradient, 1 - fast)
        second.mul_(slow).addcmul_(gradient, gradient, value=1 - slow)
        for values, (moment, code) in zip((first, second), self.codes.items(), strict=True):
            code.encode(values, state[moment], state[f"{moment}_scale"])
        weight.shrink(rate)
        root = second.sqrt_().div_(math.sqrt(1 - slow**count)).add_(self.epsilon)
        weight.part.addcdiv_(first, root, value=-rate / (1 - fast**count))
