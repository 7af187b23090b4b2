"""One file with models of many sizes in it, of which a device chooses one when it runs (`danlu.device.budget`).

The model is put in order and trained so that its first parts are models (`danlu.train.objectives.elastic`), then
written block by block. Every setting is cut out once and measured in the engine.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from danlu.artifact import CARD, Figures, code_version, figure, hash_file, make_card, peak_memory, write_json
from danlu.compress.learning.elastic_file import check_form, cut_of, name_of, write_whole
from danlu.compress.learning.supernet import in_order, sizes
from danlu.compress.learning.tuning import Tuning, beginning, heldout_rows, keep_to, prepare, tune
from danlu.console import progress, say, table
from danlu.data.stream import Batch
from danlu.device.battery import POLICY, read_policy, write_policy
from danlu.device.budget import CUTS, MODEL, TABLE, Elastic, Measured, Setting
from danlu.device.cores import usable_cores
from danlu.device.cut import Cut, write_cut
from danlu.device.engine import library
from danlu.device.measure import Document, Measurement, Request, measure
from danlu.device.stack import bytes_per_weight
from danlu.errors import DanluError
from danlu.evaluate.bootstrap import interval, paired_change
from danlu.model.checkpoint import Checkpoint, StoredModel
from danlu.model.config import ModelConfig
from danlu.model.gguf import all_metadata
from danlu.train.objectives.elastic import part_config, parts_of
from danlu.train.recipe import ElasticSettings

ASKED = "asked.json"  # what is made in a directory
MEASURED = "measured"  # settings that need not be measured again
SCORED = 16_384  # held-out tokens that every setting is measured on, at most
PROMPT, DECODED, REPEATS = 128, 64, 5  # of a setting's speed
CONTEXT = 1024  # tokens of keys and values in the memory that the card tells, or as many as the model can take


@dataclass(frozen=True)
class Made:
    """What came of it.

    Attributes:
        path: the directory.
        settings: the largest first.
        context: tokens of keys and values in the memory that is told.
        figures: of the card.
    """

    path: Path
    settings: tuple[Setting, ...]
    context: int
    figures: Figures

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return {"path": str(self.path), "figures": self.figures}


def make_elastic(
    model: Checkpoint, asked: ElasticSettings, type: str, tuning: Tuning, out: Path, threads: int | None = None
) -> Made:
    """Train a model whose parts are models, and leave one file that every part can be cut out of.

    OUT/model.gguf is the largest, OUT/elastic.json every setting, OUT/battery.yaml what may be lost at which charge,
    OUT/run the training, whose OUT/run/model is the model in full precision. The same command goes on where it was
    stopped.

    Args:
        asked: the sizes that the model may have besides its own; every combination is a setting.
        type: the number format of matrices in blocks, one of FORMS.
        threads: of the engine that measures; by default as many as are useful.

    Raises DanluError, before any work, where a setting cannot be cut out of such a file; and where OUT holds another
    one, or the text is too short.
    """
    begun, form = time.monotonic(), check_form(type)
    parts = parts_of(model.config, asked)[::-1]
    cuts = [cut_of(model.config, part, form) for part in parts]
    all_metadata(model.config, model.tokenizer)  # refuses now what could not be written in the end
    library()  # without the engine nothing can be measured
    settings = {"elastic": asked.plain(), "type": type, "tuning": vars(tuning)}
    resumed = (out / ASKED).is_file()
    with beginning(out):
        keep_to(out / ASKED, json.dumps({"model": model.digest, **settings}, indent=2) + "\n")
        recipe = tuning.recipe(in_order(model, out / "ordered"), {"elastic": asked.plain()}, "elastic")
        prepare(recipe, out / "run")
    whole = tune(recipe, out / "run")
    write_whole(whole, form, out / MODEL)
    shutil.rmtree(out / CUTS, ignore_errors=True)  # of a file that stood there before
    documents = choose_documents(heldout_rows(recipe, out / "run"))
    digest = hash_file(out / MODEL)
    notes = out / MEASURED / f"{digest[:16]}-{threads or usable_cores()}-threads"
    made = measure_settings(out / MODEL, parts, cuts, documents, notes, threads)
    found = Elastic(sha256=digest, context=model.config.context, settings=made)
    write_json(out / TABLE, found.model_dump(mode="json", exclude_none=True))
    if not (out / POLICY).is_file():
        write_policy(out / POLICY)
    policy, context = read_policy(out / POLICY), min(CONTEXT, model.config.context)
    card = make_card(
        "elastic", settings | {"policy": [step.plain() for step in policy]}, {"model": model.digest},
        code_version("compress/learning/elastic"), {"settings": {each.name: _told(each, context) for each in made}},
        {name: {"bytes": (out / name).stat().st_size, "sha256": hash_file(out / name)} for name in (MODEL, TABLE)},
        seconds=time.monotonic() - begun, memory=peak_memory(), resumed=resumed,
    )  # fmt: skip
    write_json(out / CARD, card)
    return Made(out, made, context, card["figures"])


# --- What each setting gives and takes ------------------------------------------------------------------------------


def choose_documents(rows: Sequence[Batch]) -> list[Document]:
    """Held-out rows taken apart into documents: all, or as many drawn evenly over them as make SCORED tokens."""
    apart = list(_documents(rows))
    count = min(len(apart), max(2, SCORED * len(apart) // max(sum(each.count for each in apart), 1)))
    return [apart[number] for number in np.linspace(0, len(apart) - 1, count).astype(int)]


def _documents(rows: Iterable[Batch]) -> Iterator[Document]:
    for batch in rows:
        for tokens, targets, segments in zip(batch.tokens, batch.targets, batch.segments, strict=True):
            for number in range(1, int(segments.max()) + 1):
                inside = segments == number
                document = Document(tokens[inside].tolist(), targets[inside].tolist())
                if document.count:
                    yield document


def measure_settings(
    model: Path,
    parts: Sequence[ModelConfig],
    cuts: Sequence[Cut | None],
    documents: Sequence[Document],
    notes: Path,
    threads: int | None = None,
) -> tuple[Setting, ...]:
    """Cut each setting out, check that it is the part that was trained, and measure it.

    Args:
        parts, cuts: of each setting; the whole comes first.
        notes: a folder with what was measured before, which is not measured again.
    """
    stored, counts = StoredModel.open(model).config, [document.count for document in documents]
    assert isinstance(stored, ModelConfig)
    notes.mkdir(parents=True, exist_ok=True)
    rows: list[Measurement] = []
    with (
        tempfile.TemporaryDirectory(prefix=".danlu-cut-", dir=model.parent) as folder,
        progress("measure", len(parts), "settings") as tick,
    ):
        for part, cut in zip(parts, cuts, strict=True):
            note, file = notes / f"{name_of(part)}.json", model
            if not note.is_file():
                if cut is not None:
                    file = Path(folder) / f"{name_of(part)}.gguf"
                    write_cut(model, cut, file)
                    _check_same(file, part_config(stored, *sizes(part)))
                write_json(note, asdict(measure_file(file, documents, part.context, threads)))
            rows.append(Measurement(**json.loads(note.read_text(encoding="utf-8"))))
            tick.advance(1, name_of(part))
    return tuple(
        _setting(part, cut, found, rows[0], counts) for part, cut, found in zip(parts, cuts, rows, strict=True)
    )


def _check_same(file: Path, part: ModelConfig) -> None:
    """Raises DanluError where a file says another model than a part."""
    if StoredModel.open(file).config != part:
        raise DanluError("says another model than the part that was trained", where=file, fix="take another base")


def measure_file(file: Path, documents: Sequence[Document], context: int, threads: int | None) -> Measurement:
    """Losses of documents, speed, memory and work of a file, in a process of its own."""
    joined = [token for document in documents for token in document.tokens]
    prompt = (joined * (PROMPT // len(joined) + 1))[:PROMPT]
    longest = max(len(document.tokens) for document in documents)
    room = min(max(CONTEXT, longest), context)
    return measure(Request(str(file), room, threads, prompt, DECODED, REPEATS, list(documents)))


def _setting(
    part: ModelConfig, cut: Cut | None, found: Measurement, whole: Measurement, counts: Sequence[int]
) -> Setting:
    """Args: counts: scored tokens of each held-out document."""
    shape = dict(zip(("layers", "heads", "channels", "width"), sizes(part), strict=True))
    by = f"llama.cpp, {sum(counts):,} held-out tokens in {len(counts)} documents, which are resampled"
    change = paired_change(whole.losses, found.losses, counts).relative
    energy = found.energy_figure()
    return Setting(
        name=name_of(part),
        **shape,
        file_bytes=found.file_bytes,
        token_bytes=round(2 * part.layers * part.kv_heads * part.head_width * bytes_per_weight("f16")),
        peak_memory=Measured(value=found.peak_memory, unit="byte", by="a whole process, Python and the engine in it"),
        loss=Measured(**interval(found.losses, counts).figure("nat/token", by)),
        loss_change=None if cut is None or change is None else Measured(**change.figure("share", f"paired; {by}")),
        decode=Measured(**found.decode_figure()),
        processor=Measured(**found.processor_figure()),
        energy=None if energy is None else Measured(**energy),
        cut=cut,
    )


def _told(setting: Setting, context: int) -> Figures:
    """A setting as figures of a card, its memory with keys and values of so many tokens."""
    kept = setting.model_dump(exclude_none=True, exclude={"name", "cut", "file_bytes", "token_bytes"})
    by = f"the file and keys and values of {context:,} tokens as f16"
    return {
        "file_size": figure(setting.file_bytes, "byte"),
        "memory": figure(setting.memory(context), "byte", by=by),
        **{name: about for name, about in kept.items() if isinstance(about, dict)},
    }


def print_made(made: Made) -> None:
    """The settings as a table."""
    unit = made.settings[0].cost.unit
    columns = ("setting", "MB", f"MB at {made.context:,}", "nat/token", "95 %", "token/s", unit)
    rows = [
        (
            *(each.name, f"{each.file_bytes / 1e6:,.2f}", f"{each.memory(made.context) / 1e6:,.2f}"),
            f"{each.loss.value:.4f}",
            f"{each.loss.low:.4f}-{each.loss.high:.4f}" if each.loss.low is not None else "",
            *(f"{each.decode.value:,.1f}", f"{each.cost.value:.3g}"),
        )
        for each in made.settings
    ]
    table(f"{made.path}: {len(rows)} settings in one file", columns, rows)
    if made.settings[0].energy is None:
        say("no energy counter can be read here: the battery's table goes by processor time, all cores together")
    say(f"choose when it runs: danlu chat {made.path} --memory 60MB --battery auto; the table is {made.path / POLICY}")
