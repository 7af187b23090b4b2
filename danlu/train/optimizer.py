"""AdamW over fp32 master weights, whatever precision the model computes in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from danlu.train.settings import TuneSettings


class MasterAdamW:
    """AdamW (arXiv:1711.05101) whose weights, moments and summed gradients are fp32.

    A parameter that is fp32 is its own master. A bf16 parameter is a rounded copy of its master: each of its
    gradients is added to the master's as soon as backward has made it, so micro-batches sum in fp32, and the copy is
    refreshed after the step.

    Args:
        masters: name -> fp32 parameter to optimise.
        copies: name -> the bf16 parameter of the model that follows the master of that name.
    """

    def __init__(self, masters: dict[str, Tensor], copies: dict[str, nn.Parameter], settings: TuneSettings) -> None:
        self.masters, self.copies, self.clip = masters, copies, settings.clip
        matrices = [tensor for name, tensor in masters.items() if _decays(name, tensor)]
        others = [tensor for name, tensor in masters.items() if not _decays(name, tensor)]
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.inner = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.epsilon,
            fused=True,
        )
        for name, copy in copies.items():
            copy.register_post_accumulate_grad_hook(_hand_over(masters[name]))

    def step(self, learning_rate: float) -> float:
        """One update with the gradients gathered since the last; returns their norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.masters.values(), self.clip)
        for group in self.inner.param_groups:
            group["lr"] = learning_rate
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, copy in self.copies.items():
                copy.copy_(self.masters[name])
        return float(norm)

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as named tensors: masters, both moments, steps taken."""
        saved = {f"master.{name}": tensor.detach() for name, tensor in self.masters.items()}
        for name, tensor in self.masters.items():
            for moment, value in self.inner.state[tensor].items():
                saved[f"{moment}.{name}"] = value
        return saved

    def load(self, saved: dict[str, Tensor]) -> None:
        """Take up where `state` left off. Raises KeyError or RuntimeError where the tensors are not these."""
        with torch.no_grad():
            for name, tensor in self.masters.items():
                tensor.copy_(saved[f"master.{name}"])
                self.inner.state[tensor] = {
                    moment: saved[f"{moment}.{name}"].clone() for moment in ("step", "exp_avg", "exp_avg_sq")
                }
            for name, copy in self.copies.items():
                copy.copy_(self.masters[name])


def _decays(name: str, tensor: Tensor) -> bool:
    """Matrices do. A bank of experts stacks biases and magnitudes, which are vectors all the same."""
    return tensor.dim() >= 2 and not name.endswith(("bias", "lora_magnitude"))


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
