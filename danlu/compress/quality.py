"""What a changed model loses on a text, in nat a byte: a measure under which models with other vocabularies compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from danlu.artifact import CARD, Figures, write_json
from danlu.compress.apart import check_apart
from danlu.compress.product import Product
from danlu.compress.quantizing.quantizer import read_text
from danlu.console import progress
from danlu.errors import DanluError
from danlu.evaluate.bootstrap import interval, paired_change
from danlu.model.checkpoint import Checkpoint
from danlu.tokenizer import Tokenizer, read_json

PIECE = 1500  # characters of a text scored by themselves, at most


def cut(text: str, characters: int = PIECE) -> list[str]:
    """A text in pieces of at most so many characters, cut at the end of a line where there is one."""
    pieces = []
    while text:
        end = text.rfind("\n", 1, characters) + 1 if len(text) > characters else len(text)
        end = end or characters
        pieces.append(text[:end])
        text = text[end:]
    return pieces


def pieces_for(text: str, *checkpoints: Checkpoint) -> list[str]:
    """Pieces that fit in the context of every one of these models."""
    characters = PIECE
    while characters:
        pieces = cut(text, characters)
        if all(_longest(each.tokenizer, pieces) < each.config.context for each in checkpoints):
            return pieces
        characters //= 2
    raise DanluError("no piece of the text fits in the model's context", where="--heldout")


def text_losses(checkpoint: Checkpoint, pieces: list[str], dtype: torch.dtype = torch.float32) -> NDArray[np.float64]:
    """The loss of each piece as a whole, float64 [pieces], in nat.

    A piece begins with the token that begins a text where the model has one; otherwise its first token is not scored.
    """
    tokenizer, model = checkpoint.tokenizer, checkpoint.load(dtype)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    losses = np.zeros(len(pieces))
    with torch.inference_mode(), progress("held-out", len(pieces), "pieces") as tick:
        for number, ids in enumerate(tokenizer.encode_batch(pieces, special=False)):
            tokens = torch.tensor(start + ids)
            if len(tokens) > 1:
                logits = model.logits(model(tokens[None, :-1]))[0].float()
                losses[number] = float(F.cross_entropy(logits, tokens[1:], reduction="sum"))
            tick.advance(1)
    return losses


def loss_change(before: Checkpoint, after: Checkpoint, text: str, dtype: torch.dtype = torch.float32) -> Figures:
    """Held-out loss before and after, and its rise, each with its interval over pieces of the text.

    Args:
        text: held-out, at least some pieces of 1,500 characters.
        dtype: to compute in.
    """
    pieces = pieces_for(text, before, after)
    sizes = [len(piece.encode()) for piece in pieces]
    first, second = (text_losses(each, pieces, dtype) for each in (before, after))
    change = paired_change(first, second, sizes)
    by = f"{len(pieces)} pieces of held-out text, which are resampled; {sum(sizes):,} bytes"
    figures = {
        "loss_before": interval(first, sizes).figure("nat/byte", by),
        "loss_after": interval(second, sizes).figure("nat/byte", by),
    }
    if change.relative is not None:
        figures["loss_rise"] = change.relative.figure("share", by)
    return figures


def made_and_measured(
    ref: str | Path,
    make: Callable[[Checkpoint, str | None], Product],
    calibration: Path | None,
    heldout: Path | None,
) -> Product:
    """Change a model, and note on the product's card what that changed on a held-out text, where there is one.

    Args:
        ref: the model.
        make: from it and the calibration text to the product.
        calibration, heldout: text files.

    Raises DanluError where a file is no text, or much of one text is in the other.
    """
    checkpoint = Checkpoint.open(ref)
    text, other = (None if file is None else read_text(file) for file in (calibration, heldout))
    if other is not None and not other.strip():
        raise DanluError("is empty", where=heldout, fix="name another text")
    if text is not None and other is not None:
        check_apart(text, other)
    product = make(checkpoint, text)
    if other is None:
        return product
    figures = product.figures | loss_change(checkpoint, Checkpoint.open(product.path), other)
    write_json(product.path / CARD, read_json(product.path / CARD) | {"figures": figures})
    return Product(product.path, figures)


def _longest(tokenizer: Tokenizer, pieces: list[str]) -> int:
    return max(len(ids) for ids in tokenizer.encode_batch(pieces, special=False)) + 1
