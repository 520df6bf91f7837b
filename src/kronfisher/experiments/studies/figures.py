"""Pictures of the studies: panels of curves with bands."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from kronfisher.experiments.figures import write_figures

__all__ = ["Curve", "Panel", "bands"]

# A family of fits has a colour, the same as in the other pictures; its members have strokes of their own.
LOOKS: Mapping[str, tuple[str, str]] = {
    "diagonal": ("#E69F00", "-"),
    "K-FAC": ("#0072B2", "-"),
    "TKFAC": ("#CC79A7", "-"),
    "KL": ("#56B4E9", "-"),
    "K-FOC approx": ("#D55E00", ":"),
    "K-FOC running": ("#D55E00", "-."),
    "K-FOC memory": ("#D55E00", "--"),
    "K-FOC exact": ("#D55E00", "-"),
    "rank 2": ("#444444", "-"),
    "rank 4": ("#444444", "--"),
    "nonnegative rank 2": ("#8C6BB1", "-"),
    "nonnegative rank 4": ("#8C6BB1", "--"),
    "KPSVD": ("#D55E00", "-"),
    "KFAC-corrected": ("#56B4E9", "-"),
    "deflation": ("#444444", "-"),
    "Lanczos": ("#A6761D", "--"),
    "nonnegative": ("#8C6BB1", "-"),
    "EKFAC on K-FAC": ("#009E73", "-"),
    "EKFAC on K-FOC": ("#009E73", "--"),
}


@dataclass(frozen=True)
class Curve:
    """One line: its places, and the mean and the half width of the band at each."""

    name: str
    places: Sequence[float]
    values: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """The curves under one title."""

    title: str
    curves: Sequence[Curve]
    y: str


def bands(
    panels: Sequence[Panel],
    folder: str | Path,
    name: str,
    *,
    x: str,
    columns: int = 4,
    ticks: Mapping[int, str] | None = None,
) -> list[Path]:
    """Write one PNG file with all panels side by side under one legend.

    Args:
        panels: those without curves are left out; if there are none left, nothing is drawn.
        folder: is made if need be.
        name: of the file, without its ending.
        x: what the horizontal axis means.
        columns: panels in a row.
        ticks: labels of the horizontal axis by place; None: a symmetric logarithmic axis.

    Returns:
        The path, or none.

    Raises:
        ImportError: matplotlib is not installed.
    """
    shown = [panel for panel in panels if panel.curves]

    def figures() -> Iterator[tuple[str, Any]]:
        from matplotlib.figure import Figure

        rows, wide = ceil(len(shown) / columns), min(columns, len(shown))
        figure = Figure(figsize=(max(6.0, 3.6 * wide), 3.1 * rows + 0.9), layout="constrained")
        grid = figure.subplots(rows, wide, squeeze=False).flatten()
        lines: dict[str, Any] = {}
        for k, (axes, panel) in enumerate(zip(grid, shown, strict=False)):
            for curve in panel.curves:
                colour, stroke = LOOKS.get(curve.name, ("#000000", "-"))
                low, high = ([mean + sign * half for mean, half in curve.values] for sign in (-1, 1))
                axes.fill_between(curve.places, low, high, color=colour, alpha=0.15, linewidth=0)
                means = [mean for mean, _ in curve.values]
                (line,) = axes.plot(curve.places, means, color=colour, ls=stroke, marker="o", markersize=3)
                lines.setdefault(curve.name, line)
            axes.set_title(panel.title, fontsize=10)
            highest = max(mean + half for curve in panel.curves for mean, half in curve.values)
            axes.set_ylim(0, 1.05 * highest or 1.0)
            axes.set_xlabel(x if k + wide >= len(shown) else "")
            axes.set_ylabel(panel.y)
            if ticks is None:
                last = max(max(curve.places) for curve in panel.curves)
                powers = [0, *(10**k for k in range(8) if 10**k <= last)]
                axes.set_xscale("symlog", linthresh=1)
                axes.set_xlim(-0.1, 1.3 * last)
                axes.set_xticks(powers, [f"{power:,}" for power in powers])
                axes.minorticks_off()
            else:
                axes.set_xticks(list(ticks), list(ticks.values()))
        for axes in grid[len(shown) :]:
            axes.set_visible(False)
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(6, max(2, 2 * wide)))
        yield name, figure

    return write_figures(folder, figures) if shown else []
