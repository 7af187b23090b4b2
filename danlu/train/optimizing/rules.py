"""Update rules: from the gradients of one step to new weights, in place.

A rule holds some of the weights and their state. It works on what this process holds of each; a rule whose update needs
more than that asks the other processes, and makes the same update as one process alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from danlu.train.optimizing.parts import Weight, beside, cuts, local, own, whole

# Rounds of x <- a x + (b x x^T + c (x x^T)^2) x; steep at 0, at the price of singular values that end only near 1.
ROUNDS, A, B, C = 5, 3.4445, -4.7750, 2.0315
RMS = 0.2  # of an update by Muon, about that of AdamW, so that both take the same learning rate and decay


class Rule(Protocol):
    """What updates some of the weights.

    Attributes:
        state: weight -> name -> tensor, complete from the start. What is spread lies as its weight does; the others are
            the same on all processes that hold a part of the weight.
    """

    state: dict[str, dict[str, Tensor]]

    def step(self, gradients: Mapping[str, Tensor], rate: float) -> None:
        """Update the weights that have a gradient; the others and their state stay as they are.

        Args:
            gradients: weight -> this process's part of its gradient, fp32; also those of other rules' weights.
            rate: the learning rate before factors.
        """
        ...


class Elementwise:
    """One of torch.optim's optimizers, whose update of a weight needs nothing of any other.

    Args:
        kind: the optimizer.
        moments: names of its state tensors that are shaped like the weight and start at 0.
        fused: AdamW's own kernel, which keeps its counts on the device.
        options: of the optimizer, but for the learning rate and the decay.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        kind: type[torch.optim.Optimizer],
        moments: Sequence[str],
        fused: bool,
        options: Mapping[str, Any],
    ) -> None:
        self.weights = weights
        self.decays = kind is torch.optim.AdamW  # in its kernel
        chosen = sorted(weights, key=_pace)
        groups = [
            {
                "params": [weight.part for weight in group],
                "factor": factor,
                "weight_decay": decay if self.decays else 0.0,
            }
            for (factor, decay), group in ((pace, list(found)) for pace, found in groupby(chosen, _pace))
        ]
        self.inner = kind(groups, lr=0.0, **options)  # type: ignore[call-arg]
        counted = kind is not torch.optim.SGD
        self.state: dict[str, dict[str, Tensor]] = {}
        for weight in weights:
            state = {moment: weight.zeros() for moment in moments}
            if counted:
                state["step"] = torch.zeros((), device=weight.part.device if fused else "cpu")
            self.state[weight.name] = state
            self.inner.state[weight.part] = {name: local(tensor) for name, tensor in state.items()}

    def step(self, gradients: Mapping[str, Tensor], rate: float) -> None:
        """See `Rule`."""
        for weight in self.weights:
            weight.part.grad = gradients.get(weight.name)
            if weight.part.grad is not None and not self.decays:
                weight.shrink(rate * weight.factor)
        for group in self.inner.param_groups:
            group["lr"] = rate * group["factor"]
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)


def _pace(weight: Weight) -> tuple[float, float]:
    return weight.factor, weight.decay


class Muon:
    """Momentum whose update of a matrix is made orthogonal (Jordan 2024; arXiv:2502.16982).

    The momentum lies as the weight does. A matrix that is spread is put together by the processes of its mesh, each of
    which makes another one orthogonal; the experts of a bank [experts, out, in] are matrices of their own.

    Args:
        weights: [out, in] or [experts, out, in].
        momentum, nesterov: of the average of gradients, and whether the newest counts once more.
    """

    def __init__(self, weights: Sequence[Weight], momentum: float, nesterov: bool) -> None:
        self.momentum, self.nesterov = momentum, nesterov
        # Matrices of like size come together, so that processes that take turns have as much to do.
        self.weights = sorted(weights, key=lambda weight: weight.master.numel())
        self.state = {weight.name: {"momentum_buffer": weight.zeros()} for weight in weights}

    def step(self, gradients: Mapping[str, Tensor], rate: float) -> None:
        """See `Rule`."""
        learning = [weight for weight in self.weights if weight.name in gradients]
        for weight in learning:
            local(self.state[weight.name]["momentum_buffer"]).lerp_(gradients[weight.name], 1 - self.momentum)
        alone = [weight for weight in learning if _is_alone(weight.master)]
        for weight in alone:
            _turn(weight, orthogonalize(self._update(weight, gradients)), rate)
        for turn in _turns([weight for weight in learning if not _is_alone(weight.master)]):
            self._share(turn, gradients, rate)

    def _update(self, weight: Weight, gradients: Mapping[str, Tensor]) -> Tensor:
        """This process's part of what is made orthogonal, bf16."""
        average = local(self.state[weight.name]["momentum_buffer"])
        update = gradients[weight.name].lerp(average, self.momentum) if self.nesterov else average
        return update.bfloat16()

    def _share(self, turn: Sequence[Weight], gradients: Mapping[str, Tensor], rate: float) -> None:
        """Update at most as many matrices as there are processes, each of which makes one of them orthogonal."""
        mesh, dim = _line(turn[0].master)
        place, group = mesh.get_local_rank(dim), mesh.get_group(dim)
        mine: Tensor | None = None
        for number, weight in enumerate(turn):
            update = whole(beside(self._update(weight, gradients), weight.master))
            if number == place:
                mine = orthogonalize(update).contiguous()
        for number, weight in enumerate(turn):
            made = mine if number == place and mine is not None else None
            if made is None:
                made = torch.empty(weight.master.shape, dtype=torch.bfloat16, device=weight.part.device)
            dist.broadcast(made, group=group, group_src=number)
            _turn(weight, own(made, weight.master), rate)


def _turn(weight: Weight, direction: Tensor, rate: float) -> None:
    """Move a weight along this process's part of an orthogonal matrix."""
    rate = rate * weight.factor
    weight.shrink(rate)
    weight.part.add_(direction, alpha=-rate * RMS * math.sqrt(max(weight.master.shape[-2:])))


def _is_alone(master: Tensor) -> bool:
    """Whether this process holds whole matrices of it that others do not: all of them, or a share of a bank."""
    if not isinstance(master, DTensor):
        return True
    return cuts(master, -2, -1) == 1 and cuts(master, 0) > 1


def _line(master: Tensor) -> tuple[Any, int]:
    """The mesh of a tensor that is spread, and its longest dimension."""
    assert isinstance(master, DTensor)
    sizes = list(master.device_mesh.shape)
    return master.device_mesh, sizes.index(max(sizes))


def _turns(weights: Sequence[Weight]) -> Iterator[Sequence[Weight]]:
    """Runs of weights on one mesh, of at most as many as its longest dimension has processes."""
    for mesh in dict.fromkeys(_line(weight.master) for weight in weights):
        alike = [weight for weight in weights if _line(weight.master) == mesh]
        size = mesh[0].size(mesh[1])
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def orthogonalize(matrices: Tensor) -> Tensor:
    """The matrices [..., out, in] with singular values of about 1 (0.7 to 1.2) in place of their own, bf16.

    A Newton-Schulz iteration (Jordan 2024); singular values below a thousandth of the largest come out smaller.
    """
    x = matrices.bfloat16()
    *stack, outputs, inputs = x.shape
    x = x.reshape(-1, outputs, inputs)
    if outputs > inputs:
        x = x.mT
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return (x.mT if outputs > inputs else x).reshape(*stack, outputs, inputs)


class Adafactor:
    """Second moments kept as means of rows and of columns, and updates of limited size (arXiv:1804.04235).

    As in torch.optim, the floor stands under the estimate of a square, not in the means. The moments of a weight are
    kept whole by every process that holds a part of it: they are small. A weight is put together while it is updated.
    """

    POWER, CLIP, LEAST = (
        -0.8,
        1.0,
        1e-3,
    )  # of the memory's growth; the largest RMS of an update; of the weight's own RMS

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.weights = weights
        self.state = {weight.name: self._start(weight) for weight in weights}

    @staticmethod
    def _start(weight: Weight) -> dict[str, Tensor]:
        *stack, last = weight.master.shape or (1,)
        new = weight.part.new_zeros
        if not stack:
            moments = {"variance": new(weight.master.shape)}
        else:
            moments = {"row_var": new(*stack, 1), "col_var": new(*stack[:-1], 1, last)}
        return moments | {"step": torch.zeros(())}

    def step(self, gradients: Mapping[str, Tensor], rate: float) -> None:
        """See `Rule`."""
        for weight in self.weights:
            if weight.name in gradients:
                self._learn(weight, whole(beside(gradients[weight.name], weight.master)), rate * weight.factor)

    def _learn(self, weight: Weight, gradient: Tensor, rate: float) -> None:
        state = self.state[weight.name]
        count = float(state["step"].add_(1))
        size = _rms(whole(weight.master.detach())).clamp(min=self.LEAST)
        weight.shrink(rate)
        update = self._estimate(state, gradient.square(), count**self.POWER).rsqrt_().mul_(gradient)
        update.mul_(-min(rate, count**-0.5) * size / (_rms(update) / self.CLIP).clamp(min=1.0))
        weight.part.add_(own(update, weight.master))

    @staticmethod
    def _estimate(state: dict[str, Tensor], squares: Tensor, new: float) -> Tensor:
        """The running mean of squared gradients, whole; `new` is the share of the newest."""
        floor = torch.finfo(squares.dtype).eps
        if "variance" in state:
            return state["variance"].lerp_(squares, new).clamp(min=floor**2)
        rows = state["row_var"].lerp_(squares.mean(-1, keepdim=True), new)
        columns = state["col_var"].lerp_(squares.mean(-2, keepdim=True), new)
        return (rows @ columns).div_(rows.mean(-2, keepdim=True).clamp_(min=floor)).clamp_(min=floor**2)


def _rms(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor) / math.sqrt(tensor.numel())
