"""`danlu compress elastic`: one file, of which a device chooses a size when it runs."""

from __future__ import annotations

import functools
from typing import Annotated

import typer

from danlu.cli.base import Json, Ref, Threads, command, print_json, tuned
from danlu.cli.compress import HeldoutFrom, Rate, Rows, RunOut, Steps, Texts, Window, compress


@functools.partial(command, group=compress, name="elastic")
def compress_elastic(
    ref: Ref,
    texts: Texts,
    steps: Steps,
    out: RunOut,
    layers: Annotated[list[int] | None, typer.Option(min=1, help="Blocks besides all; repeatable.")] = None,
    heads: Annotated[list[int] | None, typer.Option(min=1, help="Query heads of a layer; repeatable.")] = None,
    channels: Annotated[list[int] | None, typer.Option(min=1, help="Inner features; repeatable.")] = None,
    width: Annotated[list[int] | None, typer.Option(min=1, help="Features of the stream; repeatable.")] = None,
    type_: Annotated[str, typer.Option("--type", help="The number format of matrices: q8_0, q5_0, q4_0, ...")] = "q8_0",
    rows: Rows = 8,
    window: Window = 256,
    learning_rate: Rate = 3e-4,
    heldout_from: HeldoutFrom = "end",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train a model whose parts are models, and write one file from which a device takes the size it has room for.

    Every combination of the sizes named and the model's own is a setting, measured here. At run time:
    danlu chat DIR --memory 60MB --battery auto.

    Example:  danlu compress elastic runs/helper --layers 6 --channels 512 --text docs.txt --steps 2000 --out elastic
    """
    from danlu.compress.learning.elastic import make_elastic, print_made
    from danlu.compress.learning.tuning import Tuning
    from danlu.model.checkpoint import Checkpoint
    from danlu.train.recipe import ElasticSettings

    named = {"layers": layers, "heads": heads, "channels": channels, "width": width}
    asked = ElasticSettings.model_validate({name: tuple(given or ()) for name, given in named.items()})
    tuning = Tuning(tuple(texts), steps, rows, window, learning_rate, heldout_from=heldout_from)
    made = make_elastic(Checkpoint.open(tuned(ref)), asked, type_, tuning, out, threads)
    if as_json:
        print_json(made.plain())
    else:
        print_made(made)
