"""Settings of tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from danlu.settings import Settings, Share

Compile = Literal["auto", "on", "off"]
LINEAR_LAYERS = ("blocks.*.attention.*", "blocks.*.feedforward.*")


class TuneSettings(Settings):
    """How the model learns."""

    method: Literal["lora", "dora", "full", "partial"] = Field(
        "lora",
        description="train thin adapters beside frozen weights (with dora, also the lengths of the weights' rows), all"
        " weights, or those that train and freeze choose",
    )
    rank: int = Field(16, gt=0, description="rank of the adapters (lora, dora)")
    alpha: float = Field(32.0, gt=0, description="the adapters' output is scaled by alpha / rank (lora, dora)")
    dropout: Share = Field(
        0.0, ge=0, lt=1, description="share of the adapters' inputs dropped in training (lora, dora)"
    )
    targets: tuple[str, ...] = Field(
        LINEAR_LAYERS,
        min_length=1,
        description="globs over the names of the linear layers that get an adapter (lora, dora)",
    )
    train: tuple[str, ...] = Field(
        (), description='globs over the names of the weights that learn, as in "blocks.2?.*"; default all (partial)'
    )
    freeze: tuple[str, ...] = Field((), description="globs over the names of weights that do not learn (partial)")
    epochs: float = Field(1.0, gt=0, description="passes over the training rows, unless steps says how long")
    steps: int | None = Field(None, gt=0, description="optimizer steps; by default as many as the epochs need")
    batch_rows: int = Field(4, gt=0, description="packed rows an optimizer step learns from")
    micro_rows: int | None = Field(
        None, gt=0, description="rows computed at once; fewer take less memory, and the sum is the same; default all"
    )
    learning_rate: float = Field(5e-4, gt=0, description="the highest learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="how the learning rate falls")
    warmup: Share = Field(0.05, ge=0, lt=1, description="share of the steps over which the learning rate rises from 0")
    final_share: Share = Field(0.1, ge=0, le=1, description="the last learning rate, as a share of the highest")
    weight_decay: float = Field(0.01, ge=0, description="decoupled decay of matrices; norms and biases have none")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's memory of gradients and of their squares")
    epsilon: float = Field(1e-8, gt=0, description="AdamW's floor under the root of the squares")
    clip: float = Field(1.0, gt=0, description="the largest norm of the gradient; longer ones are scaled down")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="of the computation; master weights are fp32; auto takes bf16 where it measures faster"
    )
    compile: Compile = Field(
        "auto", description="compile each block; auto does where the run is long enough to win back the time it takes"
    )
    checkpoint_steps: int = Field(10, gt=0, description="steps between checkpoints to resume from")
    keep_checkpoints: int = Field(2, gt=0, description="how many of the last checkpoints are kept while tuning")

    @model_validator(mode="after")
    def _partial_is_chosen(self) -> TuneSettings:
        named = [name for name in ("train", "freeze") if getattr(self, name)]
        if self.method == "partial" and not named:
            raise ValueError("method partial needs train or freeze: globs over the names of weights")
        if self.method != "partial" and named:
            raise ValueError(f"{' and '.join(named)} choose weights for method partial; method is {self.method}")
        return self

    @model_validator(mode="after")
    def _micro_divides(self) -> TuneSettings:
        if self.micro_rows is not None and self.batch_rows % self.micro_rows:
            raise ValueError(f"batch_rows {self.batch_rows} is no multiple of micro_rows {self.micro_rows}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")
        return self
