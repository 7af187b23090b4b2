"""`danlu checkpoint`: what a training run keeps."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from danlu.cli.base import Json, app, command, print_json
from danlu.console import result

checkpoint = typer.Typer(
    help="List, verify or export the checkpoints of a training run.",
    epilog="Example:  danlu checkpoint list runs/shakespeare",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(checkpoint, name="checkpoint")
RunDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="The directory of a training run.")]


@functools.partial(command, group=checkpoint, name="list")
def checkpoint_list(directory: RunDirectory, as_json: Json = False) -> None:
    """List the checkpoints of a run: step, size, score, whether whole.

    Example:  danlu checkpoint list runs/shakespeare
    """
    _checkpoints(directory, as_json, contents=False)


@functools.partial(command, group=checkpoint, name="verify")
def checkpoint_verify(directory: RunDirectory, as_json: Json = False) -> None:
    """Read every byte of the checkpoints and compare checksums; exits 1 where one is damaged.

    Example:  danlu checkpoint verify runs/shakespeare
    """
    if not _checkpoints(directory, as_json, contents=True):
        raise typer.Exit(1)


def _checkpoints(directory: Path, as_json: bool, contents: bool) -> bool:
    """Print what there is; returns whether all of it is whole."""
    from danlu.train.listing import checkpoints_of, print_checkpoints

    found = checkpoints_of(directory, contents=contents)
    if as_json:
        print_json([vars(facts) for facts in found])
    else:
        print_checkpoints(directory, found, contents=contents)
    return all(facts.problem is None for facts in found)


@functools.partial(command, group=checkpoint, name="export")
def checkpoint_export(
    directory: RunDirectory,
    out: Annotated[Path | None, typer.Option(help="The directory to write; else DIR/model.")] = None,
    step: Annotated[int | None, typer.Option(min=1, help="Which checkpoint; else the newest whole one.")] = None,
    averaged: Annotated[bool | None, typer.Option(help="Take the running average of the weights.")] = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint as a Hugging Face directory, whatever plan it was trained with.

    Example:  danlu checkpoint export runs/shakespeare --out ./shakespeare
    """
    from danlu.train.export import export as write

    done = write(directory, out or directory / "model", step, averaged)
    if as_json:
        print_json(done.plain())
    else:
        result(f"{done.out}: step {done.step}" + (", averaged weights" if done.averaged else ""))
