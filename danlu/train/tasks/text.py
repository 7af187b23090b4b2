"""Text by itself: the next token, hidden tokens, or hidden spans of one corpus or several."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danlu.data.batch import Batches
from danlu.data.corpus import Corpus, Crops, build_corpus, read_pieces
from danlu.data.corrupt import MaskedStream, Masking, SpanCorruption, SpanStream
from danlu.data.mixing import MixtureStream, growing
from danlu.data.pairs import PairBatch
from danlu.data.settings import Side
from danlu.data.stream import Batch
from danlu.data.text_settings import TextSettings
from danlu.data.told import ToldRows
from danlu.data.vocabulary import learn_vocabulary
from danlu.errors import DanluError
from danlu.model.transformer import Model
from danlu.plan.plan import Plan
from danlu.tokenizer import Tokenizer
from danlu.train.mesh import Mesh
from danlu.train.objective import Words
from danlu.train.recipe import TrainRecipe
from danlu.train.replica import Replica
from danlu.train.tasks.teacher import check_teacher, taught, told_rows

CORPUS = "corpus"
VOCABULARY = "vocabulary"  # that several corpora share


@dataclass(frozen=True)
class TextTask:
    """Rows cut out of corpora. For its attributes and methods see `danlu.train.tasks.task.Task`."""

    settings: TrainRecipe
    corpora: dict[str, Corpus]
    weights: dict[str, float] | None
    sentinels: int
    told: ToldRows | None = None  # learned from in place of the corpora's rows
    head: str = "words"

    @property
    def tokenizer(self) -> Tokenizer:
        return next(iter(self.corpora.values())).tokenizer

    @property
    def identity(self) -> Any:
        sides = {name: corpus.index["sides"]["train"] for name, corpus in self.corpora.items()}
        told = {} if self.told is None else {"told": self.told.digest}
        return {"corpora": sides, "weights": self.weights} | told

    @property
    def keys(self) -> dict[str, Any]:
        return {"vocab_size": self.tokenizer.vocab_size}

    @property
    def batch(self) -> type:
        return PairBatch if self.settings.objective.kind == "spans" else Batch

    @property
    def length(self) -> int:
        return self.settings.batch.window

    def check(self, plan: Plan) -> None:
        check_teacher(self.settings.objective, plan)

    def objectives(self, mesh: Mesh) -> list[Any]:
        asked = self.settings.objective
        return [taught(Words(asked.smoothing, asked.z), asked, mesh.device)]

    def stream(self, mesh: Mesh) -> Batches:
        batch, seed = self.settings.batch, self.settings.seed
        if self.told is not None:
            return MixtureStream({CORPUS: self.told}, batch.rows, None, mesh.reader, mesh.plan.readers)

        def rows_of(window: int, rows: int) -> MixtureStream:
            return self._mixed(mesh, self.crops("train", window, seed), rows)

        plain = growing(batch.growing, batch.rows * batch.window, rows_of) if batch.growing else None
        return self._corrupted(plain or rows_of(batch.window, batch.rows), mesh.reader)

    def heldout(self, mesh: Mesh) -> Iterator[Any] | None:
        if not sum(len(corpus.side("heldout")) for corpus in self.corpora.values()):
            return None
        rows, crops = self.settings.batch.rows, self.crops("heldout", self.settings.batch.window, None)
        weights = self.weights or {name: len(one) for name, one in crops.items()}
        whole = min(len(one) * sum(weights.values()) / weights[name] for name, one in crops.items())
        count = min(self.settings.validation.rows, int(whole)) // rows
        if not count:
            what = f"a measurement needs {rows} rows, as many as a step, and the held-out text has {int(whole)}"
            fix = "add text, hold out more of it, or lower batch.rows (--rows of a command)"
            raise DanluError(what, where="validation.rows", fix=fix)
        stream = self._corrupted(self._mixed(mesh, crops, rows), mesh.reader)
        return (stream.batch(step) for step in range(count))

    def quality(self, replica: Replica) -> dict[str, float]:
        return {}

    def test(self, model: Model) -> dict[str, float]:
        return {}

    def crops(self, side: Side, window: int, seed: int | None) -> dict[str, Crops]:
        """The rows of a side, by corpus; without a seed cut and ordered as they stand."""
        crossing = self.settings.batch.cross_documents
        return {name: Crops(one.side(side), window, seed, crossing) for name, one in self.corpora.items()}

    def _mixed(self, mesh: Mesh, crops: dict[str, Crops], rows: int) -> MixtureStream:
        return MixtureStream(crops, rows, self.weights, mesh.reader, mesh.plan.readers)

    def _corrupted(self, stream: Any, reader: int) -> Any:
        """The stream as the objective wants it."""
        objective, tokenizer, seed = self.settings.objective, self.tokenizer, self.settings.seed
        if objective.kind == "masked_tokens":
            if tokenizer.mask_id is None:
                fix = "vocabulary: {kind: wordpiece}, or special: [mask]"
                raise DanluError("the vocabulary has no mask token", where="data.vocabulary", fix=fix)
            how = Masking(tokenizer.mask_id, tokenizer.vocab_size, tokenizer.special_ids, objective.hidden)
            return MaskedStream(stream, how, seed, reader)
        if objective.kind == "spans":
            first = tokenizer.id_of("<extra_id_0>")
            if first is None or tokenizer.eos_id is None:
                fix = "vocabulary: {sentinels: 100}"
                raise DanluError("the vocabulary has no sentinels or no end token", where="data.vocabulary", fix=fix)
            spans = SpanCorruption(first, tokenizer.eos_id, 0, self.sentinels, objective.hidden, objective.span)
            return SpanStream(stream, spans, seed, reader)
        return stream


def make_text_task(settings: TrainRecipe, data: TextSettings, home: Path) -> TextTask:
    """The task of a recipe on text; its tokens are built once, in `home`."""
    folder = home / CORPUS
    places = {name: folder / name for name in data.corpora} or {CORPUS: folder}
    missing = [name for name, place in places.items() if not (place / "index.json").exists()]
    vocabulary = folder / VOCABULARY if data.corpora else None
    if missing and vocabulary is not None:
        texts = (piece.text for piece in read_pieces(data.all_sources, lambda *refused: None))
        learn_vocabulary(data.vocabulary, texts).save(vocabulary)
    for name in missing:
        sources = data.corpora[name].sources if data.corpora else data.sources
        build_corpus(data.one(sources, vocabulary), places[name])
    corpora = {name: Corpus.open(place) for name, place in places.items()}
    tokenizer = next(iter(corpora.values())).tokenizer
    return TextTask(settings, corpora, data.weights, _sentinels(corpora), told_rows(settings, tokenizer))


def _sentinels(corpora: dict[str, Corpus]) -> int:
    """How many tokens <extra_id_N> the vocabulary has."""
    tokenizer, count = next(iter(corpora.values())).tokenizer, 0
    while tokenizer.id_of(f"<extra_id_{count}>") is not None:
        count += 1
    return count
