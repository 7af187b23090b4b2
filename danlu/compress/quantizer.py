"""A whole decoder rounded to one number format, block by block, and written as a GGUF file."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from danlu.compress.compensate import Inputs
from danlu.compress.formats.known import Format, fitting, format_of
from danlu.compress.rounding import Rounded, round_compensated, round_plainly
from danlu.compress.walk import Walk
from danlu.console import progress, say
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint
from danlu.model.families.known import family_for
from danlu.model.gguf import EXACT, Packed, write_weights

ROW = 512  # calibration tokens of a row
FEWEST = 4096  # calibration tokens; fewer do not tell how inputs go together
PIECE = 2**22  # numbers of a matrix rounded at once: with fixed products, rows do not know of each other
END = "q6_k"  # of the head: its errors reach the probabilities directly
# What llama.cpp calls a file most of which has a format.
FILE_TYPES = {"q2_k": "Q2_K_S", "q3_k": "Q3_K_S", "q4_k": "Q4_K_S", "q5_k": "Q5_K_S"}


@dataclass
class Spool:
    """Packed matrices on disk, so that none has to stay in memory until the file is written.

    Attributes:
        folder: where they lie.
        weights: by their names in the model; vectors and what stays exact as they are.
        forms: how each matrix is stored.
    """

    folder: Path
    weights: dict[str, Tensor | Packed] = field(default_factory=dict)
    forms: dict[str, str] = field(default_factory=dict)

    def keep(self, name: str, rounded: Rounded, form: Format, shape: tuple[int, ...]) -> None:
        """Put a matrix, or a bank of them, of this shape aside."""
        file = self.folder / f"{len(self.forms)}.bin"
        rounded.packed.numpy().tofile(file)
        data = torch.from_numpy(np.memmap(file, np.uint8, "r+")).view(*shape[:-1], -1)
        self.weights[name], self.forms[name] = Packed(form.kind, data), form.kind.name.lower()

    def keep_exact(self, name: str, weight: Tensor) -> None:
        """Put aside as it is what no format holds, or must not."""
        self.weights[name] = weight.clone()
        if weight.dim() > 1:
            self.forms[name] = "f32"


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


def quantize_model(checkpoint: Checkpoint, type: str, calibration: str, out: Path, tokens: int = 16_384) -> Made:
    """Round a decoder's matrices to one format, making up for errors on a text, and write a GGUF file.

    Inputs of a block are those that the rounded blocks before it give. The head, and the embedding where it is the
    head, are rounded to Q6_K; vectors, routers and learned positions stay fp32.

    Args:
        checkpoint: any decoder that GGUF holds.
        type: a number format, as GGML calls it: q4_0, q4_k, ...
        calibration: a text like what the model is for.
        out: the file, written aside and renamed.
        tokens: of the text, at most; whole rows of 512 drawn evenly over it.

    Raises DanluError where the type is not known, the text is too short, or llama.cpp would compute otherwise.
    """
    form = format_of(type)
    rows = calibration_rows(checkpoint, calibration, tokens)
    if not out.parent.is_dir():
        raise DanluError("there is no such directory", where=out.parent)
    config = checkpoint.config
    names = family_for(config).gguf_names
    exact = {name for name in checkpoint.model.makers() if (names.theirs(name) or "").endswith(EXACT)}
    file_type = gguf.LlamaFileType["MOSTLY_" + FILE_TYPES.get(type.lower(), type.upper())]
    with tempfile.TemporaryDirectory(prefix=".danlu-quantize-", dir=out.parent) as folder, torch.inference_mode():
        spool = Spool(Path(folder))
        with progress("quantize", config.layers + 1, "blocks") as tick:
            _round_all(checkpoint, form, rows, exact, spool, tick.advance)
        write_weights(config, spool.weights, checkpoint.tokenizer, out, file_type=file_type)
    head = format_of(END).kind.name.lower()
    other = {name: used for name, used in spool.forms.items() if used not in (form.kind.name.lower(), head, "f32")}
    made = Made(
        out, out.stat().st_size, dict(Counter(spool.forms.values())), dict(Counter(other.values())), rows.numel()
    )
    if other:
        told = ", ".join(f"{count} as {used}" for used, count in made.stand_ins.items())
        say(f"quantize: {len(other)} matrices have rows that do not fill blocks of {form.block}: stored {told}")
    return made


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
    checkpoint: Checkpoint, form: Format, rows: Tensor, exact: set[str], spool: Spool, tick: Callable[[int, str], None]
) -> None:
    walk = Walk(checkpoint.config, checkpoint.model.makers(torch.float32), rows)
    embedding = walk.embed()
    for prefix, block, products in walk.blocks():
        inputs = _inputs(products.found)
        for name, weight in block.named_parameters():
            path = prefix + name
            if _stays(path, weight, exact):
                spool.keep_exact(path, weight.data)
            else:
                rounded = _keep(spool, path, weight.data, form, inputs.get(name.removesuffix(".weight")))
                weight.data = rounded.view_as(weight)
        tick(1, prefix.rstrip("."))
    ends, given = walk.end()
    head = "head.weight" if "head.weight" in ends else "embedding.tokens.weight"
    for name, matrix in (embedding | ends).items():
        if _stays(name, matrix, exact):
            spool.keep_exact(name, matrix)
        elif name == head:
            _keep(spool, name, matrix, format_of(END), Inputs(given))
        else:
            _keep(spool, name, matrix, form, None)
    tick(1, "head")


def _stays(name: str, weight: Tensor, exact: set[str]) -> bool:
    """Whether a weight is kept as it is: vectors, biases of experts, and what llama.cpp reads in fp32."""
    return weight.dim() == 1 or name.endswith("bias") or name in exact


def _inputs(products: dict[str, Tensor]) -> dict[str, Inputs]:
    """By layer; layers that share products share what is made of them. Inputs that were never seen say nothing."""
    made = {id(each): Inputs(each) for each in {id(each): each for each in products.values()}.values() if each.any()}
    return {name: made[id(each)] for name, each in products.items() if id(each) in made}


def _keep(spool: Spool, name: str, weight: Tensor, form: Format, inputs: Inputs | None) -> Tensor:
    """Round a matrix or a bank and put it aside; the values that the model goes on with, [rows, columns]."""
    flat = weight.reshape(-1, weight.shape[-1])
    fits = fitting(form, flat.shape[1])
    if fits is None:
        spool.keep_exact(name, weight)
        return flat
    way = partial(round_plainly, form=fits) if inputs is None else partial(round_compensated, form=fits, inputs=inputs)
    rounded = _in_pieces(flat, way)
    spool.keep(name, rounded, fits, tuple(weight.shape))
    return rounded.values


def _in_pieces(weight: Tensor, way: Callable[[Tensor], Rounded]) -> Rounded:
    pieces: Iterable[Rounded] = map(way, weight.split(max(PIECE // weight.shape[1], 1)))
    packed, values = zip(*((each.packed, each.values) for each in pieces), strict=True)
    return Rounded(torch.cat(packed), torch.cat(values))
