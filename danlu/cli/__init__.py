"""The commands: read the arguments, call one function, print what it returns (as text, or with --json as JSON)."""

from __future__ import annotations

import sys

from danlu.cli import checkpoint, compress, device, elastic, model, plan, search, work
from danlu.cli.base import Json, app, command, explain

__all__ = [
    "Json",
    "app",
    "checkpoint",
    "command",
    "compress",
    "device",
    "elastic",
    "explain",
    "main",
    "model",
    "plan",
    "search",
    "work",
]


def main() -> None:
    """The entry point of the command `danlu`; `--debug` may stand anywhere."""
    words = sys.argv[1:]
    debug = ["--debug"] if "--debug" in words else []
    app(args=[*debug, *(word for word in words if word != "--debug")], prog_name="danlu")
