"""A whole decoder rounded to one number format, block by block, and written as a GGUF file."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
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
from danlu.compress.quantizing.formats.known import Format
from danlu.compress.quantizing.mixes import PLAIN, formats_for, head_of
from danlu.compress.quantizing.qat import STEP_ROWS, tune
from danlu.compress.quantizing.rounding import round_compensated, round_in_place, round_plainly
from danlu.compress.quantizing.spool import Spool
from danlu.console import progress, say
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint
from danlu.model.gguf import write_weights
from danlu.train.precision import choose_precision

ROW = 512  # calibration tokens of a row
FEWEST = 4096  # calibration tokens; fewer do not tell how inputs go together
PIECE = 2**21  # numbers of a matrix rounded at once
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

    Raises DanluError where a type or matrix is not known, the text is too short, or llama.cpp would compute otherwise.
    """
    plan = {name: (asked, form) for name, asked, form in formats_for(checkpoint, types)}
    rows = calibration_rows(checkpoint, calibration, tokens)
    check_parent(out)
    config = checkpoint.config
    with tempfile.TemporaryDirectory(prefix=".danlu-quantize-", dir=out.parent) as folder:
        spool = Spool(Path(folder), grids_too=steps > 0)
        with progress("quantize", config.layers + 1, "blocks") as tick, torch.no_grad():
            _round_all(checkpoint, {name: form for name, (_, form) in plan.items()}, rows, spool, tick.advance)
        if steps:
            every = calibration_rows(checkpoint, calibration, steps * STEP_ROWS * ROW)
            with progress("tune", steps, "steps") as tick:
                tune(checkpoint, spool, every, steps, tick.advance)
        asked = Counter(asked for asked, _ in plan.values())
        write_weights(config, spool.weights, checkpoint.tokenizer, out, file_type=_file_type(asked))
    used = {name: PLAIN if form is None else form.kind.name.lower() for name, (_, form) in plan.items()}
    other = {name: (asked, used[name]) for name, (asked, _) in plan.items() if asked != used[name]}
    stand_ins = Counter(used for _, used in other.values())
    for (wanted, instead), count in Counter(other.values()).items():
        say(f"quantize: {count} matrices have rows that do not fill blocks of {wanted}: stored as {instead}")
    return Made(out, out.stat().st_size, dict(Counter(used.values())), dict(stand_ins), rows.numel())


def _file_type(asked: Counter[str]) -> gguf.LlamaFileType:
    """What the file says it is: what most of its matrices are."""
    most = asked.most_common(1)[0][0]
    if most == PLAIN:
        return gguf.LlamaFileType.ALL_F32
    return gguf.LlamaFileType["MOSTLY_" + FILE_TYPES.get(most, most.upper())]


def calibration_rows(checkpoint: Checkpoint, text: str, tokens: int) -> Tensor:
    """Rows of a text, int64 [rows, T], drawn evenly over it. Raises DanluError where it is too short."""
    ids = checkpoint.tokenizer.encode(text, special=False)
    length = min(ROW, checkpoint.config.context)
    if len(ids) < FEWEST:
        what = f"the calibration text has {len(ids):,} tokens, and {FEWEST:,} are needed"
        raise DanluError(what, where="--calibration", fix="take more text of the kind that the model is for")
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    count = min(len(rows), max(tokens // length, 1))
    return rows[torch.linspace(0, len(rows) - 1, count).long()]


def _round_all(
    checkpoint: Checkpoint,
    forms: Mapping[str, Format | None],
    rows: Tensor,
    spool: Spool,
    tick: Callable[[int, str], None],
) -> None:
    makers = checkpoint.model.makers(torch.float32)
    walk = Beside(checkpoint.config, makers, rows, choose_precision("auto")[0])
    walk.embed()
    for turn in walk.blocks():
        weights = dict(turn.block.named_parameters())
        for names, inputs in turn.layers:
            for name in (f"{name}.weight" for name in names):
                _round(turn.prefix + name, weights.pop(name), forms, inputs, spool)
        for name, weight in weights.items():
            _round(turn.prefix + name, weight, forms, None, spool)
        tick(1, turn.prefix.rstrip("."))
    ends, given = walk.end()
    head = head_of(forms)
    for name in [name for name in makers if name.startswith("embedding.")]:
        _round(name, makers[name](), forms, given if name == head else None, spool)
    for name, matrix in ends.items():
        _round(name, matrix, forms, given if name == head else None, spool)
    tick(1, "head")


def _round(name: str, weight: Tensor, forms: Mapping[str, Format | None], inputs: Inputs | None, spool: Spool) -> None:
    """Put a weight aside as its format has it, and make it that."""
    form = forms.get(name)
    if form is None:
        spool.keep_exact(name, weight.data)
        return
    way = partial(round_plainly, form=form) if inputs is None else partial(round_compensated, form=form, inputs=inputs)
    flat = weight.data.contiguous().view(-1, weight.shape[-1])
    rounded = round_in_place(flat, max(PIECE // flat.shape[1], 1), way)
    spool.keep(name, rounded, form, tuple(weight.shape))
    weight.data = flat.view_as(weight)
