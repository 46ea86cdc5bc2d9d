"""Charts as SVG. They use the colours of the page, so that one drawing serves light and dark screens."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from lgm_dist.report.page import Html

Array = npt.NDArray[np.float64]
COLOURS = 8
"""Number of lines that have a colour; further lines are pale."""
MOST_POINTS = 100
"""Largest number of points of a line. A longer curve is drawn as the means of its parts."""
INK, GRID, PALE = "#0a0b1f", "#0a0b1e", "#0a0b1d"
_IN_CSS = {INK: "currentColor", GRID: "var(--line)", PALE: "var(--muted)"} | {
    f"#0a0b0{i}": f"var(--s{i})" for i in range(COLOURS)
}
"""Placeholder colour in matplotlib's drawing -> colour in the page's CSS."""


@dataclass(frozen=True)
class Line:
    """A line of a chart, with n points."""

    x: Array
    y: Array
    place: int | None
    """Number of the line's colour. None, or a number beyond the colours, is pale."""
    ci95: Array | None = None
    """Half-width of the interval around y."""
    joined: bool = True
    """False draws separate points with error bars."""
    marks: bool = True
    dashed: bool = False


def colour(place: int | None) -> str:
    """The CSS colour of the line at `place`."""
    return f"var(--s{place})" if place is not None and place < COLOURS else "var(--muted)"


def thin(x: Array, y: Array, most: int = MOST_POINTS) -> tuple[Array, Array]:
    """Means of at most `most` equal parts of a curve: (n,) -> (m,) with m <= most."""
    parts = min(most, len(x))
    if not parts:
        return x, y
    return (np.array([part.mean() for part in np.array_split(values, parts)]) for values in (x, y))  # type: ignore[return-value]


def chart(lines: Sequence[Line], xlabel: str, ylabel: str, *, level: float | None = None, **axes: Any) -> Html:
    """Draw the lines. `level` adds a dotted line for chance, and `axes` are arguments of matplotlib's Axes.set."""
    with plt.rc_context(_RC):
        figure, ax = plt.subplots(figsize=(4.3, 2.7))
        figure.subplots_adjust(0.13, 0.15, 0.985, 0.97)
        for line in sorted(lines, key=lambda line: -(COLOURS if line.place is None else line.place)):
            _draw(ax, line)  # the first line last, on top of the others
        if level is not None:
            ax.axhline(level, color=INK, linestyle=":", linewidth=1)
            ax.annotate("chance", (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7)
        ax.set(xlabel=xlabel, ylabel=ylabel, **axes)
        ax.spines[["top", "right"]].set_visible(False)
        return _svg(figure, f"{ylabel} against {xlabel}")


def _draw(ax: Any, line: Line) -> None:
    own = line.place is not None and line.place < COLOURS
    shade, width = (f"#0a0b0{line.place}", 1.5) if own else (PALE, 0.9)
    style = {"color": shade, "linewidth": width, "markersize": 3.2, "linestyle": "--" if line.dashed else "-"}
    mark = "o" if line.marks else ""
    if not line.joined:
        ax.errorbar(line.x, line.y, line.ci95, fmt="o", color=shade, markersize=3.2, linewidth=1)
        return
    ax.plot(line.x, line.y, marker=mark, **style)
    if line.ci95 is not None and own:
        ax.fill_between(line.x, line.y - line.ci95, line.y + line.ci95, color=shade, alpha=0.16, linewidth=0)


def _svg(figure: Any, title: str) -> Html:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{title}">', svg, count=1
    )
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # the ids would not be unique in the page
    svg = re.sub(r"font-family: [^;\"]*(; )?", "", svg)  # the page sets the font
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d+\.\d{2})\d+", r"\1", tag[0]), svg)  # not in text
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    return Html(re.sub("|".join(_IN_CSS), lambda found: _IN_CSS[found[0]], svg))


_RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lgm_dist",
    "font.size": 8.5,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), GRID),
}
