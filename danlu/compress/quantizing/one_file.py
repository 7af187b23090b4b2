"""`danlu compress quantize`: one GGUF file, and a card beside it of what it was made from and what was measured."""

from __future__ import annotations

import hashlib
import tempfile
import time
from pathlib import Path
from typing import Any

from danlu.artifact import Figures, code_version, figure, hash_file, make_card, peak_memory, write_json
from danlu.compress.apart import check_apart
from danlu.compress.quantizing.mixes import types_of
from danlu.compress.quantizing.quantizer import Made, quantize_model, read_text
from danlu.device.divergence import score_divergence
from danlu.device.engine import IGNORED, library
from danlu.device.measure import Document
from danlu.errors import DanluError
from danlu.evaluate.bootstrap import interval, paired_change
from danlu.model.checkpoint import Checkpoint
from danlu.model.gguf import write_gguf

WINDOW = 512  # tokens of a held-out piece
MOST = 16_384  # tokens of the held-out text that are scored, in pieces drawn evenly over it


def quantize_file(
    ref: str | Path,
    type: str | None,
    like: Path | None,
    calibration: Path,
    heldout: Path | None,
    out: Path,
    tokens: int,
    steps: int,
    rank: int = 0,
) -> dict[str, Any]:
    """Quantise, measure on the held-out text where there is one, and write FILE.card.json; the card.

    Args: as of the command; see `quantize_model`.

    Raises DanluError where neither or both of a type and a file to be like are given, where the held-out text is too
    short or in the calibration text, and as `quantize_model`.
    """
    if (type is None) == (like is None):
        raise DanluError("one of --type and --like is needed, and not both", where="danlu compress quantize")
    started, checkpoint = time.monotonic(), Checkpoint.open(ref)
    text = read_text(calibration)
    documents = [] if heldout is None else heldout_documents(checkpoint, text, read_text(heldout))
    types = types_of(like, checkpoint) if like is not None else str(type)
    made = quantize_model(checkpoint, types, text, out, tokens, steps, rank)
    card = make_card(
        "quantized",
        {"types": types, "tokens": made.tokens, "tuning_steps": steps, "adapter_rank": rank},
        {"model": checkpoint.digest} | _digests(calibration=calibration, heldout=heldout),
        code_version("compress/quantizing/one_file"),
        _figures(checkpoint, made, documents),
        {out.name: {"bytes": made.bytes, "sha256": hash_file(out)}},
        seconds=time.monotonic() - started,
        memory=peak_memory(),
        resumed=False,
    )
    card |= {"forms": made.forms, "stand_ins": made.stand_ins}
    write_json(out.with_name(f"{out.name}.card.json"), card)
    return card


def heldout_documents(checkpoint: Checkpoint, calibration: str, heldout: str) -> list[Document]:
    """Pieces of a held-out text, drawn evenly over it. Raises DanluError where it is too short or not held out."""
    library()  # before the work: without the engine nothing can be measured
    check_apart(calibration, heldout)
    ids = checkpoint.tokenizer.encode(heldout, special=False)
    length = min(WINDOW, checkpoint.config.context)
    pieces = [ids[start : start + length] for start in range(0, len(ids) - 1, length)]
    if len(pieces) < 2:
        what = f"the held-out text has {len(ids):,} tokens, and more than {length} are needed"
        raise DanluError(what, where="--heldout", fix="take more text of the kind that the model is for")
    count = min(len(pieces), max(MOST // length, 2))
    drawn = [pieces[number * (len(pieces) - 1) // (count - 1)] for number in range(count)]
    return [Document(piece, [*piece[1:], IGNORED]) for piece in drawn]


def _digests(**files: Path | None) -> dict[str, str]:
    found = {name: path for name, path in files.items() if path is not None}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}


def _figures(checkpoint: Checkpoint, made: Made, documents: list[Document]) -> Figures:
    figures = {"file_size": figure(made.bytes, "byte")}
    if not documents:
        return figures
    with tempfile.TemporaryDirectory(prefix=".danlu-original-", dir=made.path.parent) as folder:
        original = Path(folder) / "f32.gguf"
        write_gguf(checkpoint.load(), checkpoint.tokenizer, original)
        found = score_divergence(original, made.path, documents, context=len(documents[0].tokens))
    change = paired_change(found.original_loss, found.loss, found.counts)
    by = f"llama.cpp, {int(found.counts.sum()):,} tokens in {len(documents)} pieces, which are resampled"
    return figures | {
        "divergence": interval(found.divergence, found.counts).figure("nat/token", by),
        "same_top": interval(found.same, found.counts).figure("share", by),
        "heldout_loss": interval(found.loss, found.counts).figure("nat/token", by),
        "heldout_loss_change": change.absolute.figure("nat/token", by),
    }
