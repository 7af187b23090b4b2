"""`danlu device`: what the target device can do."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from danlu.cli.base import Json, Threads, app, command, print_json
from danlu.console import result, table

device = typer.Typer(
    help="Measure the device that a model is to run on.",
    epilog="Example:  danlu device probe --out device.json",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(device, name="device")


@device.callback()
def _group() -> None:
    pass  # a group of one command would otherwise be that command


@functools.partial(command, group=device, name="probe")
def device_probe(
    out: Annotated[Path | None, typer.Option(help="The profile to write, a file that travels.")] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time matrices of every number format in llama.cpp, about 2 minutes; `danlu compress --device` reads the profile.

    Example:  danlu device probe --out device.json
    """
    from danlu.artifact import check_parent
    from danlu.device.clock import probe_device
    from danlu.device.profile import summary

    if out is not None:
        check_parent(out)
    profile = probe_device(threads=threads)
    if out is not None:
        profile.save(out)
    if as_json:
        print_json(profile.plain())
        return
    table(
        "Decoding", ["format", "ns a number (columns)", "GB/s read"], [list(row.values()) for row in summary(profile)]
    )
    result(f"{profile.processor}: {profile.threads} threads, reads {profile.bandwidth / 1e9:.1f} GB/s")
    if out is not None:
        result(f"{out}: written")
