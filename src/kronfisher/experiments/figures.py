"""Pictures of a comparison: errors and costs, and what one block looks like under each fit."""

from collections.abc import Callable, Iterable, Iterator
from math import ceil, isfinite
from pathlib import Path
from typing import Any

from kronfisher.estimation.comparison import Comparison, Row
from kronfisher.fits import FITS
from kronfisher.tables import duration, size

__all__ = ["draw", "write_figures"]

TRUTH = "#444444"  # of the exact blocks
# Okabe and Ito's colours first, distinct for colour-blind eyes too.
OKABE_ITO = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#0072B2", "#8C6BB1", "#D55E00")
OTHERS = ("#A6761D", "#999933", "#882255", "#44AA99", "#332288", "#DDCC77", "#AA4499", "#88CCEE", "#117733", "#661100")
_ACROSS = 9  # matrices of a block in a row
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "font.size": 10,
    "legend.frameon": False,
    "figure.dpi": 120,
}


def draw(comparison: Comparison, folder: str | Path, name: str = "comparison") -> list[Path]:
    """Write the figures of a comparison as PNG files.

    ``<name>.png`` has the relative error of every block and fit beside time against error; ``<name>-block.png`` shows
    the matrix and the spectrum of one small block under each fit, if there is a small one.

    Args:
        comparison: rows without numbers are left out.
        folder: is made if need be.
        name: what the files are called.

    Returns:
        The paths of the files written; none if no fit has numbers.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows = [row for row in comparison.rows if isfinite(row.error)]
    if not rows:
        return []
    colours = colours_of([row.fit for row in rows])

    def figures() -> Iterator[tuple[str, Any]]:
        yield name, _overview(rows, colours, comparison.settings)
        if rows[0].shown is not None:
            block = rows[0].shown[0]
            yield f"{name}-block", _block([row for row in rows if row.shown and row.shown[0] == block], colours)

    return write_figures(folder, figures)


def colours_of(fits: Iterable[str]) -> dict[str, str]:
    """Fit → colour: by the order of registration, so that a fit has the same colour in every picture; others follow.

    Example:
        >>> colours_of(["kfac", "mine"])["kfac"] == colours_of(["full", "kfac"])["kfac"]
        True
    """
    palette = (*OKABE_ITO, *OTHERS)
    order = [fit for fit in dict.fromkeys([*FITS, *fits]) if fit != "full"]
    return {"full": TRUTH} | {fit: palette[k % len(palette)] for k, fit in enumerate(order)}


def write_figures(folder: str | Path, figures: Callable[[], Iterable[tuple[str, Any]]]) -> list[Path]:
    """Draw figures in the common style and write them as PNG files.

    Args:
        folder: is made if need be.
        figures: gives names and matplotlib figures.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('figures are drawn by matplotlib: pip install "kronfisher[experiments]"') from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context(STYLE):
        for name, figure in figures():
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1])
    return paths


def _overview(rows: list[Row], colours: dict[str, str], settings: Any) -> Any:
    """Left: grouped bars of relative errors. Right: time against error, with the memory in the legend."""
    from matplotlib.figure import Figure

    blocks = list(dict.fromkeys(name for row in rows for name in row.blocks))
    wide = min(14.0, max(7.0, 2.0 + 0.13 * (len(blocks) + 1) * len(rows)))
    entries = 5  # of the legend in a row
    height = 4.2 + 0.2 * ceil(len(rows) / entries)
    figure = Figure(figsize=(wide + 4.0, height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[wide, 4.0])
    width = 0.8 / len(rows)
    for k, row in enumerate(rows):
        heights = [row.error, *(row.blocks.get(name, float("nan")) for name in blocks)]
        places = [j + (k - (len(rows) - 1) / 2) * width for j in range(len(heights))]
        left.bar(places, heights, 0.92 * width, color=colours[row.fit], label=row.fit)
        right.scatter(row.seconds, row.error, s=90, color=colours[row.fit], edgecolors="white", zorder=3, clip_on=False)
    left.axvspan(-0.5, 0.5, color="#f4f4f4", zorder=0)
    left.set_xlim(-0.5, len(blocks) + 0.5)
    slanted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len(blocks) > 5 else {}
    left.set_xticks(range(len(blocks) + 1), ["all blocks", *map(_short, blocks)], **slanted)
    left.grid(visible=False, axis="x")
    left.set_ylabel("relative error  ‖F̂ − F‖ / ‖F‖")
    left.set_title(f"How far each fit is from the Fisher matrix{_of(settings)}")
    right.set_xscale("log")
    low, high = min(row.seconds for row in rows) / 1.5, max(row.seconds for row in rows) * 1.5
    digits = (1, 2, 5) if high < 30 * low else (1, 3)  # labels closer than these would touch
    ticks = [digit * 10.0**k for k in range(-7, 7) for digit in digits if low <= digit * 10.0**k <= high]
    ticks = ticks if len(ticks) <= 8 else ticks[:: ceil(len(ticks) / 6)]
    right.set_xlim(low, high)
    right.set_xticks(ticks, map(duration, ticks))
    right.minorticks_off()
    right.set_xlabel(f"wall time of the estimate, {rows[0].count:,} examples")
    right.set_ylabel("relative error, all blocks")
    right.set_title("What it costs")
    for axes in (left, right):
        axes.set_ylim(0, 1.08 * max(1e-3, *(max(row.error, *row.blocks.values()) for row in rows)))
    labels = [f"{row.fit} ({size(row.bytes)})" for row in rows]
    figure.legend(left.containers, labels, loc="outside lower center", ncols=min(entries, len(rows)))
    return figure


def _block(rows: list[Row], colours: dict[str, str]) -> Any:
    """Above: the dense matrix of a small block under each fit, one colour scale. Below: its eigenvalues."""
    import torch
    from matplotlib.figure import Figure

    rows = sorted(rows, key=lambda row: row.fit != "full")  # the truth comes first
    shown = {row.fit: row.shown[1].double() for row in rows if row.shown is not None}
    names = {row.shown[0] for row in rows if row.shown is not None}
    # The few largest entries, all on the diagonal, would leave the others white.
    limit = float(torch.stack([matrix.abs().quantile(0.98) for matrix in shown.values()]).max()) or 1.0
    lines = ceil(len(shown) / _ACROSS)
    across = ceil(len(shown) / lines)
    heights = 0.5 + 2.8 * lines, 3.0
    figure = Figure(figsize=(max(8.0, 2.4 * across + 0.9), sum(heights)), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=heights)
    above, below = halves
    places = above.subplots(lines, across, squeeze=False).flatten()
    panels = places[: len(shown)]
    for axes in places[len(shown) :]:
        axes.set_axis_off()
    image = None
    for axes, (fit, matrix) in zip(panels, shown.items(), strict=True):
        image = axes.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axes.set_title(fit, loc="center", color=colours[fit])
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        axes.spines[:].set_visible(True)
    above.colorbar(image, ax=list(places), label="entry", shrink=0.8, pad=0.015, extend="both")
    dim = len(next(iter(shown.values())))
    above.suptitle(f"{', '.join(map(_short, names))}: its block, {dim} × {dim}, under each fit", fontsize=12)
    axes = below.subplots()
    for k, (fit, matrix) in enumerate(shown.items()):
        values = torch.linalg.eigvalsh(matrix).flip(0)
        values = values[values > 1e-6 * values[0]]  # below is rounding
        # The truth is a broad band below; broken lines lie above solid ones, so that equal spectra both show.
        style: Any = {"lw": 6, "alpha": 0.3} if fit == "full" else {"lw": 1.8, "ls": ("-", "--")[k % 2]}
        axes.plot(range(1, len(values) + 1), values.numpy(), color=colours[fit], label=fit, zorder=2 + k % 2, **style)
    axes.set_yscale("log")
    axes.set_xlabel("rank of the eigenvalue")
    axes.set_ylabel("eigenvalue")
    axes.set_title("Its spectrum")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=ceil(len(shown) / 10))
    return figure


def _short(name: str) -> str:
    return name.replace(".weight", "")


def _of(settings: Any) -> str:
    return f" of {settings['network']} on {settings['data']}" if "network" in settings and "data" in settings else ""
