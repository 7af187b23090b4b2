"""What all tasks on rows in memory share: their vocabulary, the rows of a step, and those that are measured."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from danlu.artifact import hash_file
from danlu.data.memory import AlikeStream, MeasurableRows, MemoryRows, MemoryStream
from danlu.data.rows_settings import RowsSettings
from danlu.data.vocabulary import learn_vocabulary
from danlu.errors import DanluError
from danlu.model.checkpoint import find_checkpoint
from danlu.plan.plan import Plan
from danlu.tokenizer import Tokenizer
from danlu.train.mesh import Mesh
from danlu.train.recipe import TrainRecipe

TOKENIZER = "tokenizer"
MULTIPLE = 8  # rows are padded to a multiple of so many tokens


def row_tokenizer(settings: TrainRecipe, data: RowsSettings, home: Path, texts: Iterable[str]) -> Tokenizer:
    """The base's tokenizer, or one that is learned from the texts once and stands in the run's directory."""
    if settings.model.base is not None:
        return Tokenizer.load(find_checkpoint(settings.model.base))
    folder = home / TOKENIZER
    if not folder.exists():
        assert data.vocabulary is not None
        aside = home / f".{TOKENIZER}.aside"
        shutil.rmtree(aside, ignore_errors=True)
        learn_vocabulary(data.vocabulary, texts).save(aside)
        aside.rename(folder)
    return Tokenizer.load(folder)


def identity_of(data: RowsSettings, tokenizer: Tokenizer) -> Any:
    """What decides the rows to learn from, JSON-able: the files' hashes, how they are read, and the vocabulary."""
    read = data.model_dump(mode="json", exclude={"train", "heldout", "test", "vocabulary"})
    files = [hash_file(Path(file)) for file in data.train]
    return {"files": files, "read": read, "vocabulary": tokenizer.fingerprint}


def check_rows_plan(plan: Plan, kind: str) -> None:
    """Raise DanluError where a plan needs rows that are all of one length."""
    cuts = [name for name in ("pipeline", "context") if getattr(plan, name) > 1]
    if cuts:
        what = f"{' and '.join(cuts)} need rows of text that are all of one length; those of {kind} are not"
        raise DanluError(what, where="plan", fix="use data, shard, tensor or expert")
    if plan.tensor > 1 and plan.sequence and MULTIPLE % plan.tensor:
        what = f"rows are padded to a multiple of {MULTIPLE} tokens, which tensor={plan.tensor} cannot share out"
        raise DanluError(what, where="plan", fix="use tensor=2, 4 or 8, or sequence=false")


def make_stream(rows: MeasurableRows[Any], settings: TrainRecipe, mesh: Mesh) -> AlikeStream[Any]:
    """This process's rows of every step, epoch after epoch in new orders. Raises DanluError where they fill none."""
    count, wanted = len(rows), settings.batch.rows
    if count < wanted:
        what = f"{count:,} rows are fewer than the {wanted:,} of a batch"
        raise DanluError(what, where="data.train", fix="add rows, or lower batch.rows")
    batch, mine = settings.batch, (mesh.reader, mesh.plan.readers)
    return AlikeStream(rows, batch.rows, settings.seed, batch.alike, *mine)


def measured_steps(rows: Sequence[Any] | MemoryRows[Any], settings: TrainRecipe) -> int:
    """How many batches of rows are measured, the same under any plan. Raises DanluError where there is none."""
    together = settings.batch.rows
    count = min(settings.validation.rows, len(rows)) // together
    if not count:
        what = f"a measurement needs {together} rows, as many as a step, and there are {len(rows)} held out"
        raise DanluError(what, where="validation.rows", fix="hold out more, or lower batch.rows")
    return count


def measured_stream(rows: MemoryRows[Any], settings: TrainRecipe, mesh: Mesh) -> MemoryStream[Any]:
    """All rows of a side in an order of chance, in which a measurement takes the first."""
    return MemoryStream(rows, settings.batch.rows, settings.seed, mesh.reader, mesh.plan.readers)


def measured(rows: MemoryRows[Any], settings: TrainRecipe, mesh: Mesh) -> Iterator[Any]:
    """This process's part of the rows that are measured: drawn evenly, since files are often sorted by label."""
    stream = measured_stream(rows, settings, mesh)
    return (stream.batch(step) for step in range(measured_steps(rows, settings)))
