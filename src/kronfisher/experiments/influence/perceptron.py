"""A perceptron on MNIST: scores of one network, and averages over several, against training on halves of the data."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from torch import nn

from kronfisher.experiments import data
from kronfisher.experiments.influence.fits import FITS
from kronfisher.experiments.influence.halves import HalvesStudy
from kronfisher.experiments.influence.retraining import Trainer
from kronfisher.experiments.networks.feedforward import mlp

__all__ = ["PerceptronStudy"]


@dataclass(frozen=True)
class PerceptronStudy(HalvesStudy):
    """The settings of the study.

    Attributes:
        hidden: widths of the hidden layers.
    """

    study: ClassVar[str] = "perceptron"
    dataset: str = "mnist"
    models: int = 10
    averaged: tuple[str, ...] = ("EKFAC",)
    folder: Path = Path("results/influence-perceptron")
    hidden: tuple[int, ...] = (128, 64)

    @classmethod
    def quick(cls, data_dir: Path | None = None) -> Self:
        """A few seconds of it, on digits."""
        fits = ("identity", "EKFAC")
        return cls("digits", 300, 10, 60, 12, models=2, fits=fits, hidden=(16,), data_dir=data_dir)

    @classmethod
    def full(cls, data_dir: Path | None = None) -> Self:
        """All fits, 500 queries, and 100 halves with five trainings each."""
        averaged = tuple(name for name in FITS if name not in ("identity", "diagonal"))
        return cls(queries=500, subsets=100, seeds=5, fits=tuple(FITS), averaged=averaged, data_dir=data_dir)

    @property
    def trained(self) -> tuple[str, ...]:
        return *super().trained, "hidden"

    def problem(self) -> Trainer:
        sizes = {"train_size": self.train_size, "test_size": self.queries}
        dataset = data.load(self.dataset, data_dir=self.data_dir, **sizes).flat()

        def make(seed: int) -> nn.Module:
            return mlp(dataset.train_inputs.shape[1], self.hidden, dataset.outputs, seed=seed)

        return Trainer(dataset, make, self.epochs, 100, 0.02, 1e-3)
