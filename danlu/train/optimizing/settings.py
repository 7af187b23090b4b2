"""Settings of the optimizer and of the learning rate over a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from danlu.settings import Settings, Share

Choices = Mapping[str, Mapping[str, object]]  # a choice -> the fields that act on it alone, with their defaults

ADAM = {"betas": (0.9, 0.95), "epsilon": 1e-8}
RULES: Choices = {
    "sgd": {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0},
    "adagrad": {"epsilon": 1e-10, "weight_decay": 0.0},
    "rmsprop": {"smoothing": 0.99, "momentum": 0.0, "epsilon": 1e-8, "weight_decay": 0.0},
    "adam": ADAM | {"state": "fp32", "mup_base_width": None},
    "adamw": ADAM | {"state": "fp32", "mup_base_width": None, "weight_decay": 0.01},
    "muon": ADAM | {"momentum": 0.95, "nesterov": True, "weight_decay": 0.01, "muon": ("*blocks.*",)},
    "adafactor": {"weight_decay": 0.0},
}
SHAPES: Choices = {
    "constant": {},
    "linear": {"final_share": 0.1},
    "cosine": {"final_share": 0.1},
    "exponential": {"final_share": 0.1},
    "step": {"milestones": (0.5, 0.75), "drop": 0.1},
    "inverse_sqrt": {},
    "wsd": {"final_share": 0.1, "fall": 0.1},
    "plateau": {"final_share": 0.0, "drop": 0.5, "patience": 3, "threshold": 1e-4},
}


def _filled(given: object, field: str, default: str, choices: Choices) -> object:
    """Settings with the defaults of the choice that `field` names.

    Raises ValueError where a field is set that does nothing with that choice.
    """
    if not isinstance(given, dict) or given.get(field, default) not in choices:
        return given  # the field's own type says what is wrong
    chosen: str = given.get(field, default)
    own = choices[chosen]
    for name in given.keys() - own.keys():
        owners = [choice for choice, fields in choices.items() if name in fields]
        if owners and given[name] is not None:
            raise ValueError(f"{name} has no effect where {field} is {chosen}; it belongs to {', '.join(owners)}")
    return {**own, **{name: value for name, value in given.items() if value is not None or name not in own}}


class OptimizerSettings(Settings):
    """How weights follow their gradients."""

    name: Literal["sgd", "adagrad", "rmsprop", "adam", "adamw", "muon", "adafactor"] = Field(
        "adamw",
        description="the update rule; muon learns matrices inside blocks and leaves the rest to adamw, adafactor keeps"
        " sums of rows and columns in place of a value a weight",
    )
    learning_rate: float = Field(5e-4, gt=0, description="the highest learning rate")
    momentum: float | None = Field(
        None, ge=0, lt=1, description="memory of past gradients (sgd, rmsprop: default 0; muon: 0.95)"
    )
    nesterov: bool | None = Field(
        None, description="look one step ahead along the momentum (sgd: default off; muon: on)"
    )
    smoothing: float | None = Field(None, ge=0, lt=1, description="memory of squared gradients (rmsprop; default 0.99)")
    betas: tuple[float, float] | None = Field(
        None, description="memory of gradients and of their squares (adam, adamw, muon; default 0.9 and 0.95)"
    )
    epsilon: float | None = Field(
        None, gt=0, description="floor under the root of the squares (default 1e-8; adagrad 1e-10)"
    )
    weight_decay: float | None = Field(
        None,
        ge=0,
        description="decoupled decay: each step takes this share, times the learning rate, of every weight that decays"
        " (default 0.01 for adamw and muon, otherwise 0)",
    )
    l1: float = Field(0.0, ge=0, description="penalty on the sizes of weights that decay, through the gradient")
    l2: float = Field(0.0, ge=0, description="penalty on half their squares, through the gradient")
    clip: float | None = Field(
        1.0, gt=0, description="the largest norm of the gradient; longer ones are scaled down; null for any length"
    )
    decay: tuple[str, ...] = Field(
        (), description="globs over the names of weights that decay besides matrices, as in blocks.*.bias"
    )
    no_decay: tuple[str, ...] = Field((), description="globs over the names of weights that do not decay")
    factors: dict[str, float] = Field(
        {}, description="glob over the names of weights -> what their learning rate is multiplied by"
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="every block's learning rate is that of the one above it times this; embeddings have the lowest",
    )
    mup_base_width: int | None = Field(
        None,
        gt=0,
        description="width of the model that the learning rate was found with; wider ones then learn as well with it"
        " (muP; adam, adamw)",
    )
    muon: tuple[str, ...] | None = Field(
        None, description="globs over the names of weights that muon learns where they are matrices (default *blocks.*)"
    )
    frozen: tuple[str, ...] = Field((), description="globs over the names of weights that never learn")
    thaw_steps: int | None = Field(
        None,
        gt=0,
        description="at first only the top block and what is above it learn, and one block more after every so many"
        " steps; embeddings come last",
    )
    state: Literal["fp32", "8bit"] | None = Field(
        None, description="number format of the moments of matrices (adam, adamw; default fp32)"
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="memory of a running average of the weights, which is evaluated and kept"
    )
    ema_warmup: bool = Field(
        False, description="weigh the average as if it had no start: its first value is a weight's own"
    )

    @model_validator(mode="before")
    @classmethod
    def _rule(cls, given: Any) -> Any:
        return _filled(given, "name", "adamw", RULES)

    @model_validator(mode="after")
    def _fit(self) -> OptimizerSettings:
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum")
        if self.ema_warmup and self.ema is None:
            raise ValueError("ema_warmup has no effect without ema")
        if not all(factor > 0 for factor in self.factors.values()):
            raise ValueError("factors must be more than 0; frozen names weights that do not learn")
        return self


class ScheduleSettings(Settings):
    """The learning rate over a run."""

    kind: Literal["constant", "linear", "cosine", "exponential", "step", "inverse_sqrt", "wsd", "plateau"] = Field(
        "cosine",
        description="how the learning rate falls after the rise; wsd holds it until the last part of the run, plateau"
        " until the validation loss stops falling",
    )
    warmup: Share = Field(0.05, ge=0, lt=1, description="share of the steps over which the learning rate rises from 0")
    final_share: Share | None = Field(
        None,
        ge=0,
        le=1,
        description="the last learning rate as a share of the highest (linear, cosine, exponential, wsd: default 0.1);"
        " the least there is (plateau: default 0)",
    )
    milestones: tuple[Share, ...] | None = Field(
        None, description="shares of the run after which the learning rate drops (step; default 0.5 and 0.75)"
    )
    drop: float | None = Field(
        None, gt=0, lt=1, description="what a drop multiplies it by (step: default 0.1; plateau: 0.5)"
    )
    fall: Share | None = Field(
        None,
        gt=0,
        le=1,
        description="the last share of the run, over which it falls in a straight line (wsd; default 0.1)",
    )
    patience: int | None = Field(
        None, ge=0, description="validations without a better loss that are put up with (plateau; default 3)"
    )
    threshold: float | None = Field(
        None, ge=0, lt=1, description="share by which a better loss is lower (plateau; default 1e-4)"
    )

    @model_validator(mode="before")
    @classmethod
    def _shape(cls, given: Any) -> Any:
        return _filled(given, "kind", "cosine", SHAPES)

    @model_validator(mode="after")
    def _fit(self) -> ScheduleSettings:
        if self.kind == "exponential" and self.final_share == 0:
            raise ValueError("an exponential fall never reaches 0; final_share must be more")
        if self.milestones is not None and not all(0 <= share <= 1 for share in self.milestones):
            raise ValueError(f"milestones {self.milestones} must lie between 0 and 1")
        if self.kind == "wsd" and self.fall is not None and self.warmup + self.fall > 1:
            raise ValueError(f"a rise of {self.warmup:.0%} and a fall of {self.fall:.0%} do not fit in one run")
        return self
