"""A teacher behind a server is asked once about every row, and what it says is kept as an artifact to learn from.

Where the server scores prompts (`echo` with `logprobs`: vLLM, danlu serve), it is asked what it thinks of the text;
where it does not (llama.cpp), it goes on with the beginnings of the text's rows, and its answers become the rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from danlu.artifact import WORK, Artifact, Figures, build, canonical, figure, only_writer, write_json
from danlu.compress.learning.endpoint import Refused
from danlu.compress.learning.reading import Said, other_words
from danlu.compress.learning.served import Teacher, check_words
from danlu.console import progress, say, warn
from danlu.data.corpus import Crops
from danlu.data.permutation import shuffled
from danlu.data.stream import IGNORED, Batch
from danlu.data.told import ABOUT, HELDOUT, NOTHING, TRAIN, VERSION, RowFile, ToldRows, row_type, words_digest
from danlu.errors import DanluError

TOGETHER = 8  # rows a request
MOST_NUMBERS = 2**19  # log probabilities a request, at most: 15 MB of JSON
Rows = npt.NDArray[np.void]  # of `danlu.data.told.row_type`


@dataclass(frozen=True)
class Question:
    """What a teacher is asked about.

    Attributes:
        train, heldout: rows as they stand, cut from a text; without the latter there is no figure of the teacher.
        rows, heldout_rows: how many; those to learn from are drawn by chance.
        seed: of that draw, and of the teacher's.
    """

    train: Crops
    heldout: Crops | None
    rows: int
    heldout_rows: int
    seed: int

    @property
    def drawn(self) -> npt.NDArray[np.int64]:
        """The numbers of the rows to learn from, each once."""
        count = min(self.rows, len(self.train))
        return np.sort(shuffled(np.arange(count), len(self.train), self.seed)[1])


def ask(teacher: Teacher, question: Question, root: Path) -> Artifact:
    """Make ROOT/teacher-..., the directory of what a teacher says, or go on making it, or find it made.

    Raises DanluError where the server cannot be reached or its tokens are not the student's.
    """
    how = "scored" if teacher.scores else "written"
    window = question.train.window
    settings = {"model": teacher.endpoint.model, "most": teacher.most, "how": how, "window": window}
    drawn = question.drawn
    settings |= {"rows": len(drawn), "heldout_rows": question.heldout_rows, "seed": question.seed}
    shards = [shard.sha256 for crops in (question.train, question.heldout) if crops for shard in crops.tokens.shards]
    text = hashlib.sha256(canonical(shards).encode()).hexdigest()
    inputs = {"text": text, "words": words_digest(teacher.reader.tokenizer)}

    def fill(draft: Path) -> Figures:
        (draft / WORK).mkdir(exist_ok=True)
        if teacher.scores:
            check_words(teacher, question.train)
        columns = {TRAIN: min(teacher.most + 1, teacher.reader.words)}
        make = scored_rows if teacher.scores else written_rows
        _fetch(draft / TRAIN, question.train, drawn, columns[TRAIN], partial(make, teacher, seed=question.seed))
        if question.heldout is not None and teacher.scores:
            columns[HELDOUT] = 1  # the text's own word
            chosen = np.arange(question.heldout_rows)
            _fetch(draft / HELDOUT, question.heldout, chosen, 1, partial(scored_rows, replace(teacher, most=1)))
        about = {"version": VERSION, "window": window, "most": columns, "teacher": teacher.endpoint.model, "how": how}
        write_json(draft / ABOUT, about | {"words": inputs["words"], "url": teacher.endpoint.url})
        return _figures(draft / TRAIN, row_type(window, columns[TRAIN]))

    with only_writer(root, wait=False):
        made, _ = build(root, "teacher", settings=settings, inputs=inputs, code=f"told {VERSION}", fill=fill)
    if teacher.unplaced:
        warn(f"teacher: {teacher.unplaced:,} words it named are none of the student's; they count among all others")
    return made


# --- Rows -----------------------------------------------------------------------------------------------------------


def scored_rows(teacher: Teacher, batch: Batch, most: int, seed: int = 0) -> Rows:
    """Rows of a text, each segment as a prompt of its own: the teacher sees what the student will.

    Args: most: columns; seed: of what is drawn by chance, which here is nothing.
    """
    rows = _plain(batch, most)
    spans = [span for row in rows for span in _spans(row)]
    if not spans:
        return rows
    prompts = [ids for _, _, ids in spans]
    for (row, first, ids), said in zip(spans, teacher.score(prompts), strict=True):
        rest = int(teacher.options["max_tokens"])
        if said is None or len(said) != len(ids) + rest:
            what = f"answers with {len(said or ()):,} tokens to a prompt of {len(ids):,}"
            raise DanluError(what, where=teacher.endpoint.url)
        for place, (token, one) in enumerate(zip(ids[1:], said[1:], strict=False), start=first):
            if one.token not in (None, token):
                raise other_words(teacher.endpoint.url, f"it takes {token} for {one.token}")
            if row["targets"][place] != IGNORED:
                _note(row, place, token, one, teacher.endpoint.url)
    return rows


def written_rows(teacher: Teacher, batch: Batch, most: int, seed: int) -> Rows:
    """The first half of each row of a text, and what the teacher goes on with, which alone is learned."""
    rows = _plain(batch, most)
    window = batch.tokens.shape[1]
    prompts = [row["tokens"][: max(1, int((row["segments"] > 0).sum()) // 2)].tolist() for row in rows]
    answers = teacher.write(prompts, window + 1 - max(map(len, prompts)), seed)
    for row, prompt, said in zip(rows, prompts, answers, strict=True):
        if said is None:
            raise DanluError("an answer has no logprobs", where=teacher.endpoint.url)
        known = next((number for number, one in enumerate(said) if one.token is None), len(said))
        whole = prompt + [one.token for one in said[:known]]
        row["tokens"], row["targets"], row["segments"] = 0, IGNORED, 0
        count = min(len(whole), window)
        row["tokens"][:count], row["segments"][:count] = whole[:count], 1
        for place, one in enumerate(said[:known], start=len(prompt) - 1):
            row["targets"][place] = whole[place + 1]
            _note(row, place, whole[place + 1], one, teacher.endpoint.url)
    return rows


def _plain(batch: Batch, most: int) -> Rows:
    """The rows of a batch before anything is known of them."""
    rows = np.zeros(len(batch.tokens), row_type(batch.tokens.shape[1], most))
    for name in ("tokens", "targets", "segments"):
        rows[name] = getattr(batch, name).numpy()
    rows["logprobs"] = NOTHING
    return rows


def _spans(row: np.void) -> list[tuple[np.void, int, list[int]]]:
    """The row, the place where a segment of it begins, and its tokens with the one behind it that is to be learned."""
    found = []
    for number in range(1, int(row["segments"].max()) + 1):
        places = np.flatnonzero(row["segments"] == number)
        last = int(row["targets"][places[-1]])
        ids = row["tokens"][places].tolist() + ([] if last == IGNORED else [last])
        if len(ids) > 1:
            found.append((row, int(places[0]), ids))
    return found


def _note(row: np.void, place: int, token: int, said: Said, where: str) -> None:
    """Put down what was said of one place, the likeliest first, the word that stands there among them."""
    if not said.logprobs:
        raise DanluError("leaves places without logprobs", where=where)
    ranked = sorted(said.logprobs, key=lambda one: (-said.logprobs[one], one))
    columns = row["ids"].shape[1]
    kept = ranked[:columns]
    if token in said.logprobs and token not in kept:
        kept[-1] = token
    row["ids"][place] = kept + kept[:1] * (columns - len(kept))
    row["logprobs"][place, : len(kept)] = [said.logprobs[one] for one in kept]


# --- Files ----------------------------------------------------------------------------------------------------------


def _fetch(
    place: Path, source: Crops, numbers: npt.NDArray[np.int64], columns: int, make: Callable[[Batch, int], Rows]
) -> None:
    """Ask about rows, some at a time, into a file that is in its place once it is whole.

    Raises DanluError where the server refuses a request.
    """
    if place.exists():
        return
    together = max(1, min(TOGETHER, MOST_NUMBERS // (source.window * (columns + 1))))
    unfinished = place.parent / WORK / place.name
    with (
        closing(RowFile(unfinished, source.window, columns)) as file,
        progress(f"teacher: {place.stem}", len(numbers), "rows") as tick,
    ):
        if file.rows:
            say(f"teacher: {file.rows:,} of {len(numbers):,} rows are here")
        tick.advance(file.rows)
        while file.rows < len(numbers):
            chosen = numbers[file.rows : file.rows + together]
            try:
                file.append(make(source.batch(chosen), columns))
            except Refused as refused:
                raise DanluError(f"the server refuses rows: {refused}", where=f"teacher: {place.stem}") from None
            tick.advance(len(chosen))
    unfinished.rename(place)


def _figures(file: Path, kind: np.dtype[np.void]) -> Figures:
    """What there is to learn from, and how much of the teacher's probability its named words have."""
    rows = np.memmap(file, kind, mode="r")
    places, named = 0, 0.0
    for row in rows:
        learned = row["targets"] != IGNORED
        places += int(learned.sum())
        named += float(np.exp(row["logprobs"][learned].astype(np.float64)).sum())
    if not places:
        raise DanluError("the teacher wrote nothing", where=file)
    share = figure(named / places, "share", by="probability of the words that the teacher named")
    return {"rows": figure(len(rows), "rows"), "tokens": figure(places, "tokens"), "named": share}


def teacher_losses(rows: ToldRows) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Of each held-out row the sum of the teacher's losses, in nat, and how many targets they are of."""
    batch = rows.batch(np.arange(len(rows)))
    assert batch.logprobs is not None
    learned = batch.targets != IGNORED
    sums = -batch.logprobs[..., 0].double().where(learned, 0.0).sum(1)
    return sums.numpy(), learned.sum(1).numpy()
