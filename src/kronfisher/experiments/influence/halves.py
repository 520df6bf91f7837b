"""Base of the studies that train networks again on random halves of the data."""

import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kronfisher.experiments.influence.findings import record
from kronfisher.experiments.influence.fits import make
from kronfisher.experiments.influence.retraining import OTHER_SEED, Trainer
from kronfisher.experiments.influence.study import InfluenceStudy, training_again
from kronfisher.experiments.progress import Say, Step
from kronfisher.experiments.studies.findings import Record
from kronfisher.influence import attribution

__all__ = ["HalvesStudy"]


@dataclass(frozen=True)
class HalvesStudy(InfluenceStudy):
    """The settings of such a study.

    Attributes:
        dataset: name of the data set.
        train_size: examples to train on.
        queries: test examples.
        epochs: of training.
        subsets: random halves of the data.
        seeds: trainings of each.
        models: networks that are scored; their seeds are none of those that are trained again.
        fits: names in `FITS`, of one network.
        averaged: those among them whose scores are averaged over networks.
        folder: of the trainings' results, from which an interrupted study goes on.
        data_dir: folder of the data sets' files; None takes KRONFISHER_DATA.
    """

    judged: ClassVar[tuple[str, ...]] = ("subsets", "seeds")
    dataset: str = ""
    train_size: int = 5000
    queries: int = 100
    epochs: int = 15
    subsets: int = 50
    seeds: int = 1
    models: int = 1
    fits: Sequence[str] = ("identity", "K-FAC", "EKFAC", "K-FOC")
    averaged: Sequence[str] = ()
    folder: Path = Path("results/influence-halves")
    data_dir: Path | None = None

    @abstractmethod
    def problem(self) -> Trainer:
        """Data and training."""

    @property
    def trained(self) -> tuple[str, ...]:
        return "dataset", "train_size", "queries", "epochs"

    def check(self) -> None:
        self.problem()

    def measure(self, networks: list[Record], rows: list[Record], say: Say, step: Step) -> None:
        problem, path = self.problem(), self.trainings()
        queries = problem.dataset.test_inputs, problem.dataset.test_targets
        batches, sums = problem.dataset.batches(250), dict[str, Tensor]()
        for seed in range(self.models):
            step(f"network {seed}", seed, self.models)
            started = time.perf_counter()
            model = problem.train(problem.everything, OTHER_SEED + seed)
            with torch.no_grad():
                loss = float(-problem.dataset.likelihood.log_prob(model(queries[0]), queries[1]).mean())
            what = f"network {seed} of {len(problem.everything):,} examples, loss of queries {loss:.3f}"
            self.note(networks, say, what, started, loss=loss)
            for fit in self.fits if seed == 0 else self.averaged:
                began = time.perf_counter()
                influence = make(fit, model, batches, problem.dataset.likelihood, labels="sampled")
                scores = influence.scores(batches, queries).values
                sums[fit] = scores + sums.get(fit, 0)
                seconds = time.perf_counter() - began
                if seed == 0:
                    self._judge(rows, fit, "one network", scores, path, seconds, say, step)
                    self.show(fit, model, problem, scores)
        for fit in self.averaged if self.models > 1 else ():
            self._judge(rows, fit, f"{self.models} networks", sums[fit], path, 0.0, say, step)

    def show(self, fit: str, model: nn.Module, problem: Trainer, scores: Tensor) -> None:
        """Look closer at the scores of one fit; nothing by default."""

    def _judge(
        self, rows: list[Record], fit: str, of: str, scores: Tensor, path: Path, seconds: float, say: Say, step: Step
    ) -> None:
        options: dict[str, Any] = {"subsets": self.subsets, "seeds": self.seeds, "path": path}
        found = attribution.lds(scores, self.problem(), progress=training_again(step), **options)
        rows.append(record(self.dataset, fit, f"linear datamodelling score, {of}", found.interval, seconds))
        say(f"{fit}, {of}: LDS {found}")
