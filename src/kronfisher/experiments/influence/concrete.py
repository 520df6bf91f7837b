"""The strength of concrete: how much the error of a prediction rises when the data that it rests on are removed."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronfisher.experiments import data
from kronfisher.experiments.influence.findings import record
from kronfisher.experiments.influence.fits import FITS, make
from kronfisher.experiments.influence.retraining import OTHER_SEED, Regressors
from kronfisher.experiments.influence.study import InfluenceStudy, training_again
from kronfisher.experiments.progress import Say, Step
from kronfisher.experiments.studies.findings import Record
from kronfisher.influence import attribution
from kronfisher.influence.attribution import Curve

__all__ = ["ConcreteStudy"]

RANDOM = "random"


@dataclass(frozen=True)
class ConcreteStudy(InfluenceStudy):
    """The settings of the study.

    Kronfluence's example removes the examples of the highest scores of one query, or of the highest summed scores of
    ten. Beside these two, every query has examples of its own removed, and the mean is taken. As in that example, the
    network that is scored is none of those that are trained again.

    Attributes:
        dataset: name of a data set of real values, standardised.
        together: test examples whose scores are summed.
        seeds: networks that are trained for each removal of the two published measures, side by side.
        queries: test examples that have examples of their own removed.
        seeds_each: networks that are trained for each of these.
        counts: how many of the highest scores are removed together.
        epochs: of the networks' training.
        hidden: widths of their hidden layers.
        train_size: examples to train on; None: all.
        fits: names in `FITS`; beside them, random scores.
        folder: of the trainings' results, from which an interrupted study goes on.
        data_dir: folder of the data sets' files; None takes KRONFISHER_DATA.
    """

    study: ClassVar[str] = "concrete"
    judged: ClassVar[tuple[str, ...]] = ("together", "seeds", "queries", "seeds_each", "counts")
    dataset: str = "concrete-shuffled"
    together: int = 10
    seeds: int = 50
    queries: int = 10
    seeds_each: int = 10
    counts: Sequence[int] = (30,)
    epochs: int = 40
    hidden: tuple[int, ...] = (128, 128, 128)
    train_size: int | None = None
    fits: Sequence[str] = ("identity", "K-FAC", "EKFAC", "K-FOC")
    folder: Path = Path("results/influence-concrete")
    data_dir: Path | None = None

    @classmethod
    def quick(cls, data_dir: Path | None = None) -> Self:
        """A few seconds of it, on digits, whose classes are taken for values."""
        return cls("digits", 3, 3, 3, 2, (5, 20), 20, (16,), 200, ("K-FAC",), data_dir=data_dir)

    @classmethod
    def full(cls, data_dir: Path | None = None) -> Self:
        """All test examples, removals and fits, with fifty networks each."""
        counts = (5, 10, 15, 20, 25, 30)
        return cls(queries=103, seeds_each=50, counts=counts, fits=tuple(FITS), data_dir=data_dir)

    def check(self) -> None:
        self._problem(1)

    def _problem(self, seeds: int) -> Regressors:
        asked = max(self.queries, self.together)
        dataset = data.load(self.dataset, data_dir=self.data_dir).head(self.train_size, asked)
        if dataset.task == "classes":  # of the digits: one number for each class
            ones = [F.one_hot(part, dataset.outputs).float() for part in (dataset.train_targets, dataset.test_targets)]
            dataset = replace(dataset.flat(), train_targets=ones[0], test_targets=ones[1], task="values")
        return Regressors(dataset, self.hidden, seeds, self.epochs)

    @property
    def trained(self) -> tuple[str, ...]:
        return "dataset", "together", "queries", "epochs", "hidden", "train_size"

    def measure(self, networks: list[Record], rows: list[Record], say: Say, step: Step) -> None:
        problem, started = self._problem(self.seeds), time.perf_counter()
        everything = torch.arange(len(problem.dataset.train_inputs))
        errors = torch.stack([problem(everything, seed) for seed in range(self.seeds)]).mean(0)
        what = (
            f"{len(everything):,} examples, squared error {float(errors[0]):.3f} of the first query, "
            f"{float(errors[: self.together].mean()):.3f} of {self.together}, mean over {self.seeds} networks"
        )
        self.note(networks, say, what, started, error=float(errors.mean()))
        scored, path = replace(problem, seeds=1, first_seed=OTHER_SEED), self.trainings()
        model = scored.first(scored.train(everything))
        for name in (RANDOM, *self.fits):
            step(f"{name}: scores", len(rows), 3 * (1 + len(self.fits)) * len(self.counts))
            began = time.perf_counter()
            scores = self._scores(name, model, problem)
            seconds = time.perf_counter() - began
            for measure, curve in self._curves(scores, problem, path, training_again(step)):
                for count, interval in zip(self.counts, curve.intervals, strict=True):
                    rows.append(record(self.dataset, name, f"{measure}, {count} removed", interval, seconds))
                    say(f"{name}, {measure}: squared error {interval} higher with {count} removed")

    def _scores(self, name: str, model: nn.Module, problem: Regressors) -> Tensor:
        batches, dataset = problem.dataset.batches(500), problem.dataset
        if name == RANDOM:
            shape = len(dataset.test_inputs), len(dataset.train_inputs)
            return torch.randn(shape, generator=torch.Generator().manual_seed(0))
        queries = dataset.test_inputs, dataset.test_targets
        return make(name, model, batches, dataset.likelihood).scores(batches, queries).values

    def _curves(
        self, scores: Tensor, problem: Regressors, path: Path, progress: Callable[[str], None]
    ) -> Iterator[tuple[str, Curve]]:
        for what, size in (("one query", 1), (f"{self.together} together", self.together)):

            def errors(kept: Tensor, seed: int, size: int = size) -> Tensor:
                return problem(kept, seed)[:size].mean(0, keepdim=True)

            summed = scores[:size].sum(0, keepdim=True)
            options = {"counts": self.counts, "path": path.with_suffix(f".{size}.jsonl"), "progress": progress}
            yield what, attribution.removal(summed, errors, seeds=self.seeds, **options)
        each = replace(problem, seeds=self.seeds_each)

        def errors_each(kept: Tensor, seed: int) -> Tensor:
            return each(kept, seed)[: self.queries]

        options = {"counts": self.counts, "path": path, "progress": progress}
        curve = attribution.removal(scores[: self.queries], errors_each, seeds=self.seeds_each, **options)
        yield f"each of {self.queries}", curve
