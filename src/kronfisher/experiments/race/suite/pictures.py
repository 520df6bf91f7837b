"""Figures of the suite: training loss against CPU time, problem by problem, and ours beside the best baseline."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from kronfisher.experiments.figures import STYLE
from kronfisher.experiments.race.pictures import COLOURS, MORE
from kronfisher.experiments.race.suite.contestants import BASELINES
from kronfisher.experiments.race.suite.lot import HALVES, half
from kronfisher.experiments.race.suite.table import Results

__all__ = ["draw"]

COLUMNS = 3


def draw(results: Results, folder: Path) -> list[Path]:
    """Write ``suite-<half>.png`` for each half that has results, and ``suite-shares.png`` if there are verdicts.

    Args:
        results: with at least one run.
        folder: is made if need be.

    Returns:
        The paths of the files.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('figures are drawn by matplotlib: pip install "kronfisher[experiments]"') from error
    folder.mkdir(parents=True, exist_ok=True)
    others = [name for name in results.names if name not in COLOURS]
    colours = COLOURS | {name: MORE[k % len(MORE)] for k, name in enumerate(others)}
    paths = []
    with matplotlib.rc_context(STYLE):
        for which in HALVES:
            if problems := [problem for problem in half(which) if problem in results.grouped]:
                paths.append(folder / f"suite-{which}.png")
                _curves(results, problems, which, colours).savefig(paths[-1])
        if any(results.verdicts(name) for name in results.names):
            paths.append(folder / "suite-shares.png")
            _shares(results, colours).savefig(paths[-1])
    return paths


def _curves(results: Results, problems: list[str], which: str, colours: dict[str, str]) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    rows = math.ceil(len(problems) / COLUMNS)
    figure = Figure(figsize=(11.0, 2.9 * rows + 0.6), layout="constrained")
    panels: Any = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for axes, problem in zip(panels, problems, strict=False):
        for name, runs in results.grouped[problem].items():
            grid = np.linspace(0, min(run.points[-1]["seconds"] for run in runs), 100)
            curves = [
                np.interp(grid, *np.array([(p["seconds"], p["train_loss"]) for p in run.points]).T) for run in runs
            ]
            style = {"lw": 1.4, "ls": "--"} if name in BASELINES else {"lw": 2.0}
            axes.plot(grid, np.median(curves, 0), color=colours[name], label=name, **style)
        axes.set_title(problem)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.yaxis.set_minor_formatter("{x:.3g}")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 4)))
    for axes in panels[len(problems) :]:
        axes.set_visible(False)
    figure.suptitle(f"training loss against CPU seconds, {which} half")
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, len(handles)))
    return figure


def _shares(results: Results, colours: dict[str, str]) -> Any:
    """Time to the best baseline's final loss over the budget; runs that never got there stand to the right of one."""
    from matplotlib.figure import Figure

    problems = [problem for problem in half("") if any(problem in results.verdicts(name) for name in results.names)]
    figure = Figure(figsize=(7.0, 0.32 * len(problems) + 1.6), layout="constrained")
    axes: Any = figure.subplots()
    for name in results.names:
        verdicts = results.verdicts(name)
        shown = [(min(verdicts[p].share, 1.1), k) for k, p in enumerate(problems) if p in verdicts]
        if shown:
            axes.plot(*zip(*shown, strict=True), "o", color=colours[name], label=name)
    axes.axvline(1.0, color="#999999", lw=1)
    axes.set_xlim(0, 1.15)
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.1], ["0", "0.2", "0.4", "0.6", "0.8", "1", "never"])
    axes.set_yticks(range(len(problems)), problems)
    axes.invert_yaxis()
    axes.set_xlabel("time to the best baseline's final training loss, share")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    return figure
