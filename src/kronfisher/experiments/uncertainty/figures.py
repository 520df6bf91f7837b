"""Pictures of the studies of uncertainty."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kronfisher.experiments.figures import write_figures
from kronfisher.experiments.studies.figures import LOOKS
from kronfisher.experiments.studies.findings import Findings, deviation

__all__ = ["differences", "measures", "regression"]


def _colour(fit: str) -> str:
    return LOOKS.get(fit, ("#444444", "-"))[0]


def differences(
    truth: Mapping[str, Sequence[float]], others: Mapping[str, Mapping[str, Sequence[float]]], folder: str | Path
) -> list[Path]:
    """For every set the test log likelihoods less those of the exact blocks, split by split, with standard errors.

    Args:
        truth: set → log likelihoods of the exact blocks, one for each split.
        others: fit → the same; a fit with other splits than the truth is left out.
        folder: is made if need be.
    """

    def figures() -> Iterator[tuple[str, Any]]:
        from matplotlib.figure import Figure

        columns = min(5, len(truth))
        rows = -(-len(truth) // columns)
        figure = Figure(figsize=(3.0 * columns + 1.6, 0.28 * len(others) * rows + 1.2 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
        for axes, (problem, exact) in zip(grid, truth.items(), strict=False):
            for place, (fit, values) in enumerate(others.items()):
                own = values[problem]
                if not own or len(own) != len(exact):
                    continue
                average, spread = deviation(a - b for a, b in zip(own, exact, strict=True))
                error = spread / len(own) ** 0.5
                axes.errorbar(average, place, xerr=error, fmt="o", color=_colour(fit), markersize=5, capsize=2)
            axes.axvline(0.0, color="#444444", lw=1)
            axes.set_title(problem, fontsize=10)
            axes.set_yticks(range(len(others)), list(others))
            axes.set_ylim(len(others) - 0.5, -0.5)
        for axes in grid[len(truth) :]:
            axes.set_visible(False)
        figure.supxlabel("test log likelihood less that of the exact blocks, nats an example", fontsize=10)
        yield "uncertainty-uci", figure

    return write_figures(folder, figures) if truth else []


def measures(findings: Findings, folder: str | Path, names: Mapping[str, str], same: str) -> list[Path]:
    """A panel for each measure with a point for each fit, hollow where its name ends with `same`."""
    fits = findings.distinct("fit")

    def figures() -> Iterator[tuple[str, Any]]:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.4 * len(names) + 1.8, 0.32 * len(fits) + 1.2), layout="constrained")
        panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
        for axes, (key, title) in zip(panels, names.items(), strict=True):
            values = [[row[key] for row in findings.select(fit=fit)] for fit in fits]
            for place, (fit, points) in enumerate(zip(fits, values, strict=True)):
                fill = "white" if fit.endswith(same) else None
                average, spread = deviation(points)
                colour = _colour(fit.removesuffix(same))
                axes.errorbar(average, place, xerr=spread, fmt="o", color=colour, markerfacecolor=fill)
            axes.set_title(title, fontsize=10)
            axes.set_yticks(range(len(fits)), fits)
            axes.set_ylim(len(fits) - 0.5, -0.5)
        yield "uncertainty-ood", figure

    return write_figures(folder, figures) if fits else []


def regression(findings: Findings, folder: str | Path) -> list[Path]:
    """Data, mean, drawn functions, and bands of two standard deviations with and without noise."""

    def figures() -> Iterator[tuple[str, Any]]:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.4 * len(findings.rows), 3.3), layout="constrained")
        panels = figure.subplots(1, len(findings.rows), squeeze=False, sharey=True)[0]
        grid = findings.settings["grid"]
        for axes, row in zip(panels, findings.rows, strict=True):
            for extra, shade in ((row["noise"], 0.15), (0.0, 0.3)):
                wide = [2 * (deviation**2 + extra) ** 0.5 for deviation in row["epistemic"]]
                low, high = ([m + sign * w for m, w in zip(row["mean"], wide, strict=True)] for sign in (-1, 1))
                axes.fill_between(grid, low, high, color="#0072B2", alpha=shade, linewidth=0)
            for function in row["functions"]:
                axes.plot(grid, function, color="#0072B2", lw=0.7, alpha=0.6)
            axes.plot(grid, row["mean"], color="#003A5D", lw=1.8)
            axes.plot(findings.settings["x"], findings.settings["y"], ".", color="#D55E00", markersize=4)
            axes.set_ylim(-4, 4)
            axes.set_xlim(grid[0], grid[-1])
            axes.set_title(f"{row['fit']}: log evidence {row['evidence']:.1f}", fontsize=10)
        yield "uncertainty", figure

    return write_figures(folder, figures)
