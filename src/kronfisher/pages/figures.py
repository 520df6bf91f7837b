"""Pictures inside a page: SVG in the colours of the page, with a title and a description of what is to be seen."""

import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["COLOURS", "Figure", "bars", "figure", "lines"]

# Okabe and Ito's colours, distinct for colour-blind eyes too, and readable on white as on dark.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6BB1", "#999933", "#44AA99", "#AA4499")
_TEXT, _GRID = "#010203", "#040506"  # stand for colours of the page, which change between light and dark


@dataclass(frozen=True)
class Figure:
    """A picture.

    Attributes:
        svg: its text.
        caption: a line below it.
    """

    svg: str
    caption: str = ""


def figure(
    draw: Callable[[Any], None], title: str, alt: str, caption: str = "", size: tuple[float, float] = (9.0, 3.6)
) -> Figure:
    """A picture that `draw` puts into axes of matplotlib.

    Args:
        draw: called with the axes.
        title: of the picture, another one for each of a page.
        alt: what it shows, in words.
        caption: a line below it.
        size: in inches, on a page of usual width.

    Raises:
        ImportError: matplotlib is missing; ``pip install "kronfisher[report]"``.

    Example:
        >>> drawn = figure(lambda axes: axes.plot([1, 2]), "Up", "A line that rises from 1 to 2.")
        >>> "<title>Up</title><desc>A line that rises from 1 to 2.</desc>" in drawn.svg
        True
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure as Canvas
        from matplotlib.rcsetup import cycler
    except ImportError as error:
        raise ImportError('figures are drawn by matplotlib: pip install "kronfisher[report]"') from error
    settings: Any = {
        "svg.fonttype": "none",  # text remains text, in the page's own font
        "svg.hashsalt": "kronfisher",
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": _TEXT,
        "axes.labelcolor": _TEXT,
        "axes.edgecolor": _GRID,
        "xtick.color": _TEXT,
        "ytick.color": _TEXT,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": _GRID,
        "grid.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "legend.frameon": False,
        "axes.prop_cycle": cycler(color=COLOURS),
    }
    with matplotlib.rc_context(settings):
        canvas = Canvas(figsize=size, layout="constrained")
        FigureCanvasSVG(canvas)
        axes = canvas.add_subplot()
        axes.set_title(title)
        draw(axes)
        file = io.StringIO()
        nothing: Any = {"Date": None, "Creator": None, "Format": None, "Type": None}
        canvas.savefig(file, format="svg", transparent=True, metadata=nothing)
    return Figure(_inside(file.getvalue(), title, alt), caption)


def bars(names: Sequence[str], values: Sequence[float], label: str) -> Callable[[Any], None]:
    """What draws a horizontal bar for each name, the first on top."""

    def draw(axes: Any) -> None:
        axes.barh(range(len(names)), values, height=0.7)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.grid(visible=False, axis="y")

    return draw


def lines(
    curves: Sequence[tuple[str, Sequence[float], Sequence[float]]], x: str, y: str, *, log: str = ""
) -> Callable[[Any], None]:
    """What draws a curve for each (name, places, values), with a legend if there are several.

    Args:
        curves: name, places and values of each.
        x: label of the places.
        y: label of the values.
        log: axes with logarithmic scales, such as ``"xy"``.
    """

    def draw(axes: Any) -> None:
        for name, places, values in curves:
            axes.plot(places, values, label=name, linewidth=1.6, marker="." if len(places) < 12 else None)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if "x" in log:
            axes.set_xscale("log")
        if "y" in log:
            axes.set_yscale("log")
        if len(curves) > 1:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8.5)

    return draw


def _inside(svg: str, title: str, alt: str) -> str:
    """SVG as a part of a page: names of its own, colours of the page, a title and a description."""
    prefix = re.sub(r"\W+", "-", title.lower())
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\bid=\"", f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    svg = re.sub(r"xlink:href=\"#", f'href="#{prefix}-', svg)
    svg = svg.replace(_TEXT, "var(--text)").replace(_GRID, "var(--line)")
    described = f"<title>{html.escape(title)}</title><desc>{html.escape(alt)}</desc>"
    label = f'role="img" aria-label="{html.escape(f"{title}. {alt}")}"'
    svg = re.sub(r"\s+xmlns(:xlink)?=\"[^\"]*\"", "", svg)  # HTML knows them
    return re.sub(r"<svg([^>]*)>", rf"<svg\1 {label}>{_literal(described)}", svg, count=1)


def _literal(text: str) -> str:
    return text.replace("\\", "\\\\")
