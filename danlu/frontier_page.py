"""What a search found as one self-contained page, which loads nothing and runs no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from danlu import __version__
from danlu.artifact import write_aside
from danlu.console import say
from danlu.device.proof import in_words, phones_in_words
from danlu.errors import DanluError
from danlu.pictures import ACCENT, COOL, MUTED, PAPER, draw
from danlu.report import environment

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEMPLATE = "frontier_page.html.j2"


def write_page(out: Path, found: Mapping[str, Any], name: str) -> None:
    """Write what `danlu compress` has found; without matplotlib there is none, and that is said in the end.

    Args:
        out: the file.
        found: as in frontier.json, finished or not.
        name: of the model, the page's title.
    """
    try:
        page = render(found, name)
    except DanluError as error:
        if found["finished"]:
            say(f"no picture of the frontier: {error}")
        return
    write_aside(out, page)


def render(found: Mapping[str, Any], name: str) -> str:
    """The page as text. Raises DanluError where matplotlib is not installed."""
    rows = [
        {
            "number": each["number"],
            "chosen": each["chosen"],
            "start": each["start"],
            "formats": ", ".join(f"{count} {form}" for form, count in each["formats"].items()),
            "cache": each["cache"],
            "megabytes": each["figures"]["file_size"]["value"] / 1e6,
            "speed": each["figures"]["decode"]["value"],
            "divergence": each["figures"]["divergence"]["value"],
            "rise": 100 * each["figures"]["heldout_loss_rise"]["value"],
            "missed": each["missed"],
        }
        for each in found["measured"]
    ]
    certificate = found["certificate"]
    return environment().get_template(TEMPLATE).render(
        name=name,
        version=__version__,
        found=found,
        rows=rows,
        lines=in_words(certificate) if certificate else [],
        phones=phones_in_words(certificate) if certificate else [],
        picture=frontier_picture(found["told"], rows),
    )  # fmt: skip


def frontier_picture(told: Sequence[Mapping[str, float]], measured: Sequence[Mapping[str, Any]]) -> Markup:
    """Divergence against size: a line of what was told, points of what was measured."""

    def paint(axes: Axes) -> None:
        sizes, losses = [each["bytes"] / 1e6 for each in told], [each["divergence"] for each in told]
        axes.plot(sizes, losses, color=COOL, linewidth=1.4, marker="o", markersize=3, label="told")
        for each in measured:
            colour = ACCENT if each["chosen"] else MUTED
            axes.scatter([each["megabytes"]], [each["divergence"]], 70.0, color=colour, edgecolors=PAPER, zorder=3)
        if any(loss > 0 for loss in (*losses, *(each["divergence"] for each in measured))):
            axes.set_yscale("log")
        axes.set_xlabel("file, MB")
        axes.set_ylabel("divergence, nat/token")
        axes.legend(loc="upper right")

    return draw("frontier", f"Divergence against size, {len(measured)} files measured", paint, height=3.6)
