"""The planner's answer as one self-contained page, which loads nothing and runs no script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from danlu import __version__
from danlu.artifact import write_aside
from danlu.report import environment

TEMPLATE = "plan_page.html.j2"
TURN = 137.5  # degrees between the hues of neighbouring parts: the golden angle keeps many of them apart


class Part(NamedTuple):
    """One part of a stacked bar.

    Attributes:
        name: of the part.
        amount: in the bar's unit.
        share: of the whole.
        tone: a colour, as CSS has it.
    """

    name: str
    amount: float
    share: float
    tone: str


def write_page(out: Path, answer: Mapping[str, Any], name: str) -> None:
    """Write what `danlu.plan.describe.find` has found. Raises DanluError where matplotlib is not installed.

    Args:
        out: the file.
        answer: JSON-ready.
        name: of what is planned for, the page's title.
    """
    write_aside(out, render(answer, name))


def render(answer: Mapping[str, Any], name: str) -> str:
    """The page as text."""
    from danlu.pictures import plans_scatter

    best, front = answer["plan"], _front(answer)
    seconds, gib = [each["seconds"] for each in front], [each["gib"] for each in front]
    names = [str(number) for number in range(1, len(front) + 1)]
    template = environment().get_template(TEMPLATE)
    return template.render(
        name=name,
        version=__version__,
        answer=answer,
        best=best,
        bars=[("Time of a step", "s", list(parts_of(best["times"]))), ("Memory of the fullest process", "GiB",
              list(parts_of(best["memory"])))],
        front=front,
        picture=plans_scatter(seconds, gib, names, answer["room"]),
    )  # fmt: skip


def parts_of(parts: Mapping[str, float]) -> Iterator[Part]:
    """What is not zero of a sum whose whole is its `total`."""
    kept = [(name, amount) for name, amount in parts.items() if name != "total" and amount > 0]
    for number, (name, amount) in enumerate(kept):
        yield Part(name, amount, amount / parts["total"], f"hsl({TURN * number % 360:.0f} 45% 52%)")


def _front(answer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The chosen plan, then those of the Pareto front that are not it."""
    return [answer["plan"], *(each for each in answer["pareto"] if each != answer["plan"])]
