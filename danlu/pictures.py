"""The report's charts as inline SVG: text stays text, and colours are the page's own, so they follow light and dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from danlu.errors import need_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# matplotlib wants colours it knows; these stand for the page's variables and are replaced in the finished SVG.
INK, MUTED, LINE, ACCENT, COOL, PAPER = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", ACCENT: "accent", COOL: "cool", PAPER: "card"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "danlu",
    "text.parse_math": False,
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
MOST_POINTS = 800  # of a curve; more cannot be seen, and every one costs bytes


def draw(name: str, label: str, paint: Callable[[Axes], None], width: float = 5.2, height: float = 3.0) -> Markup:
    """One chart as an SVG element.

    Args:
        name: unique on the page; it keeps the SVG's ids apart from those of other charts.
        label: what the chart shows, for those who cannot see it.
        paint: draws on the axes it is given.
        width, height: inches at 72 units; the page scales it.

    Raises DanluError where matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise need_extra("matplotlib", "report") from None
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # text stays text: the reader's fonts draw it
        made = Figure(figsize=(width, height), dpi=72, layout="constrained")
        made.patch.set_visible(False)
        axes = made.subplots()
        axes.patch.set_visible(False)
        paint(axes)
        drawn = io.StringIO()
        made.savefig(drawn, format="svg", metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
    return _inline(drawn.getvalue(), name, label)


def _inline(svg: str, name: str, label: str) -> Markup:
    """A standalone SVG document as an element: no prologue, no fixed size, ids of its own, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    viewed = re.search(r'viewBox="[^"]*"', svg)
    head = f'<svg {viewed.group(0) if viewed else ""} role="img" aria-label="{escape(label)}">'
    svg = head + svg[svg.index(">") + 1 :]
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg).replace('xlink:href="#', f'href="#{name}-')
    svg = re.sub(r"(font: [^;\"]*?px )[^;\"]*", r"\1sans-serif", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return Markup(svg)


def smooth(values: NDArray[np.float64], reach: float) -> NDArray[np.float64]:
    """Exponential moving average over about `reach` steps, unbiased at the start."""
    keep = 1 - 1 / max(reach, 1.0)
    running, weight = 0.0, 0.0
    made = np.empty_like(values)
    for place, value in enumerate(values):
        running, weight = keep * running + (1 - keep) * value, keep * weight + (1 - keep)
        made[place] = running / weight
    return made


def _thin(steps: NDArray[np.float64], values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    stride = max(1, -(-len(steps) // MOST_POINTS))
    return steps[::stride], values[::stride]


def loss_curve(steps: NDArray[np.float64], losses: NDArray[np.float64], smoothed: NDArray[np.float64]) -> Markup:
    """Training loss by step, as measured and smoothed."""

    def paint(axes: Axes) -> None:
        axes.plot(*_thin(steps, losses), color=COOL, linewidth=0.8, alpha=0.45, label="each step")
        axes.plot(*_thin(steps, smoothed), color=ACCENT, linewidth=1.9, label="smoothed")
        _label(axes, "step", "loss, nat/token")
        axes.legend(loc="upper right")

    return draw("loss", f"Training loss over {len(steps)} steps", paint, height=4.0)


def step_curve(name: str, label: str, steps: NDArray[np.float64], values: NDArray[np.float64]) -> Markup:
    """Another quantity by step, from zero."""

    def paint(axes: Axes) -> None:
        axes.plot(*_thin(steps, values), color=COOL, linewidth=1.4)
        axes.set_ylim(bottom=0, top=max(float(values.max()), 1e-12) * 1.12)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
        _label(axes, "step", label)

    return draw(name, f"{label} by step", paint, height=1.72)


def before_after(before: NDArray[np.float64], after: NDArray[np.float64], tokens: NDArray[np.float64]) -> Markup:
    """Loss of each held-out document before and after, nat/token; below the diagonal it fell."""

    def paint(axes: Axes) -> None:
        low = float(min(before.min(), after.min()))
        high = float(max(before.max(), after.max()))
        room = 0.06 * (high - low or 1.0)
        ends = (low - room, high + room)
        axes.plot(ends, ends, color=MUTED, linewidth=0.9, dashes=(4, 3))
        sizes = 8 + 70 * tokens / tokens.max()
        fell = after < before
        axes.scatter(before[fell], after[fell], sizes[fell], color=COOL, alpha=0.55, linewidths=0)
        axes.scatter(before[~fell], after[~fell], sizes[~fell], color=ACCENT, alpha=0.7, linewidths=0)
        axes.set_xlim(ends)
        axes.set_ylim(ends)
        _label(axes, "before, nat/token", "after, nat/token")

    return draw("documents", f"Loss of {len(before)} held-out documents before and after", paint, height=3.6)


def change_histogram(change: NDArray[np.float64]) -> Markup:
    """How many held-out documents changed by how much, nat/token; zero is marked and always in view."""

    def paint(axes: Axes) -> None:
        low, high = min(float(change.min()), 0.0), max(float(change.max()), 0.0)
        width = ((high - low) or 1.0) / min(30, max(8, len(change) // 5))
        edges = width * np.arange(np.floor(low / width), np.ceil(high / width) + 1)  # zero is one of them
        counts, _ = np.histogram(change, edges)
        colours = [COOL if middle < 0 else ACCENT for middle in (edges[1:] + edges[:-1]) / 2]
        axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=colours, alpha=0.75, linewidth=0)
        axes.axvline(0, color=MUTED, linewidth=0.9, dashes=(4, 3))
        _label(axes, "change of loss, nat/token", "documents")

    return draw("changes", f"Change of loss of {len(change)} held-out documents", paint, height=3.6)


def candidates_scatter(
    name: str, axis: str, across: Sequence[float], change: Sequence[dict[str, Any]], labels: Sequence[str], chosen: int
) -> Markup:
    """Quality against size or speed for every compressed form tried, the chosen one marked."""

    def paint(axes: Axes) -> None:
        axes.axhline(0, color=MUTED, linewidth=0.9, dashes=(4, 3))
        for place, (x, about) in enumerate(zip(across, change, strict=True)):
            colour, size = (ACCENT, 110) if place == chosen else (COOL, 42)
            if "low" in about:
                axes.plot([x, x], [about["low"], about["high"]], color=colour, linewidth=1.2, alpha=0.6)
            axes.scatter([x], [about["value"]], size, color=colour, edgecolors=PAPER, linewidths=1.2, zorder=3)
        axes.margins(x=0.16, y=0.18)
        _label(axes, axis, "change of loss, nat/token")
        _name_points(axes, across, [about["value"] for about in change], labels, chosen)

    return draw(name, f"Change of loss by {axis} for {len(labels)} compressed forms", paint, height=3.4)


def plans_scatter(seconds: Sequence[float], gib: Sequence[float], names: Sequence[str], most: float) -> Markup:
    """Time of a step against memory of a process for plans of which none is both faster and smaller.

    Args:
        names: of the points; the first is the chosen one.
        most: GiB that there are; a dashed line.
    """

    def paint(axes: Axes) -> None:
        colours = [ACCENT, *[COOL] * (len(names) - 1)]
        axes.scatter(gib, seconds, [110.0, *[42.0] * (len(names) - 1)], color=colours, edgecolors=PAPER, zorder=3)
        axes.axvline(most, color=MUTED, linewidth=0.9, dashes=(4, 3))
        axes.margins(x=0.16, y=0.18)
        _label(axes, "memory of the fullest process, GiB", "time of a step, s")
        _name_points(axes, gib, seconds, names, 0)

    return draw("plans", f"Time against memory of {len(names)} plans", paint, height=3.6)


def _name_points(axes: Axes, xs: Sequence[float], ys: Sequence[float], names: Sequence[str], chosen: int) -> None:
    """Write each point's name where it covers least: the chosen first, then whichever side is still free."""
    sides = [
        (8, 0, "left"),
        (-8, 0, "right"),
        (0, 11, "center"),
        (0, -11, "center"),
        (8, 10, "left"),
        (-8, -10, "right"),
    ]
    sides += [(8, -10, "left"), (-8, 10, "right"), (10, 20, "left"), (10, -20, "left"), (0, 24, "center")]
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]  # always a whole figure
    points = axes.transData.transform(np.column_stack([xs, ys]))
    frame = axes.get_window_extent()
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    _, zero = axes.transData.transform((0.0, 0.0))
    taken.append((frame.x0, zero - 1, frame.x1, zero + 1))  # the dashed line
    for place in sorted(range(len(names)), key=lambda place: place != chosen):
        wide, tall = 5.2 * len(names[place]) + 2, 10
        boxes = []
        for right, up, align in sides:
            x, y = points[place] + (right, up)
            left = x - {"left": 0, "right": wide, "center": wide / 2}[align]
            boxes.append((left, y - tall / 2, left + wide, y + tall / 2))
        covered = [_covered(box, taken) + _outside(box, frame.x0, frame.x1) for box in boxes]
        best = int(np.argmin(covered))
        taken.append(boxes[best])
        right, up, align = sides[best]
        axes.annotate(
            names[place], (xs[place], ys[place]), (right, up), textcoords="offset points", ha=align, va="center",
            fontsize=8, color=ACCENT if place == chosen else INK, weight="bold" if place == chosen else "normal",
        )  # fmt: skip


Box = tuple[float, float, float, float]  # left, bottom, right, top


def _covered(box: Box, taken: Sequence[Box]) -> float:
    """Area of `box` under boxes already placed."""
    return sum(
        max(0.0, min(box[2], other[2]) - max(box[0], other[0]))
        * max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
        for other in taken
    )


def _outside(box: Box, left: float, right: float) -> float:
    """Area of `box` beyond the frame's sides."""
    return (max(0.0, left - box[0]) + max(0.0, box[2] - right)) * (box[3] - box[1])


def _label(axes: Axes, across: str, up: str) -> None:
    axes.set_xlabel(across)
    axes.set_ylabel(up)
