"""Figures of a race: loss against time and against steps."""

from pathlib import Path
from typing import Any

import numpy as np

from kronfisher.experiments.figures import OTHERS, STYLE
from kronfisher.experiments.race.standings import Standings

__all__ = ["draw"]

# The same optimiser has the same colour in every figure.
COLOURS = {
    "sgd": "#999999",
    "adam": "#56B4E9",
    "adamw": "#56B4E9",
    "muon": "#009E73",
    "soap": "#E69F00",
    "shampoo": "#7570B3",
    "natural": "#D55E00",
    "kfac": "#0072B2",
}
MORE = (*OTHERS, "#E7298A", "#1B9E77", "#6A3D9A", "#B2DF8A", "#000000")
AXES = {
    "seconds": "training time in seconds",
    "cpu_seconds": "CPU time of training in seconds",
    "step": "steps",
    "epoch": "epochs",
}


def draw(
    standings: Standings, folder: Path, clocks: tuple[str, ...] = ("seconds", "cpu_seconds", "step")
) -> list[Path]:
    """Write ``<problem>-seconds.png`` and so on: a line per optimiser (median of seeds), a band from best to worst.

    Args:
        standings: with at least one result.
        folder: is made if need be.
        clocks: of "seconds", "cpu_seconds", "step" and "epoch".

    Returns:
        The paths of the files.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('figures are drawn by matplotlib: pip install "kronfisher[experiments]"') from error
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    folder.mkdir(parents=True, exist_ok=True)
    others = dict.fromkeys(_family(name) for name in standings.results if _family(name) not in COLOURS)
    colours = COLOURS | {name: MORE[k % len(MORE)] for k, name in enumerate(others)}
    paths, extra = [], standings.extra()
    with matplotlib.rc_context(STYLE):
        for clock in clocks:
            figure = Figure(figsize=(11.0, 4.6), layout="constrained")
            panels: Any = figure.subplots(1, 2)
            for axes, what in zip(panels, ("train_loss", f"test_{extra}"), strict=True):
                for name in standings.results:
                    style = {
                        "ls": "-" if name == _family(name) else "--",
                        "lw": 1.6 if name in standings.baselines else 2.2,
                    }
                    _line(axes, standings, name, what, clock, colours[_family(name)], style)
                axes.set_xlabel(AXES[clock])
                axes.set_title(what.replace("_", " ").replace("train", "training"))
                if extra == "error" or what == "train_loss":
                    axes.set_yscale("log")
                    axes.yaxis.set_major_formatter("{x:.3g}")
                    axes.yaxis.set_minor_formatter("{x:.3g}")
                    axes.yaxis.set_minor_locator(LogLocator(subs=(1.5, 2, 3, 4, 5, 7)))
                    axes.set_ylim(top=min(axes.get_ylim()[1], _top(standings, what)))
            if not clock.endswith("seconds"):
                for axes in panels:
                    axes.set_xscale("log")
            seeds = max(map(len, standings.results.values()))
            figure.suptitle(f"{standings.problem}, {seeds} seeds" if seeds > 1 else standings.problem)
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)))
            paths.append(folder / f"{standings.problem}-{clock}.png")
            figure.savefig(paths[-1])
    return paths


def _top(standings: Standings, what: str) -> float:
    """The highest value of the third evaluation: neither the start nor a run that explodes flattens all others."""
    runs = [each.points for results in standings.results.values() for each in results]
    early = [points[min(2, len(points) - 1)][what] for points in runs]
    start = max(points[0][what] for points in runs)
    return min(1.5 * start, 1.1 * max((value for value in early if np.isfinite(value)), default=start))


def _family(name: str) -> str:
    """``kpsvd`` of ``kpsvd@kfac``: the same method with other settings, drawn in broken lines of its colour."""
    return name.split("@")[0]


def _line(
    axes: Any, standings: Standings, name: str, what: str, clock: str, colour: str, style: dict[str, Any]
) -> None:
    """The runs of one optimiser, brought to common times."""
    curves = []
    for result in standings.results[name]:
        points = [(point[clock], point[what]) for point in result.points if np.isfinite(point[what])]
        if len(points) > 1:
            curves.append(np.array(points).T)
    if not curves:
        return
    begin = min(curve[0][1] for curve in curves) if not clock.endswith("seconds") else 0.0  # a logarithm has no zero
    grid = np.linspace(begin, min(curve[0][-1] for curve in curves), 200)
    values = np.stack([np.interp(grid, *curve) for curve in curves])
    axes.plot(grid, np.median(values, 0), color=colour, label=name, **style)
    if len(values) > 1:
        axes.fill_between(grid, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)
