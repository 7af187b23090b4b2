"""What numbers of few bits need: a factor that keeps the gradients of fp16 from vanishing, and float8's products."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec

import torch
from pydantic import Field
from torch import Tensor, nn

from danlu.errors import DanluError, need_extra
from danlu.settings import Settings
from danlu.train.optimizing.parts import local


class ScalingSettings(Settings):
    """How the factor on the loss follows the gradients (fp16; arXiv:1710.03740, section 3.2)."""

    start: float = Field(2.0**16, gt=0, description="the factor of the first step")
    growth: float = Field(2.0, gt=1, description="what it is multiplied by after enough steps without an overflow")
    backoff: float = Field(0.5, gt=0, lt=1, description="what it is multiplied by after an overflow")
    every: int = Field(2000, gt=0, description="steps without an overflow after which it grows")
    least: float = Field(2.0**-14, gt=0, description="a factor below this stops the run: its gradients are no numbers")


class LossScale:
    """The factor on the loss of a step, the same on all processes, as torch.amp.GradScaler moves it.

    Attributes:
        factor: fp32 scalar. Powers of 2 change no digit of a gradient.
        good: int32 scalar, steps since the factor last changed.
    """

    def __init__(self, settings: ScalingSettings | None = None) -> None:
        self.settings = settings or ScalingSettings()
        self.factor = torch.tensor(self.settings.start, dtype=torch.float32)
        self.good = torch.zeros((), dtype=torch.int32)

    @torch.no_grad()
    def unscale(self, gradients: Mapping[str, Tensor], norm: float) -> float:
        """Divide gradients by the factor, in place; returns their norm.

        Args: norm: of the scaled gradients, over all processes. Where it is not finite, nothing is worth dividing.
        """
        factor = float(self.factor)
        if math.isfinite(norm) and gradients:
            torch._foreach_mul_([local(gradient) for gradient in gradients.values()], 1 / factor)
        return norm / factor

    @torch.no_grad()
    def update(self, overflow: bool) -> None:
        """Take in how a step went. Args: overflow: the gradient, summed over all processes, was not finite.

        Raises DanluError where the factor has become so small that overflow cannot be its fault.
        """
        if overflow:
            self.factor *= self.settings.backoff
            self.good.zero_()
            if float(self.factor) < self.settings.least:
                what = f"gradients are not finite even where the loss is multiplied by {float(self.factor):.3g}"
                raise DanluError(what, where="fp16", fix="lower the learning rate, or compute in bf16 or fp32")
        elif int(self.good.add_(1)) == self.settings.every:
            grown = self.factor * self.settings.growth
            if bool(torch.isfinite(grown)):
                self.factor.copy_(grown)
            self.good.zero_()

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as named tensors that share storage."""
        return {"loss_scale": self.factor, "loss_scale.good": self.good}


def require_float8() -> None:
    """Raise DanluError where float8 cannot be computed in here: hardware or torchao is missing."""
    found = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if found is None or found < (8, 9):
        here = "there is no CUDA GPU" if found is None else f"this GPU has {found[0]}.{found[1]}"
        what = f"float8 needs a GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell), and {here}"
        raise DanluError(what, where="precision", fix="set precision to bf16")
    if find_spec("torchao") is None:
        raise need_extra("torchao", "float8")


def to_float8(model: nn.Module, emulated: bool = False) -> None:
    """Let the linear layers of a model multiply in float8, forward and backward, each tensor scaled as it comes.

    To be called before weights are laid out over processes. Their names and the weights themselves stay. Routers stay
    as they are, as do layers whose sizes float8's matrix units cannot take: no multiples of 16.

    Args:
        emulated: round to float8 and multiply in full precision, on any hardware: to see what the rounding does.

    Raises DanluError where torchao or the hardware is missing.
    """
    if not emulated:
        require_float8()
    float8 = import_module("torchao.float8")
    # Padded for batches whose tokens are no multiple of 16.
    config = float8.Float8LinearConfig(pad_inner_dim=True, emulate=emulated)
    float8.convert_to_float8_training(model, module_filter_fn=_fits_float8, config=config)


def _fits_float8(module: nn.Module, name: str) -> bool:
    # Which expert is chosen hangs on small differences.
    if not isinstance(module, nn.Linear) or name.endswith("router"):
        return False
    return module.in_features % 16 == 0 and module.out_features % 16 == 0
