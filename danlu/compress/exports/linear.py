"""The matrices of all linear layers of a stack rounded one block after another, errors made up for on a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from danlu.compress.beside import Beside
from danlu.compress.compensate import Inputs
from danlu.compress.quantizing.formats.grouped import Grouped, Rows
from danlu.compress.quantizing.quantizer import FEWEST, calibration_rows
from danlu.compress.quantizing.rounding import Rounded, round_compensated, round_plainly
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint, StoredModel
from danlu.model.config import ModelConfig
from danlu.model.stored import Make
from danlu.tokenizer import Tokenizer
from danlu.train.precision import choose_precision

WORDS = "embedding.tokens.weight"
PIECE = 2**16  # numbers rounded by themselves at once: what is tried on them stays in the processor's cache
SENTENCE = 64  # tokens of a row that an encoder is calibrated on


@dataclass(frozen=True)
class Few:
    """A matrix of few bits.

    Attributes:
        form: its format.
        codes: uint8 [rows, columns].
        steps: [rows, groups], as stored.
        values: what they stand for, fp32 [rows, columns].
    """

    form: Grouped
    codes: Tensor
    steps: Tensor
    values: Tensor


def draw_rows(stored: StoredModel, tokenizer: Tokenizer, text: str, tokens: int) -> Tensor:
    """Rows of a calibration text, int64 [rows, T], drawn evenly over it. Raises DanluError where it is too short.

    What an encoder's tokenizer puts around a text stands around each of its rows.
    """
    config = stored.config
    assert isinstance(config, ModelConfig)
    if config.causal:
        return calibration_rows(Checkpoint(stored, tokenizer), text, tokens)
    around, ids = tokenizer.encode_input(""), tokenizer.encode(text, special=False)
    if len(ids) < FEWEST:
        what = f"the calibration text has {len(ids):,} tokens, and {FEWEST:,} are needed"
        raise DanluError(what, where="--calibration", fix="take more text of the kind that the model is for")
    begin, end = around[: len(around) // 2], around[len(around) // 2 :]
    length = min(SENTENCE, config.context) - len(around)
    rows = [begin + ids[first : first + length] + end for first in range(0, len(ids) - length + 1, length)]
    count = min(len(rows), max(tokens // length, 1))
    return torch.tensor(rows)[torch.linspace(0, len(rows) - 1, count).long()]


def round_layers(
    config: ModelConfig,
    makers: Mapping[str, Make],
    rows: Tensor,
    form_of: Callable[[str], Grouped],
    words: Grouped | None,
) -> Iterator[tuple[str, Tensor | Few]]:
    """All weights of a stack by their names, those of its linear layers and, if asked for, its words in few bits.

    What a layer is given is what the rounded layers before it make; what it is to give is what the original gives.

    Args:
        config: of a decoder, or of an encoder of text.
        makers: read its weights, by name, in fp32.
        rows: from `draw_rows`.
        form_of: a linear layer's format, by the name of its weight.
        words: of the embedding of words; None to leave it as it is.
    """
    dtype = choose_precision("auto")[0]
    walk = Beside(config, makers, rows, dtype)
    embedding = walk.embed()
    if words is not None:
        few = _round(embedding.pop(WORDS), words, None)
        walk.changed.embed({WORDS.removeprefix("embedding."): few.values})
        yield WORDS, few
    yield from embedding.items()
    for turn in walk.blocks():
        for names, inputs in turn.layers:
            for name in names:
                few = _round(walk.read(name), form_of(name), inputs)
                walk.put(name, few.values)
                yield name, few
        yield from ((name, walk.read(name)) for name in turn.others)
    yield from walk.changed.finish().items()
    yield from walk.changed.heads()


def _round(weight: Tensor, form: Grouped, inputs: Inputs | None) -> Few:
    if inputs is None:
        return _joined([_piece(rows, form, None) for rows in weight.split(max(PIECE // weight.shape[1], 1))])
    return _piece(weight, form, inputs)


def _piece(weight: Tensor, form: Grouped, inputs: Inputs | None) -> Few:
    importance = torch.ones(weight.shape[1]) if inputs is None else inputs.importance
    way = form.for_matrix(weight, importance)
    rounded: Rounded = round_plainly(weight, way) if inputs is None else round_compensated(weight, way, inputs)
    whole = isinstance(way, Rows)
    steps = rounded.grids[0].step if whole else torch.cat([grid.step for grid in rounded.grids], dim=1)
    return Few(form, rounded.packed, steps.to(form.dtype), rounded.values)


def _joined(parts: list[Few]) -> Few:
    """One matrix of the rows of all parts."""
    codes, steps, values = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "steps", "values"))
    return Few(parts[0].form, codes, steps, values)
