"""Logistic regression on MNIST, where scores can be exact: training on half of the data, and without one example."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronfisher.experiments import data
from kronfisher.experiments.influence.findings import record
from kronfisher.experiments.influence.fits import FITS, IDENTITY, WHOLE, make
from kronfisher.experiments.influence.study import InfluenceStudy, training_again
from kronfisher.experiments.progress import Say, Step
from kronfisher.experiments.studies.findings import Record
from kronfisher.influence import attribution
from kronfisher.likelihoods import Categorical

__all__ = ["LogisticStudy", "Regression"]


@dataclass(frozen=True, eq=False)
class Regression:
    """Training of a softmax regression on some examples, and the loss of queries after it.

    The loss is ``(1/N) Σ ℓ + λ/2 ‖θ‖²`` with the N of all examples, minimised by L-BFGS in float64 from the solution
    for all of them.

    Attributes:
        x: ``[N, D]``.
        y: ``[N]``.
        queries: inputs ``[Q, D]`` and targets.
        decay: λ.
        start: ``[C, D + 1]``; None: zero.
    """

    x: Tensor
    y: Tensor
    queries: tuple[Tensor, Tensor]
    decay: float
    start: Tensor | None = None

    def solve(self, kept: Tensor) -> Tensor:
        """The minimum ``[C, D + 1]`` for the examples with the indices `kept`."""
        x, y = self.x[kept], self.y[kept]
        zero = torch.zeros(int(self.y.max()) + 1, x.shape[1] + 1, dtype=torch.float64)
        theta = (zero if self.start is None else self.start.clone()).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [theta],
            max_iter=2000,
            history_size=20,
            tolerance_grad=1e-7,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            outputs = F.linear(x, theta[:, :-1], theta[:, -1])
            value = F.cross_entropy(outputs, y, reduction="sum") / len(self.x) + self.decay / 2 * theta.square().sum()
            value.backward()
            return value

        optimizer.step(loss)  # pyright: ignore[reportArgumentType]
        return theta.detach()

    def __call__(self, kept: Tensor, seed: int) -> Tensor:
        """The loss of every query ``[Q]``; a convex problem knows no seed."""
        theta, (x, y) = self.solve(kept), self.queries
        return F.cross_entropy(F.linear(x, theta[:, :-1], theta[:, -1]), y, reduction="none")


@dataclass(frozen=True)
class LogisticStudy(InfluenceStudy):
    """The settings of the study.

    Attributes:
        dataset: name of the data set.
        train_size: examples to train on.
        queries: test examples.
        decay: weight decay of the mean loss, and the damping of every fit.
        subsets: random halves of the data.
        left_out: examples that are left out, one at a time.
        fits: names in `FITS`.
        refined: names in `FITS` and how many steps of conjugate gradients on the exact Gauss-Newton matrix they
            precondition; on the identity these are plain ones.
        folder: of the trainings' results, from which an interrupted study goes on.
        data_dir: folder of the data sets' files; None takes KRONFISHER_DATA.
    """

    study: ClassVar[str] = "logistic"
    judged: ClassVar[tuple[str, ...]] = ("subsets", "left_out", "refined")
    dataset: str = "mnist"
    train_size: int = 5000
    queries: int = 500
    decay: float = 0.01
    subsets: int = 100
    left_out: int = 50
    fits: Sequence[str] = tuple(name for name in FITS if name != "block-tridiagonal")  # one layer: K-FAC
    refined: Sequence[tuple[str, int]] = ((IDENTITY, 10), ("K-FAC", 3), ("K-FAC", 10))
    folder: Path = Path("results/influence-logistic")
    data_dir: Path | None = None

    @classmethod
    def quick(cls, data_dir: Path | None = None) -> Self:
        """A few seconds of it, on digits."""
        return cls(
            "digits", 200, 20, 0.01, 10, 5, (IDENTITY, "K-FAC"), ((IDENTITY, 4), ("K-FAC", 4)), data_dir=data_dir
        )

    @classmethod
    def full(cls, data_dir: Path | None = None) -> Self:
        """More examples are left out one at a time."""
        return cls(left_out=200, data_dir=data_dir)

    def check(self) -> None:
        self._problem()

    def _problem(self) -> Regression:
        dataset = data.load(self.dataset, data_dir=self.data_dir, train_size=self.train_size, test_size=self.queries)
        x, queries = (part.flatten(1).double() for part in (dataset.train_inputs, dataset.test_inputs))
        return Regression(x, dataset.train_targets, (queries, dataset.test_targets), self.decay)

    @property
    def trained(self) -> tuple[str, ...]:
        return "dataset", "train_size", "queries", "decay"

    def measure(self, networks: list[Record], rows: list[Record], say: Say, step: Step) -> None:
        problem = self._problem()
        started = time.perf_counter()
        theta = problem.solve(torch.arange(len(problem.x)))
        problem = Regression(problem.x, problem.y, problem.queries, self.decay, theta)
        model = nn.Linear(theta.shape[1] - 1, theta.shape[0]).double()
        with torch.no_grad():
            model.weight.copy_(theta[:, :-1])
            model.bias.copy_(theta[:, -1])
            right = float((model(problem.queries[0]).argmax(1) == problem.queries[1]).double().mean())
        what = f"softmax regression on {len(problem.x):,} examples, weight decay {self.decay:g}"
        self.note(networks, say, f"{what}, test accuracy {right:.1%}", started, accuracy=right)
        path, progress = self.trainings(), training_again(step)
        batches = list(zip(problem.x.split(500), problem.y.split(500), strict=True))
        for fit, refine in (*((fit, 0) for fit in self.fits), *self.refined):
            name = _named(fit, refine)
            step(f"{name}: scores", len(rows), 2 * (len(self.fits) + len(self.refined)))
            began = time.perf_counter()
            labels = "sampled" if fit == WHOLE else "exact"
            influence = make(fit, model, batches, Categorical(), self.decay, labels=labels, refine=refine)
            scores = influence.scores(batches, problem.queries)
            seconds = time.perf_counter() - began
            halves = attribution.lds(scores, problem, subsets=self.subsets, path=path, progress=progress)
            alone = attribution.leave_one_out(scores, problem, examples=self.left_out, path=path, progress=progress)
            rows.append(record(self.dataset, name, "linear datamodelling score", halves.interval, seconds))
            rows.append(record(self.dataset, name, "leave-one-out correlation", alone.interval, seconds))
            say(f"{name}: LDS {halves}, leave-one-out {alone}, {seconds:.1f} s")


def _named(fit: str, steps: int) -> str:
    if not steps:
        return fit
    return f"{'conjugate gradients' if fit == IDENTITY else fit}, {steps} steps"
