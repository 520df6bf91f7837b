"""Tables and figure of the regression on the UCI sets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from kronfisher.experiments.studies.findings import Findings, deviation
from kronfisher.tables import Table, count, duration, number

__all__ = ["TRUTH", "TUNED", "UCIFindings"]

TUNED = {
    "marginal": "prior and noise by the fit's own marginal likelihood",
    "training": "prior by the fit's own marginal likelihood, noise from the training residuals",
    "borrowed": "prior and noise by the exact blocks' marginal likelihood",
}
TRUTH = "exact blocks"


@dataclass(frozen=True, eq=False)
class UCIFindings(Findings):
    """Test log likelihoods by set and fit, and what the posteriors cost."""

    def tables(self) -> list[Table]:
        """Means and standard errors for every way to tune, how much of the way to the exact blocks, and the seconds."""
        gaps = [self._gaps(tuned) for tuned in ("marginal", "borrowed")]
        return [*(self._likelihoods(tuned) for tuned in TUNED), *gaps, self._costs()]

    def values(self, problem: str, fit: str, tuned: str) -> list[float]:
        """Test log likelihoods, one for each split."""
        if fit == TRUTH and tuned == "borrowed":
            tuned = "marginal"
        return [row[tuned]["log_likelihood"] for row in self.select(problem=problem, fit=fit) if tuned in row]

    @property
    def fits(self) -> list[str]:
        """The fits in the order of the settings, others after them."""
        known = list(self.settings["fits"])
        return [*known, *(fit for fit in self.distinct("fit") if fit not in known)]

    def _likelihoods(self, tuned: str) -> Table:
        problems = list(dict.fromkeys(row["problem"] for row in self.networks))
        table = Table(f"Test log likelihood, mean ± standard error over splits; {TUNED[tuned]}", ("", *problems))
        networks = {name: [row for row in self.networks if row["problem"] == name] for name in problems}
        table.add("splits", *(str(len(networks[name])) for name in problems))
        table.add("RMSE (of all)", *(_mean([row["rmse"] for row in networks[name]]) for name in problems))
        table.add("MAP", *(_mean([row["log_likelihood"] for row in networks[name]]) for name in problems))
        for fit in self.fits:
            if any(cells := [self.values(name, fit, tuned) for name in problems]):
                sizes = [len(networks[name]) for name in problems]
                table.add(fit, *(_mean(own, size) for own, size in zip(cells, sizes, strict=True)))
        return table

    def _gaps(self, tuned: str) -> Table:
        """The share of the difference between K-FAC, tuned by itself, and the exact blocks that a fit makes up."""
        problems = self.distinct("problem")
        title = f"Share of the way from K-FAC as it is (0) to the exact blocks (1), of means; {TUNED[tuned]}"
        table = Table(title, ("", *problems, "median"))
        for fit in self.settings["fits"]:
            shares = []
            for name in problems:
                start, end = (self.values(name, it, "marginal") for it in ("K-FAC", TRUTH))
                own = self.values(name, fit, tuned)
                complete = start and end and len(start) == len(end) == len(own)
                way = sum(end) - sum(start) if complete else 0.0
                shares.append((sum(own) - sum(start)) / way if way else math.nan)
            known = [share for share in shares if math.isfinite(share)]
            if known:
                table.add(fit, *(number(share, 2) for share in shares), number(median(known), 2))
        return table

    def _costs(self) -> Table:
        table = Table(
            "Seconds of one thread and bytes, medians over all networks", ("", "estimate", "tune", "predict", "bytes")
        )
        for fit in self.fits:
            if not (rows := [row for row in self.select(fit=fit) if "marginal" in row]):
                continue
            tune, predict = (median(row["marginal"]["seconds"][k] for row in rows) for k in (0, 1))
            size = count(median(row["bytes"] for row in rows) if "bytes" in rows[0] else math.nan)
            table.add(fit, duration(median(row["seconds"] for row in rows)), duration(tune), duration(predict), size)
        return table

    def draw(self, folder: str | Path) -> list[Path]:
        """Test log likelihood of every fit relative to the exact blocks', set by set; one PNG file."""
        from kronfisher.experiments.uncertainty.figures import differences

        names, others = self.distinct("problem"), [fit for fit in self.settings["fits"] if fit != TRUTH]
        truth = {name: self.values(name, TRUTH, "marginal") for name in names}
        return differences(
            truth, {fit: {name: self.values(name, fit, "marginal") for name in names} for fit in others}, folder
        )


def _mean(values: Sequence[float], all_splits: int | None = None) -> str:
    if not values:
        return "–"
    average, spread = deviation(values)
    fewer = (
        "" if all_splits in (None, len(values)) else f" ({len(values)} splits)"
    )  # not to be compared with the others
    return f"{average:.3f} ± {spread / len(values) ** 0.5:.3f}{fewer}"
