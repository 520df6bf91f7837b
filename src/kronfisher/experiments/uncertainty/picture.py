"""A regression in one dimension: predictions of posteriors of one network, between the data and beyond them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from kronfisher.estimation.estimate import estimate
from kronfisher.experiments.data.dataset import Dataset, generator
from kronfisher.experiments.networks.feedforward import mlp
from kronfisher.experiments.progress import Say, Step, ignore
from kronfisher.experiments.studies.findings import Findings, Record
from kronfisher.experiments.training import train
from kronfisher.fits import KFAC, KFOC, Diagonal, Fit, Full
from kronfisher.laplace import Laplace
from kronfisher.likelihoods import Gaussian
from kronfisher.tables import Table

__all__ = ["Picture", "PictureFindings"]

FITS: Mapping[str, Fit] = {
    "diagonal": Diagonal(),
    "K-FAC": KFAC(),
    "K-FOC": KFOC(),
    "exact": Full(across_layers=True),
}


@dataclass(frozen=True)
class Picture:
    """The settings: noisy values of sin x with a gap in the middle, and a small tanh network.

    Attributes:
        data: points in all.
        epochs: of training.
        fits: by the name they are shown under.
        data_dir: not needed.
    """

    data: int = 120
    epochs: int = 4000
    fits: Mapping[str, Fit] = field(default_factory=lambda: FITS)
    data_dir: Path | None = None

    @classmethod
    def quick(cls, data_dir: Path | None = None) -> Self:
        """The same in a second."""
        return cls(40, 20)

    def check(self) -> None:
        """Nothing can be missing."""

    def run(
        self,
        say: Say = ignore,
        step: Step = ignore,
    ) -> "PictureFindings":
        """Train the network and compute the bands."""
        random = generator(0)
        distances = torch.rand(self.data, generator=random) * 2.0 + 1.2
        signs = torch.where(torch.arange(self.data) % 2 == 0, -1.0, 1.0)
        x = (distances * signs)[:, None]
        y = (1.5 * x).sin() + 0.15 * torch.randn(self.data, 1, generator=random)
        model = mlp(1, (30,), 1, activation="tanh", seed=1)
        dataset = Dataset("sine", x, y, x, y, "values", 1)
        train(model, dataset, epochs=self.epochs, batch_size=self.data, lr=1e-2, weight_decay=1e-4)
        model, x, y = model.double(), x.double(), y.double()
        grid = torch.linspace(-5, 5, 201, dtype=torch.float64)[:, None]
        rows: list[Record] = []
        for label, fit in self.fits.items():
            step(label, len(rows), len(self.fits))
            fisher = estimate(model, [(x, y)], Gaussian(), fit=fit, labels="exact")
            posterior = Laplace(model, fisher).optimize_prior(noise=True)
            prediction = posterior.predict(grid)
            rows.append(
                {
                    "problem": "sine",
                    "fit": label,
                    "mean": prediction.mean.flatten().tolist(),
                    "epistemic": prediction.epistemic_variance.flatten().sqrt().tolist(),
                    "noise": posterior.noise,
                    "prior_precision": float(next(iter(posterior.prior_precision.values()))),
                    "evidence": float(posterior.log_marginal_likelihood()),
                    "functions": posterior.functional_samples(grid, 5)[..., 0].tolist(),
                }
            )
            say(f"{label}: evidence {rows[-1]['evidence']:.2f}")
        settings = {
            "study": "picture",
            "data": self.data,
            "epochs": self.epochs,
            "fits": {name: repr(fit) for name, fit in self.fits.items()},
            "grid": grid.flatten().tolist(),
            "x": x.flatten().tolist(),
            "y": y.flatten().tolist(),
        }
        return PictureFindings(settings, (), rows)


@dataclass(frozen=True, eq=False)
class PictureFindings(Findings):
    """Means and bands on a grid."""

    def tables(self) -> list[Table]:
        """Evidence and standard deviations at the data, in the gap and beyond."""
        places = {"at the data": 2.0, "in the gap": 0.0, "beyond": 5.0}
        header = ("", "log evidence", "noise", *(f"± {name}" for name in places))
        table = Table("A regression in one dimension: standard deviations of the function", header)
        grid: Any = self.settings["grid"]
        for row in self.rows:
            at = [min(range(len(grid)), key=lambda k, place=place: abs(grid[k] - place)) for place in places.values()]
            deviations = (f"{row['epistemic'][k]:.3f}" for k in at)
            table.add(row["fit"], f"{row['evidence']:.1f}", f"{row['noise'] ** 0.5:.3f}", *deviations)
        return [table]

    def draw(self, folder: str | Path) -> list[Path]:
        """One panel for each fit; one PNG file."""
        from kronfisher.experiments.uncertainty.figures import regression

        return regression(self, folder)
