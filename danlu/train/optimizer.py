"""The optimizer: fp32 master weights, whatever precision the model computes in and however it is spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from danlu.errors import DanluError
from danlu.train.groups import Group, group_weights
from danlu.train.optimizing.adam8 import Adam8, block_of
from danlu.train.optimizing.parts import Weight, fill, local
from danlu.train.optimizing.rules import Adafactor, Elementwise, Muon, Rule
from danlu.train.optimizing.settings import OptimizerSettings

NORM_PIECE = 2**16  # numbers whose squares are summed in fp32; the sum of 28 million is off by 7e-4 on a CPU


class Optimizer:
    """Weights, and the rules that update them.

    A parameter that is fp32 is its own master. A bf16 parameter is a rounded copy of its master: each of its
    gradients is added to the master's as soon as backward has made it, so micro-batches sum in fp32, and the copy is
    refreshed after the step.

    A step is a function of the state, the gradients and the learning rate. Clipping and what processes must agree on
    come before it (`gradients`, `square_sum`, `clip`).

    Args:
        masters: name -> fp32 parameter to optimise; plain, or a DTensor of which this process holds a part.
        copies: name -> the bf16 parameter of the model that follows the master of that name.
        groups: how each weight learns (see `group_weights`); by default as if `masters` were the whole model.

    Attributes:
        updates: int64 scalar, how many steps were made; gradual unfreezing counts them.
    """

    def __init__(
        self,
        masters: dict[str, Tensor],
        copies: dict[str, nn.Parameter],
        settings: OptimizerSettings,
        groups: Mapping[str, Group] | None = None,
    ) -> None:
        self.masters, self.copies, self.settings = masters, copies, settings
        self.groups = group_weights(masters, settings) if groups is None else groups
        self.parts = {name: local(master) for name, master in masters.items()}
        self.rules = _rules([self._weight(name) for name in masters], self.groups, settings)
        self.updates = torch.zeros((), dtype=torch.int64)
        for name, copy in copies.items():
            copy.register_post_accumulate_grad_hook(_hand_over(masters[name]))

    def _weight(self, name: str) -> Weight:
        group = self.groups[name]
        decay = (self.settings.weight_decay or 0.0) if group.decays else 0.0
        return Weight(name, self.masters[name], self.parts[name], group.factor, decay)

    def gradients(self) -> dict[str, Tensor]:
        """The fp32 gradients gathered since `zero`, of masters that have one and learn at this step.

        Each lies as its master does; parts that processes still had to add up have been.
        """
        now = int(self.updates)
        found = {}
        for name, master in self.masters.items():
            thaw = self.groups[name].thaw
            if master.grad is None or thaw is None or thaw > now:
                continue
            found[name] = master.grad = _laid(master.grad, master)
        return found

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One update with the gradients as they are. Penalties are added to them."""
        for name, master in self.masters.items():
            self.parts[name].data = local(master)  # FSDP may move a parameter at its first forward
        gradients = {name: local(gradient) for name, gradient in self.gradients().items()}
        self._penalise(gradients)
        for rule in self.rules:
            rule.step(gradients, learning_rate)
        self.updates += 1
        self.refresh()

    def _penalise(self, gradients: Mapping[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            if self.groups[name].decays:
                if self.settings.l1:
                    gradient.add_(self.parts[name].sign(), alpha=self.settings.l1)
                if self.settings.l2:
                    gradient.add_(self.parts[name], alpha=self.settings.l2)

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the masters into their copies."""
        for name, copy in self.copies.items():
            copy.copy_(self.masters[name])

    def zero(self) -> None:
        """Forget the gradients."""
        for master in self.masters.values():
            master.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as named tensors that share storage: masters, moments, counts.

        It is complete before the first step, and so says what a checkpoint must hold. What is spread are DTensors that
        lie as their masters do; the others are the same on all processes that hold a part of the weight.
        """
        saved: dict[str, Tensor] = {f"master.{name}": tensor.detach() for name, tensor in self.masters.items()}
        for rule in self.rules:
            for name, state in rule.state.items():
                saved |= {f"{kind}.{name}": tensor for kind, tensor in state.items()}
        return saved | {"updates": self.updates}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take up where `state` left off, on any plan: each tensor may be whole, or spread in any way.

        Raises DanluError, naming the first, where a tensor is missing or its shape differs.
        """
        for name, target in self.state().items():
            if name not in saved:
                fix = "resume with the model and the optimizer that the checkpoint was written with"
                raise DanluError(f"the checkpoint has no {name}", fix=fix)
            fill(name, target, saved[name])
        self.refresh()


def _rules(weights: Sequence[Weight], groups: Mapping[str, Group], settings: OptimizerSettings) -> list[Rule]:
    """The rules that settings ask for, each with its weights; none without."""
    turned = [weight for weight in weights if groups[weight.name].muon]
    small = [weight for weight in weights if settings.state == "8bit" and block_of(weight) is not None]
    apart = {weight.name for weight in (*turned, *small)}
    rest = [weight for weight in weights if weight.name not in apart]
    betas, epsilon = settings.betas or (0.0, 0.0), settings.epsilon or 0.0
    rules: list[Rule] = []
    if turned:
        rules.append(Muon(turned, settings.momentum or 0.0, bool(settings.nesterov)))
    if small:
        rules.append(Adam8(small, betas, epsilon))
    if rest:
        rules.append(Adafactor(rest) if settings.name == "adafactor" else _elementwise(rest, settings))
    return rules


def _elementwise(weights: Sequence[Weight], settings: OptimizerSettings) -> Elementwise:
    """torch.optim's optimizer of that name."""
    momentum = settings.momentum or 0.0
    kept = ("momentum_buffer",) if momentum else ()
    options: dict[str, Any] = {}
    if settings.name == "sgd":
        options = {"momentum": momentum, "nesterov": bool(settings.nesterov)}
        return Elementwise(weights, torch.optim.SGD, kept, False, options)
    options = {"eps": settings.epsilon}
    if settings.name == "adagrad":
        return Elementwise(weights, torch.optim.Adagrad, ("sum",), False, options)
    if settings.name == "rmsprop":
        options |= {"alpha": settings.smoothing, "momentum": momentum}
        return Elementwise(weights, torch.optim.RMSprop, ("square_avg", *kept), False, options)
    options |= {"betas": settings.betas, "fused": True}
    return Elementwise(weights, torch.optim.AdamW, ("exp_avg", "exp_avg_sq"), True, options)


def square_sum(gradients: Mapping[str, Tensor]) -> Tensor:
    """The sum of squares of what this process holds of the gradients, an fp64 scalar."""
    parts = [local(gradient) for gradient in gradients.values()]
    if not parts:
        return torch.zeros((), dtype=torch.float64)
    pieces = [piece for part in parts for piece in part.flatten().split(NORM_PIECE)]
    return torch.stack(torch._foreach_norm(pieces)).double().square().sum()


def clip(gradients: Mapping[str, Tensor], norm: float, limit: float) -> None:
    """Scale gradients of this finite norm, in place, so that it is at most the limit. A process may have none."""
    if norm > limit and gradients:
        torch._foreach_mul_([local(gradient) for gradient in gradients.values()], limit / norm)


def _laid(gradient: Tensor, master: Tensor) -> Tensor:
    """A gradient spread as its master is."""
    if isinstance(gradient, DTensor) and isinstance(master, DTensor) and gradient.placements != master.placements:
        return gradient.redistribute(placements=master.placements)
    return gradient


def _hand_over(master: Tensor) -> Callable[[Tensor], None]:
    """A hook that moves a copy's finished gradient to its master."""

    def hook(copy: Tensor) -> None:
        assert copy.grad is not None
        master.grad = copy.grad.float() if master.grad is None else master.grad.add_(copy.grad)
        copy.grad = None

    return hook


def masters_of(model: nn.Module, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, nn.Parameter]]:
    """A model's trainable fp32 parameters as masters and, where it computes in bf16, the rounded copies it keeps.

    With `dtype` bf16 every trainable parameter becomes a bf16 copy of its master.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if dtype == torch.float32:
        return dict(trainable), {}
    masters: dict[str, Tensor] = {name: parameter.detach() for name, parameter in trainable.items()}
    for name, parameter in trainable.items():
        parameter.data = masters[name].to(dtype)
    return masters, trainable
