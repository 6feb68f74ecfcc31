"""The look of a report's plots: colours, lines with names beside them, and SVG that follows the page's colours."""

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours that carry on white and on near-black. Lines differ in their markers too, for readers who do
# not see the colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "*", "<")
INK = "#010203"  # stands for the page's text colour until the SVG is done
HEAD = r"""<svg viewBox="\1" xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">"""
WIDTH = 7.2  # inches
GAP = 0.16  # inches between two names beside a plot
STYLE = {
    "svg.hashsalt": "offsite",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "xtick.color": INK,
    "ytick.color": INK,
}
"""Matplotlib's settings that hold while `plots` draws, and only then."""


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    Attributes:
      name: text beside the line's end; empty for no text.
      x: positions on the horizontal axis, as many as values.
      y: values; NaN for a missing value.
      colour: colour of line and markers.
      marker: matplotlib's letter of the marker; empty for no marker.
      style: matplotlib's line style; empty for markers alone.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    marker: str
    style: str = "-"


def draw_lines(axes: Axes, lines: Sequence[Line], *, bottom: float | None = None) -> None:
    """Draws lines with their names at the right, moved apart where names would overlap.

    Args:
      axes: axes that receive the lines and their limits.
      lines: lines to draw.
      bottom: lower end of the vertical axis; None fits it to the values.
    """
    for line in lines:
        axes.plot(
            line.x,
            line.y,
            color=line.colour,
            marker=line.marker,
            linestyle=line.style or "None",
            linewidth=1.6,
            markersize=9 if line.marker == "X" else 5,
        )
    if bottom is not None:
        axes.set_ylim(bottom, None)
    low, high = axes.get_ylim()
    named = [(line, _end(line)) for line in lines if line.name]
    wanted = [(end - low) / (high - low) if math.isfinite(end) else 0.0 for _, end in named]
    for (line, _), place in zip(named, spread_out(wanted, GAP * axes.figure.dpi / axes.bbox.height), strict=True):
        axes.plot(
            [1.015, 1.065],
            [place, place],
            color=line.colour,
            linestyle=line.style or "None",
            linewidth=1.6,
            transform=axes.transAxes,
            clip_on=False,
        )
        axes.plot(
            [1.04],
            [place],
            color=line.colour,
            marker=line.marker,
            markersize=5,
            transform=axes.transAxes,
            clip_on=False,
        )
        axes.text(1.08, place, line.name, transform=axes.transAxes, va="center")
    axes.set_ylim(low, high)


def spread_out(wanted: Sequence[float], gap: float) -> list[float]:
    """Returns places near the wanted places, in their order and at least `gap` apart, inside 0..1 while they fit."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[list[int]] = []
    for index in order:
        groups.append([index])
        while len(groups) > 1 and _start(groups[-1], wanted, gap) < _start(groups[-2], wanted, gap) + gap * len(
            groups[-2]
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    places = [0.0] * len(wanted)
    for group in groups:
        for rank, index in enumerate(group):
            places[index] = _start(group, wanted, gap) + gap * rank
    return places


def to_svg(figure: Figure, key: str) -> str:
    """Returns a figure as an SVG element in the page's text colour; its ids are unique on the page.

    Args:
      figure: figure that was drawn under `STYLE`.
      key: short name of the figure, which is put before every id.
    """
    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from", category=UserWarning
        )  # the browser has other fonts
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r'href="#', f'href="#{key}-', svg)
    svg = re.sub(r"url\(#", f"url(#{key}-", svg)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', HEAD, svg, count=1, flags=re.DOTALL)
    return svg.replace(INK, "currentColor").strip()


def _end(line: Line) -> float:
    known = [y for y in line.y if math.isfinite(y)]
    return known[-1] if known else math.nan


def _start(group: Sequence[int], wanted: Sequence[float], gap: float) -> float:
    """Returns the lowest place of a group with `gap` between its places, around the mean of its wishes, inside 0..1."""
    length = gap * (len(group) - 1)
    return max(0.0, min(1.0 - length, sum(wanted[i] for i in group) / len(group) - length / 2))
