"""Tables and figure of the studies of attribution."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kronfisher.experiments.figures import write_figures
from kronfisher.experiments.studies.findings import Findings, Record
from kronfisher.influence.statistics import Interval
from kronfisher.tables import Table, duration

__all__ = ["InfluenceFindings", "record"]


def record(problem: str, fit: str, measure: str, interval: Interval, seconds: float) -> Record:
    """One number of one fit."""
    return {
        "problem": problem,
        "fit": fit,
        "measure": measure,
        "value": interval.value,
        "low": interval.low,
        "high": interval.high,
        "seconds": seconds,
    }


@dataclass(frozen=True, eq=False)
class InfluenceFindings(Findings):
    """One number with its interval for every fit and measure."""

    def tables(self) -> list[Table]:
        """A row for each fit, a column for each measure, with 95 % confidence intervals."""
        measures = self.distinct("measure")
        title = f"{self.settings['study']}: mean and 95 % confidence interval"
        table = Table(title, ("", *measures, "estimate and scores"))
        for fit in self.distinct("fit"):
            rows = {row["measure"]: row for row in self.select(fit=fit)}
            seconds = max((row["seconds"] for row in rows.values()), default=0.0)
            cells = [str(_interval(rows[name])) if name in rows else "" for name in measures]
            table.add(fit, *cells, duration(seconds) if seconds else "")
        return [table]

    def notes(self) -> list[str]:
        """What was trained, in words."""
        return [*(str(network["note"]) for network in self.networks if "note" in network), *super().notes()]

    def draw(self, folder: str | Path) -> list[Path]:
        """A panel for each measure, a point with its interval for each fit."""
        measures, fits = self.distinct("measure"), self.distinct("fit")

        def figures() -> Iterator[tuple[str, Any]]:
            from matplotlib.figure import Figure

            figure = Figure(figsize=(1.8 + 2.6 * len(measures), 1.2 + 0.3 * len(fits)), layout="constrained")
            panels = figure.subplots(1, len(measures), squeeze=False, sharey=True)[0]
            for axes, measure in zip(panels, measures, strict=True):
                for row in self.select(measure=measure):
                    spread = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
                    axes.errorbar(row["value"], fits.index(row["fit"]), xerr=spread, fmt="o", ms=5, color="#0072B2")
                axes.set_title(measure, fontsize=10)
                axes.set_yticks(range(len(fits)), fits)
                axes.set_ylim(len(fits) - 0.5, -0.5)
            yield f"influence-{self.settings['study']}", figure

        return write_figures(folder, figures) if measures else []


def _interval(row: Record) -> Interval:
    return Interval(row["value"], row["low"], row["high"])
