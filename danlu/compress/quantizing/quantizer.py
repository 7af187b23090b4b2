"""A whole decoder rounded to one number format, block by block, and written as a GGUF file."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from danlu.artifact import check_parent
from danlu.compress.beside import Beside
from danlu.compress.compensate import Inputs
from danlu.compress.quantizing.adapting import adapt
from danlu.compress.quantizing.blockwise import Way, put, round_blocks
from danlu.compress.quantizing.formats.known import Format
from danlu.compress.quantizing.held import holds
from danlu.compress.quantizing.lesson import STEP_ROWS
from danlu.compress.quantizing.mixes import PLAIN, formats_for, head_of
from danlu.compress.quantizing.qat import tune
from danlu.compress.quantizing.rounding import PASSES, Rounded, round_compensated, round_plainly
from danlu.compress.quantizing.spool import Spool
from danlu.console import progress, say
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint
from danlu.model.gguf import all_metadata, write_weights
from danlu.train.memory import give_back
from danlu.train.precision import choose_precision

ROW = 512  # calibration tokens of a row
FEWEST = 4096  # calibration tokens; fewer do not tell how inputs go together
STRETCH = 2**16  # characters of a text encoded at once
# What llama.cpp calls a file most of which has a format.
FILE_TYPES = {"q2_k": "Q2_K_S", "q3_k": "Q3_K_S", "q4_k": "Q4_K_S", "q5_k": "Q5_K_S"}


@dataclass(frozen=True)
class Made:
    """What was written.

    Attributes:
        path: the file. bytes: of it.
        forms: matrices of each number format.
        stand_ins: of these, those whose rows do not fill blocks of the format that was asked for.
        tokens: of the calibration text.
    """

    path: Path
    bytes: int
    forms: dict[str, int]
    stand_ins: dict[str, int]
    tokens: int

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self) | {"path": str(self.path)}


def read_text(path: Path) -> str:
    """A text in UTF-8. Raises DanluError where it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DanluError(f"cannot be read: {error.strerror}", where=path) from None
    except UnicodeDecodeError as error:
        raise DanluError(f"is no text in UTF-8: byte {error.start:,} is none of it", where=path) from None


def quantize_model(
    checkpoint: Checkpoint,
    types: str | Mapping[str, str],
    calibration: str,
    out: Path,
    tokens: int = 16_384,
    steps: int = 0,
    rank: int = 0,
    passes: int = PASSES,
) -> Made:
    """Round a decoder's matrices, making up for errors on a text, and write a GGUF file.

    What a layer is to give is what it gives in the original; what it is given is what the rounded layers before it
    make. Vectors, routers and learned positions stay fp32.

    Args:
        checkpoint: any decoder that GGUF holds.
        types: a number format, as GGML calls it (q4_0, q4_k, ...), for all but the head, which then gets Q6_K; or one
            for each matrix by its name in the model (danlu/compress/quantizing/mixes.py).
        calibration: a text like what the model is for.
        out: the file, written aside and renamed.
        tokens: of the text, at most; whole rows of 512 drawn evenly over it.
        steps: of tuning afterwards, each on 2,048 tokens of the whole text (danlu/compress/quantizing/qat.py).
        rank: of adapters that learn in the first half of these steps and are then rounded in (adapting.py); 0 for none.
        passes: of refining after a matrix is rounded (refining.py).

    Raises DanluError where a type or matrix is not known, the text is too short, llama.cpp would compute otherwise, or
    adapters have no step to learn in.
    """
    if rank and steps < 2:
        raise DanluError("adapters learn in the first half of the steps of tuning", where="--lora", fix="--tune 40")
    plan = {name: (asked, form) for name, asked, form in formats_for(checkpoint.config, types)}
    all_metadata(checkpoint.config, checkpoint.tokenizer)  # refuses now what could not be written in the end
    rows = calibration_rows(checkpoint, calibration, tokens)
    check_parent(out)
    config = checkpoint.config
    with tempfile.TemporaryDirectory(prefix=".danlu-quantize-", dir=out.parent) as folder:
        spool = Spool(Path(folder), grids_too=steps > 0)
        with progress("quantize", config.layers + 1, "blocks") as tick, torch.no_grad():
            forms = {name: form for name, (_, form) in plan.items()}
            _round_all(checkpoint, forms, rows, spool, partial(_first, passes), tick.advance)
        if steps:
            _tune(
                checkpoint, spool, calibration_rows(checkpoint, calibration, steps * STEP_ROWS * ROW), rows, steps, rank
            )
        asked = Counter(asked for asked, _ in plan.values())
        write_weights(config, spool.weights, checkpoint.tokenizer, out, file_type=_file_type(asked))
    used = {name: PLAIN if form is None else form.kind.name.lower() for name, (_, form) in plan.items()}
    other = {name: (asked, used[name]) for name, (asked, _) in plan.items() if asked != used[name]}
    stand_ins = Counter(used for _, used in other.values())
    for (wanted, instead), count in Counter(other.values()).items():
        say(f"quantize: {count} matrices have rows that do not fill blocks of {wanted}: stored as {instead}")
    return Made(out, out.stat().st_size, dict(Counter(used.values())), dict(stand_ins), rows.numel())


def _tune(checkpoint: Checkpoint, spool: Spool, text: Tensor, rows: Tensor, steps: int, rank: int) -> None:
    """Adapters first, where they are asked for; then steps, norms and biases."""
    first = steps // 2 if rank else 0
    if first:
        with progress("adapt", first + checkpoint.config.layers, "steps and blocks") as tick:
            adapt(checkpoint, spool, text, rows, first, rank, tick.advance)
    with progress("tune", steps - first, "steps") as tick:
        tune(checkpoint, spool, text, steps - first, tick.advance)


def _file_type(asked: Counter[str]) -> gguf.LlamaFileType:
    """What the file says it is: what most of its matrices are."""
    most = asked.most_common(1)[0][0]
    if most == PLAIN:
        return gguf.LlamaFileType.ALL_F32
    return gguf.LlamaFileType["MOSTLY_" + FILE_TYPES.get(most, most.upper())]


def calibration_rows(checkpoint: Checkpoint, text: str, tokens: int) -> Tensor:
    """Rows of a text, int64 [rows, T], drawn evenly over it. Raises DanluError where it is too short."""
    ids = _encode(checkpoint, text)
    length = min(ROW, checkpoint.config.context)
    if len(ids) < FEWEST:
        what = f"the calibration text has {len(ids):,} tokens, and {FEWEST:,} are needed"
        raise DanluError(what, where="--calibration", fix="take more text of the kind that the model is for")
    rows = ids[: len(ids) // length * length].view(-1, length)
    count = min(len(rows), max(tokens // length, 1))
    return rows[torch.linspace(0, len(rows) - 1, count).long()].long()


def _encode(checkpoint: Checkpoint, text: str) -> Tensor:
    """Token ids of a text, int32, encoded in stretches, as the tokenizer takes hundreds of bytes for each token."""
    parts = (text[start : start + STRETCH] for start in range(0, len(text), STRETCH))
    ids = [torch.tensor(checkpoint.tokenizer.encode(part, special=False), dtype=torch.int32) for part in parts]
    return torch.cat(ids) if ids else torch.empty(0, dtype=torch.int32)


def _round_all(
    checkpoint: Checkpoint,
    forms: Mapping[str, Format | None],
    rows: Tensor,
    spool: Spool,
    way: Way,
    tick: Callable[[int, str], None],
) -> None:
    makers = checkpoint.model.makers(torch.float32)
    walk = Beside(checkpoint.config, makers, rows, choose_precision("auto")[0])
    walk.embed()
    round_blocks(walk, forms, spool, way, tick)
    norm, given = walk.end()
    give_back()
    head = head_of(forms)
    for name in [name for name in makers if name.startswith(("embedding.", "head."))]:  # the largest: one by one
        put({name: makers[name]()}, forms, given if name == head else None, spool, way)
    for name, weight in norm.items():
        put({name: weight}, forms, None, spool, way)
    tick(1, "head")


def _first(
    passes: int, _names: Sequence[str], weight: Tensor, _rows: slice, form: Format, inputs: Inputs | None
) -> Rounded:
    if inputs is None or holds(form, weight):
        return round_plainly(weight, form)
    return round_compensated(weight, form, inputs, passes)
