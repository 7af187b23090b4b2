"""What people see: results on standard output, everything about the work itself on standard error.

A terminal gets live progress; a file or pipe gets plain lines, so logs stay readable.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

PLAIN_INTERVAL = 10.0  # seconds between progress lines when nobody watches live


def _stderr() -> Console:
    # Made at each use: tests and servers swap sys.stderr under us.
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """One line about the work under way."""
    _stderr().print(text, markup=False)


def warn(text: str) -> None:
    """One line the user should not miss, though the work goes on."""
    _stderr().print(f"warning: {text}", markup=False, style="yellow")


def complain(text: str) -> None:
    """The last line of a failed command."""
    _stderr().print(f"danlu: {text}", markup=False, style="bold red")


def result(text: str) -> None:
    """A result, on standard output."""
    print(text, flush=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on standard output; the first column is left-aligned, the others right."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for number, name in enumerate(columns):
        made.add_column(name, justify="left" if number == 0 else "right")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(made)


class Ticker:
    """Progress of one piece of work; `advance` is cheap enough to call for every item."""

    def __init__(self, label: str, total: float | None, unit: str, live: Progress | None) -> None:
        self.label, self.total, self.unit, self.live = label, total, unit, live
        self.done = 0.0
        self.started = self.spoke = time.monotonic()
        self.task = live.add_task(label, total=total, note="") if live else None

    def advance(self, amount: float = 1, note: str = "") -> None:
        """`amount` more units are done; `note` is shown beside (say, the loss)."""
        self.done += amount
        if self.live is not None and self.task is not None:
            rate = self.done / max(time.monotonic() - self.started, 1e-9)
            self.live.update(self.task, advance=amount, note=f"{rate:,.1f} {self.unit}/s {note}")
        elif time.monotonic() - self.spoke >= PLAIN_INTERVAL:
            self.spoke = time.monotonic()
            say(self.line(note))

    def line(self, note: str = "") -> str:
        """The progress as one plain line: share, rate, time left."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = self.done / seconds
        if self.total:
            left = (self.total - self.done) / max(rate, 1e-9)
            head = f"{self.label}: {self.done:,.0f}/{self.total:,.0f} {self.unit}, {left:,.0f} s left"
        else:
            head = f"{self.label}: {self.done:,.0f} {self.unit}"
        return f"{head}, {rate:,.1f} {self.unit}/s {note}".rstrip()


@contextmanager
def progress(label: str, total: float | None = None, unit: str = "items") -> Iterator[Ticker]:
    """Show the progress of a block of work: `with progress("reading", 100, "rows") as tick: tick.advance()`."""
    if not sys.stderr.isatty():
        tick = Ticker(label, total, unit, None)
        yield tick
        say(f"{label}: {tick.done:,.0f} {unit} in {time.monotonic() - tick.started:,.1f} s")
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f}/{task.total:,.0f}"))
    if total is None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f}"))
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=_stderr()
    ) as live:
        yield Ticker(label, total, unit, live)
