"""Rows with labels: classes of texts and of words, places of answers, and values, each with its figures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from danlu.data.batch import Batches
from danlu.data.datasets import LabelledText, Question, TaggedWords, names_of
from danlu.data.encoding import Encoded, Limit
from danlu.data.labelled import (
    LabelBatch,
    LabelledRows,
    encode_questions,
    span_rows,
    tagged_rows,
    text_rows,
    value_rows,
)
from danlu.data.memory import Ragged
from danlu.data.row_files import RowSide, labelled_texts, questions, tagged_words
from danlu.data.rows_settings import RowsSettings
from danlu.data.stream import IGNORED
from danlu.errors import DanluError, one_of
from danlu.model.transformer import Model
from danlu.plan.plan import Plan
from danlu.tokenizer import Tokenizer
from danlu.train.mesh import Mesh
from danlu.train.objective import Labels, Loss, Regression, Spans, StackObjective, label_logits
from danlu.train.recipe import ObjectiveSettings, TrainRecipe
from danlu.train.replica import Replica
from danlu.train.tasks.quality import accuracy, answer_scores, correlations, entity_f1, macro_f1
from danlu.train.tasks.rows import (
    check_rows_plan,
    identity_of,
    make_stream,
    measured,
    measured_steps,
    measured_stream,
    row_tokenizer,
)
from danlu.train.tasks.teacher import check_teacher, taught

PREDICTION = 1  # the turn of a learner that predicts; its turn 0 is the loss
LONGEST_ANSWER = 30  # tokens, as in BERT's evaluation on SQuAD
Predicted = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Side:
    """One side of the rows.

    Attributes:
        examples: as they were read.
        rows: the same in tokens.
        encoded: the same with where each token stands, where figures need that.
    """

    examples: Sequence[Any]
    rows: LabelledRows
    encoded: list[Encoded] | None = None


class Kind(ABC):
    """What one kind of label is about: reading, minimising, choosing, and judging what was chosen.

    Attributes:
        head: see `danlu.train.tasks.task.Task`.
        names: of the labels; none for places and values.
    """

    head: ClassVar[str]

    def __init__(self, data: RowsSettings, asked: ObjectiveSettings) -> None:
        self.data, self.asked = data, asked
        self.limit = Limit(data.limit, data.truncate, "row")
        self.names: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Numbers that `choose` gives for a row, at most."""
        return 1

    @property
    def keys(self) -> dict[str, Any]:
        """The labels as Hugging Face's configurations name them."""
        numbered = enumerate(self.names)
        return {"id2label": {str(number): name for number, name in numbered}} if self.names else {}

    @abstractmethod
    def read(self, side: RowSide) -> Sequence[Any]:
        """The examples of a side."""

    @abstractmethod
    def texts(self, examples: Sequence[Any]) -> Iterator[str]:
        """All texts of some examples, for a vocabulary to be learned from."""

    @abstractmethod
    def encode(self, tokenizer: Tokenizer, examples: Sequence[Any]) -> Side:
        """Examples as rows."""

    @abstractmethod
    def objective(self) -> StackObjective:
        """What is minimised."""

    @abstractmethod
    def choose(self, logits: Tensor, batch: LabelBatch) -> Tensor:
        """What the model says of each row, [B] or [B, up to `width`]."""

    @abstractmethod
    def figures(self, side: Side, numbers: Sequence[int], predicted: Predicted) -> dict[str, float]:
        """How good choices are.

        Args: numbers: of the rows they are for; predicted: fp64 [rows, width].
        """


class Classification(Kind):
    """One label a row."""

    head = "sequence"

    def read(self, side: RowSide) -> Sequence[LabelledText]:
        return labelled_texts(self.data, side)

    def texts(self, examples: Sequence[LabelledText]) -> Iterator[str]:
        return (text for one in examples for text in (one.text, one.second) if text)

    def encode(self, tokenizer: Tokenizer, examples: Sequence[LabelledText]) -> Side:
        return Side(examples, text_rows(tokenizer, examples, self.names, self.limit))

    def objective(self) -> StackObjective:
        return Labels(_class_weights(self.asked, self.names), self.asked.smoothing, self.asked.z)

    def choose(self, logits: Tensor, batch: LabelBatch) -> Tensor:
        return logits.argmax(-1)

    def figures(self, side: Side, numbers: Sequence[int], predicted: Predicted) -> dict[str, float]:
        wanted = [side.examples[number].label for number in numbers]
        found = [self.names[int(one)] for one in predicted[:, 0]]
        return {"accuracy": accuracy(wanted, found), "macro_f1": macro_f1(wanted, found)}


class TokenClassification(Kind):
    """One label a word, which its first token bears."""

    head = "tokens"

    @property
    def width(self) -> int:
        return self.data.limit

    def read(self, side: RowSide) -> Sequence[TaggedWords]:
        return tagged_words(self.data, side)

    def texts(self, examples: Sequence[TaggedWords]) -> Iterator[str]:
        return (self.data.joiner.join(one.words) for one in examples)

    def encode(self, tokenizer: Tokenizer, examples: Sequence[TaggedWords]) -> Side:
        return Side(examples, tagged_rows(tokenizer, examples, self.names, self.limit, self.data.joiner))

    def objective(self) -> StackObjective:
        return Labels(_class_weights(self.asked, self.names), self.asked.smoothing, self.asked.z)

    def choose(self, logits: Tensor, batch: LabelBatch) -> Tensor:
        return logits.argmax(-1)

    def figures(self, side: Side, numbers: Sequence[int], predicted: Predicted) -> dict[str, float]:
        """Of words that have a token of their own; what was cut off counts for neither side."""
        assert isinstance(side.rows.labels, Ragged)
        wanted, found = [], []
        for number, row in zip(numbers, predicted, strict=True):
            labels = side.rows.labels[number]
            places = np.flatnonzero(labels != IGNORED)
            wanted.append([self.names[label] for label in labels[places]])
            found.append([self.names[int(label)] for label in row[places]])
        right = accuracy(list(chain(*wanted)), list(chain(*found)))
        return {"accuracy": right, **entity_f1(wanted, found)}


class QuestionAnswering(Kind):
    """Where in a passage an answer stands."""

    head = "span"

    @property
    def width(self) -> int:
        return 2

    def read(self, side: RowSide) -> Sequence[Question]:
        return questions(self.data, side)

    def texts(self, examples: Sequence[Question]) -> Iterator[str]:
        passages = dict.fromkeys(one.passage for one in examples)  # many questions share one
        return chain(passages, (one.question for one in examples))

    def encode(self, tokenizer: Tokenizer, examples: Sequence[Question]) -> Side:
        encoded = encode_questions(tokenizer, examples, self.limit)
        return Side(examples, span_rows(encoded, examples), encoded)

    def objective(self) -> StackObjective:
        return Spans()

    def choose(self, logits: Tensor, batch: LabelBatch) -> Tensor:
        """The likeliest start and end [B, 2] within the passage that are in order and not too far apart."""
        assert batch.segments is not None
        within = batch.segments > 0 if batch.types is None else batch.types > 0
        start, end = logits.float().masked_fill(~within[..., None], float("-inf")).unbind(-1)
        length = logits.shape[1]
        ordered = torch.ones(length, length, dtype=torch.bool, device=logits.device).triu().tril(LONGEST_ANSWER - 1)
        together = (start[:, :, None] + end[:, None, :]).masked_fill(~ordered, float("-inf"))
        best = together.flatten(1).argmax(-1)
        return torch.stack((best // length, best % length), -1)

    def figures(self, side: Side, numbers: Sequence[int], predicted: Predicted) -> dict[str, float]:
        assert side.encoded is not None
        wanted, found = [], []
        for number, (first, last) in zip(numbers, predicted.astype(np.int64).tolist(), strict=True):
            asked, places = side.examples[number], side.encoded[number].places
            wanted.append(asked.answers or (asked.passage[asked.begin : asked.end],))
            found.append(asked.passage[places[first][0] : places[last][1]] if last < len(places) else "")
        return answer_scores(wanted, found)


class Values(Kind):
    """A number for each row."""

    head = "sequence"

    @property
    def keys(self) -> dict[str, Any]:
        return {"num_labels": 1}

    def read(self, side: RowSide) -> Sequence[LabelledText]:
        return labelled_texts(self.data, side)

    def texts(self, examples: Sequence[LabelledText]) -> Iterator[str]:
        return (text for one in examples for text in (one.text, one.second) if text)

    def encode(self, tokenizer: Tokenizer, examples: Sequence[LabelledText]) -> Side:
        return Side(examples, value_rows(tokenizer, examples, self.limit))

    def objective(self) -> StackObjective:
        return Regression()

    def choose(self, logits: Tensor, batch: LabelBatch) -> Tensor:
        return logits[:, 0]

    def figures(self, side: Side, numbers: Sequence[int], predicted: Predicted) -> dict[str, float]:
        assert isinstance(side.rows.labels, np.ndarray)
        return correlations(side.rows.labels[list(numbers)].astype(np.float64), predicted[:, 0])


KINDS: dict[str, type[Kind]] = {
    "classification": Classification,
    "token_classification": TokenClassification,
    "question_answering": QuestionAnswering,
    "regression": Values,
}


@dataclass(frozen=True)
class Prediction:
    """What a model says of a batch's rows, where a loss would stand: so that whoever gathers its weights does."""

    objective: StackObjective
    choose: Callable[[Tensor, LabelBatch], Tensor]

    def __call__(self, model: Model, batch: LabelBatch) -> Loss:
        """`sum` is what was chosen."""
        return Loss(self.choose(label_logits(model, self.objective.hidden(model, batch), batch), batch), 0)


@dataclass(frozen=True)
class LabelTask:
    """Rows with labels. For its attributes and methods see `danlu.train.tasks.task.Task`."""

    settings: TrainRecipe
    data: RowsSettings
    kind: Kind
    tokenizer: Tokenizer
    learned: Sequence[Any]
    batch: type = LabelBatch

    @property
    def identity(self) -> Any:
        return identity_of(self.data, self.tokenizer)

    @property
    def keys(self) -> dict[str, Any]:
        return {"vocab_size": self.tokenizer.vocab_size, **self.kind.keys}

    @property
    def head(self) -> str:
        return self.kind.head

    @property
    def length(self) -> int:
        return self.data.limit

    def check(self, plan: Plan) -> None:
        check_rows_plan(plan, self.settings.objective.kind)
        check_teacher(self.settings.objective, plan)

    def objectives(self, mesh: Mesh) -> list[Any]:
        hard = self.kind.objective()
        learned = taught(hard, self.settings.objective, mesh.device) if isinstance(hard, Labels) else hard
        return [learned, Prediction(hard, self.kind.choose)]

    def stream(self, mesh: Mesh) -> Batches:
        return make_stream(self.kind.encode(self.tokenizer, self.learned).rows, self.settings, mesh)

    def heldout(self, mesh: Mesh) -> Iterator[Any] | None:
        return measured(self._heldout.rows, self.settings, mesh) if self.data.heldout else None

    def quality(self, replica: Replica) -> dict[str, float]:
        if not self.data.heldout:
            return {}
        mesh, rows = replica.mesh, self._heldout.rows
        whole = measured_stream(rows, self.settings, Mesh())
        numbers = [int(row) for step in range(measured_steps(rows, self.settings)) for row in whole.indices(step)]
        table = torch.zeros(len(numbers), self.kind.width, dtype=torch.float64)
        share = self.settings.batch.rows // mesh.plan.readers
        for step, batch in enumerate(measured(rows, self.settings, mesh)):
            first = step * self.settings.batch.rows + mesh.reader * share
            parts = batch.to(mesh.device).split(mesh.plan.micro_batches)
            for part in parts:
                _put(table[first:], replica.learners[0](part, PREDICTION)[0])
                first += len(part.labels)
        replica.reshard()
        copies = mesh.world // mesh.plan.readers
        return self.kind.figures(self._heldout, numbers, (mesh.sum(table) / copies).numpy())

    def test(self, model: Model) -> dict[str, float]:
        if not self.data.test:
            return {}
        side = self.kind.encode(self.tokenizer, self.kind.read("test"))
        together, predict = self.settings.test.rows, Prediction(self.kind.objective(), self.kind.choose)
        table = torch.zeros(len(side.rows), self.kind.width, dtype=torch.float64)
        for first in range(0, len(table), together):
            batch = side.rows.take(np.arange(first, min(first + together, len(table))))
            _put(table[first:], predict(model, batch.to(next(model.parameters()).device)).sum)
        return self.kind.figures(side, range(len(table)), table.numpy())

    @cached_property
    def _heldout(self) -> Side:
        return self.kind.encode(self.tokenizer, self.kind.read("heldout"))


def make_label_task(settings: TrainRecipe, data: RowsSettings, home: Path) -> LabelTask:
    """The task of a recipe on rows with labels. The labels are those of the rows to train on."""
    kind = KINDS[settings.objective.kind](data, settings.objective)
    learned = kind.read("train")
    if not learned:
        raise DanluError("there are no rows to learn from", where=", ".join(data.train))
    if kind.head != "span" and not isinstance(kind, Values):
        kind.names = names_of(learned)
    tokenizer = row_tokenizer(settings, data, home, kind.texts(learned))
    return LabelTask(settings, data, kind, tokenizer, learned)


def _class_weights(asked: ObjectiveSettings, names: Iterable[str]) -> tuple[float, ...] | None:
    known = list(names)
    for name in asked.weights:
        if name not in known:
            what = f"there is no label {name!r} to weigh"
            raise DanluError(what, where="objective.weights", fix=one_of(name, known))
    return tuple(asked.weights.get(name, 1.0) for name in known) if asked.weights else None


def _put(table: Tensor, rows: Tensor) -> None:
    """Write what was chosen for some rows into the first lines of a table."""
    flat = rows.double().cpu().reshape(len(rows), -1)
    table[: len(flat), : min(flat.shape[1], table.shape[1])] = flat[:, : table.shape[1]]
