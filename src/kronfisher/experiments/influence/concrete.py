"""The strength of concrete: how much the error of a prediction rises when the data that it rests on are removed."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from kronfisher.experiments import data
from kronfisher.experiments.influence.findings import record
from kronfisher.experiments.influence.fits import FITS, make
from kronfisher.experiments.influence.retraining import Regressors
from kronfisher.experiments.influence.study import InfluenceStudy, training_again
from kronfisher.experiments.progress import Say, Step
from kronfisher.experiments.studies.findings import Record
from kronfisher.influence import attribution

__all__ = ["ConcreteStudy"]

RANDOM = "random"


@dataclass(frozen=True)
class ConcreteStudy(InfluenceStudy):
    """The settings of the study.

    Attributes:
        dataset: name of a data set of real values, standardised.
        queries: test examples.
        counts: how many of the highest scores are removed together.
        seeds: networks that are trained for each removal, side by side.
        epochs: of their training.
        hidden: widths of their hidden layers.
        train_size: examples to train on; None: all.
        fits: names in `FITS`; beside them, random scores.
        folder: of the trainings' results, from which an interrupted study goes on.
        data_dir: folder of the data sets' files; None takes KRONFISHER_DATA.
    """

    study: ClassVar[str] = "concrete"
    judged: ClassVar[tuple[str, ...]] = ("counts",)
    dataset: str = "concrete"
    queries: int = 10
    counts: Sequence[int] = (10, 30)
    seeds: int = 10
    epochs: int = 40
    hidden: tuple[int, ...] = (128, 128, 128)
    train_size: int | None = None
    fits: Sequence[str] = ("identity", "K-FAC", "EKFAC", "K-FOC")
    folder: Path = Path("results/influence-concrete")
    data_dir: Path | None = None

    @classmethod
    def quick(cls, data_dir: Path | None = None) -> Self:
        """A few seconds of it, on digits, whose classes are taken for values."""
        return cls("digits", 3, (5, 20), 2, 20, (16,), 200, ("K-FAC",), data_dir=data_dir)

    @classmethod
    def full(cls, data_dir: Path | None = None) -> Self:
        """All test examples, removals and fits, with fifty networks each."""
        return cls(queries=103, counts=(5, 10, 15, 20, 25, 30), seeds=50, fits=tuple(FITS), data_dir=data_dir)

    def check(self) -> None:
        self._problem()

    def _problem(self) -> Regressors:
        dataset = data.load(self.dataset, data_dir=self.data_dir).head(self.train_size, self.queries)
        if dataset.task == "classes":  # of the digits: one number for each class
            ones = [F.one_hot(part, dataset.outputs).float() for part in (dataset.train_targets, dataset.test_targets)]
            dataset = replace(dataset.flat(), train_targets=ones[0], test_targets=ones[1], task="values")
        return Regressors(dataset, self.hidden, self.seeds, self.epochs)

    @property
    def trained(self) -> tuple[str, ...]:
        return "dataset", "queries", "seeds", "epochs", "hidden", "train_size"

    def measure(self, networks: list[Record], rows: list[Record], say: Say, step: Step) -> None:
        problem, started = self._problem(), time.perf_counter()
        x = problem.dataset.train_inputs
        model = problem.first(problem.train(torch.arange(len(x))))
        with torch.no_grad():
            error = float((model(problem.dataset.test_inputs) - problem.dataset.test_targets).square().mean())
        what = f"{len(x):,} examples, squared error {error:.3f} of the {self.queries} queries"
        self.note(networks, say, what, started, error=error)
        path = self.trainings()
        batches = problem.dataset.batches(500)
        queries = problem.dataset.test_inputs, problem.dataset.test_targets
        likelihood = problem.dataset.likelihood
        for name in (RANDOM, *self.fits):
            step(f"{name}: scores", len(rows), (1 + len(self.fits)) * len(self.counts))
            began = time.perf_counter()
            if name == RANDOM:
                scores: Tensor = torch.randn(self.queries, len(x), generator=torch.Generator().manual_seed(0))
            else:
                scores = make(name, model, batches, likelihood).scores(batches, queries).values
            seconds = time.perf_counter() - began
            options = {"counts": self.counts, "path": path}
            curve = attribution.removal(scores, problem, progress=training_again(step), **options)
            for count, interval in zip(self.counts, curve.intervals, strict=True):
                rows.append(record(self.dataset, name, f"{count} removed", interval, seconds))
                say(f"{name}: squared error {interval} higher with {count} removed")
