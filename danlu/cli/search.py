"""`danlu compress MODEL`: the best file that meets a target."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Literal

import typer

from danlu.cli.base import Json, Ref, Threads, command, print_json, tuned
from danlu.cli.compress import compress
from danlu.console import result


@functools.partial(command, group=compress, name="search")
def compress_search(
    ref: Ref,
    calibration: Annotated[Path, typer.Option(help="A text file like what the model is for.")],
    heldout: Annotated[Path, typer.Option(help="Another such text, with no document of the first, to certify on.")],
    out: Annotated[Path, typer.Option(help="The directory to write; the same command goes on in it.")],
    memory: Annotated[str | None, typer.Option(help="Most bytes of file and cache, say 100MB.")] = None,
    speed: Annotated[str | None, typer.Option(help="Least tokens a second in decoding, say 250tok/s.")] = None,
    loss: Annotated[str | None, typer.Option(help="Largest rise of held-out loss, say 1%.")] = None,
    size: Annotated[str | None, typer.Option(help="Largest file, say 85MB.")] = None,
    device: Annotated[
        Path | None, typer.Option(help="The profile of another device (danlu device probe); else this one.")
    ] = None,
    types: Annotated[str | None, typer.Option(help="Number formats to try, say q4_0,q8_0.")] = None,
    caches: Annotated[str | None, typer.Option(help="Number formats of keys and values, say f16,q8_0.")] = None,
    pruning: Annotated[
        list[str] | None,
        typer.Option(help="A smaller model to start from too, say layers=28,channels=1408; auto; none. Repeatable."),
    ] = None,
    context: Annotated[int | None, typer.Option(min=64, help="Tokens that keys and values are held for.")] = None,
    prefer: Annotated[
        Literal["best", "smallest", "fastest"] | None, typer.Option(help="What is bettered within the limits.")
    ] = None,
    task: Annotated[Path | None, typer.Option(help="Questions with answers, JSONL: your own measure.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="One candidate, small samples.")] = False,
    best: Annotated[bool, typer.Option("--best", help="As many candidates as --minutes allow, large samples.")] = False,
    tune: Annotated[
        int | None, typer.Option(min=0, help="Steps that each file is tuned in, 2,048 tokens each; 0 leaves it out.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="After which no candidate is begun.")] = None,
    sustained: Annotated[float | None, typer.Option(min=0, help="Seconds of decoding without a pause.")] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Find the best file that meets a memory, a speed and a loss, and certify it: DIR/model.gguf.

    Exits 1 where the file that is nearest misses the target, 2 where none could ever meet it.

    Example:  danlu compress runs/helper --memory 150MB --loss 1% --calibration a.txt --heldout b.txt --out small
    """
    from danlu.compress.quantizing.quantizer import read_text
    from danlu.compress.searching.frontier import print_frontier
    from danlu.compress.searching.search import Asked, search
    from danlu.compress.searching.wishes import read_settings, read_target
    from danlu.device.certify import missed
    from danlu.device.profile import DeviceProfile
    from danlu.device.proof import in_words, phones_in_words
    from danlu.frontier_page import write_page
    from danlu.model.checkpoint import Checkpoint

    wishes = {"types": types, "caches": caches, "context": context, "prefer": prefer, "minutes": minutes}
    several = {"pruning": tuple(pruning) if pruning else None, "tuning_steps": tune}
    asked = Asked(
        Checkpoint.open(tuned(ref)),
        read_target(memory=memory, speed=speed, quality_loss=loss, file_size=size),
        read_settings(fast, best, wishes | several | {"sustained": sustained, "threads": threads}),
        read_text(calibration),
        read_text(heldout),
        task,
        DeviceProfile.load(device) if device else None,
    )
    found = search(asked, out, lambda known: write_page(out / "frontier.html", known, str(ref)))
    if as_json:
        print_json(found)
    else:
        print_frontier(found)
        result(f"{out / 'model.gguf'}: {found['why']}")
        for line in in_words(found["certificate"]):
            result(f"  {line}")
        result("a model of the 7B class, by Canalys' line:")
        for line in phones_in_words(found["certificate"]):
            result(f"  {line}")
    error = missed(found["certificate"], out / "certificate.json")
    if error is not None:
        raise error
