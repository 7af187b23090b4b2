"""Rows of two texts: one to read and one to write, or two that belong together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from danlu.console import progress
from danlu.data.batch import Batches
from danlu.data.datasets import Pair
from danlu.data.encoding import Limit
from danlu.data.pairs import PairBatch, PairRows, TextPairRows, TextPairs, pair_rows, text_pair_rows
from danlu.data.row_files import RowSide, text_pairs
from danlu.data.rows_settings import RowsSettings
from danlu.errors import DanluError
from danlu.model.beam import beam_search
from danlu.model.checkpoint import StoredModel
from danlu.model.config import EncoderDecoderConfig
from danlu.model.transformer import EncoderDecoder, Model
from danlu.plan.plan import Plan
from danlu.tokenizer import Tokenizer
from danlu.train.mesh import Mesh
from danlu.train.objective import Words
from danlu.train.objectives.contrastive import Contrastive, gather_rows
from danlu.train.recipe import TrainRecipe
from danlu.train.replica import Replica
from danlu.train.tasks.quality import translation_scores
from danlu.train.tasks.rows import check_rows_plan, identity_of, make_stream, measured, row_tokenizer
from danlu.train.tasks.teacher import check_teacher, taught


@dataclass(frozen=True)
class PairTask:
    """Texts to read with texts to write. For its attributes and methods see `danlu.train.tasks.task.Task`.

    Attributes:
        start: the id that every answer begins with.
    """

    settings: TrainRecipe
    data: RowsSettings
    tokenizer: Tokenizer
    start: int
    learned: Sequence[Pair]
    batch: type = PairBatch
    head: str = "words"

    @property
    def identity(self) -> Any:
        return identity_of(self.data, self.tokenizer)

    @property
    def keys(self) -> dict[str, Any]:
        begins = {"pad_token_id": self.start, "decoder_start_token_id": self.start}
        return {"vocab_size": self.tokenizer.vocab_size, **begins}

    @property
    def length(self) -> int:
        return max(self.data.limit, self._written)

    def check(self, plan: Plan) -> None:
        check_rows_plan(plan, self.settings.objective.kind)
        check_teacher(self.settings.objective, plan)

    def objectives(self, mesh: Mesh) -> list[Any]:
        asked = self.settings.objective
        return [taught(Words(asked.smoothing, asked.z), asked, mesh.device)]

    def stream(self, mesh: Mesh) -> Batches:
        return make_stream(self._rows(self.learned), self.settings, mesh)

    def heldout(self, mesh: Mesh) -> Iterator[Any] | None:
        return measured(self._heldout, self.settings, mesh) if self.data.heldout else None

    def quality(self, replica: Replica) -> dict[str, float]:
        """Nothing but the loss: writing every answer out is left to the end."""
        return {}

    def test(self, model: Model) -> dict[str, float]:
        """BLEU and chrF of what the model writes for every row of the test side, rows of like length together."""
        if not self.data.test:
            return {}
        assert isinstance(model, EncoderDecoder)
        asked, pairs = self.settings.test, text_pairs(self.data, "test")
        source = self._rows(pairs).source
        order = sorted(range(len(pairs)), key=lambda number: len(source[number]))
        answers = [""] * len(pairs)
        with progress("test: writing", len(pairs), "answers") as tick:
            for first in range(0, len(order), asked.rows):
                some = order[first : first + asked.rows]
                said = beam_search(
                    model,
                    [source[number].tolist() for number in some],
                    beams=asked.beams,
                    max_new_tokens=self._written,
                    stop_ids=self.tokenizer.stop_ids,
                    length_penalty=asked.length_penalty,
                )
                for number, ids in zip(some, said, strict=True):
                    answers[number] = self.tokenizer.decode(ids).strip()
                tick.advance(len(some))
        return translation_scores([second for _, second in pairs], answers, asked.tokenize)

    @property
    def _written(self) -> int:
        return self.data.limit if self.data.written is None else self.data.written

    @cached_property
    def _heldout(self) -> PairRows:
        return self._rows(text_pairs(self.data, "heldout"))

    def _rows(self, pairs: Sequence[Pair]) -> PairRows:
        limits = (
            Limit(tokens, self.data.truncate, name)
            for tokens, name in ((self.data.limit, "text to read"), (self._written, "text to write"))
        )
        return pair_rows(self.tokenizer, pairs, self.start, *limits)


@dataclass(frozen=True)
class ContrastTask:
    """Texts that belong together. For its attributes and methods see `danlu.train.tasks.task.Task`."""

    settings: TrainRecipe
    data: RowsSettings
    tokenizer: Tokenizer
    learned: Sequence[Pair]
    batch: type = TextPairs
    head: str = "embedding"

    @property
    def identity(self) -> Any:
        return identity_of(self.data, self.tokenizer)

    @property
    def keys(self) -> dict[str, Any]:
        return {"vocab_size": self.tokenizer.vocab_size}

    @property
    def length(self) -> int:
        return self.data.limit

    def check(self, plan: Plan) -> None:
        check_contrast_plan(plan)

    def objectives(self, mesh: Mesh) -> list[Any]:
        asked = self.settings.objective
        gather = gather_rows() if mesh.plan.readers > 1 else None
        temperature = 0.05 if asked.temperature is None else asked.temperature
        return [Contrastive(temperature, asked.symmetric, None, gather)]

    def stream(self, mesh: Mesh) -> Batches:
        return make_stream(self._rows(self.learned), self.settings, mesh)

    def heldout(self, mesh: Mesh) -> Iterator[Any] | None:
        return measured(self._heldout, self.settings, mesh) if self.data.heldout else None

    def quality(self, replica: Replica) -> dict[str, float]:
        return {}

    def test(self, model: Model) -> dict[str, float]:
        if self.data.test:
            what = "texts that belong together have no figure but the loss"
            raise DanluError(what, where="data.test", fix="leave it out")
        return {}

    @cached_property
    def _heldout(self) -> TextPairRows:
        return self._rows(text_pairs(self.data, "heldout"))

    def _rows(self, pairs: Sequence[Pair]) -> TextPairRows:
        return text_pair_rows(self.tokenizer, pairs, Limit(self.data.limit, self.data.truncate))


def make_pair_task(settings: TrainRecipe, data: RowsSettings, home: Path) -> PairTask:
    """The task of a recipe on texts to read and to write."""
    learned, tokenizer = _prepared(settings, data, home)
    start = tokenizer.pad_id or 0
    if settings.model.base is not None:
        config = StoredModel.open(settings.model.base).config
        start = config.start if isinstance(config, EncoderDecoderConfig) else start
    return PairTask(settings, data, tokenizer, start, learned)


def check_contrast_plan(plan: Plan) -> None:
    """Raise DanluError where a plan parts rows that are to be compared."""
    check_rows_plan(plan, "contrastive")
    if plan.micro_batches > 1 or plan.tensor > 1:
        what = "the rows of a batch are compared with one another, whole and on every process once"
        raise DanluError(what, where="plan", fix="use data and shard, with micro_batches=1")


def make_contrast_task(settings: TrainRecipe, data: RowsSettings, home: Path) -> ContrastTask:
    """The task of a recipe on texts that belong together."""
    learned, tokenizer = _prepared(settings, data, home)
    return ContrastTask(settings, data, tokenizer, learned)


def _prepared(settings: TrainRecipe, data: RowsSettings, home: Path) -> tuple[Sequence[Pair], Tokenizer]:
    side: RowSide = "train"
    learned = text_pairs(data, side)
    if not learned:
        raise DanluError("there are no rows to learn from", where=", ".join(data.train))
    return learned, row_tokenizer(settings, data, home, (text for pair in learned for text in pair))
