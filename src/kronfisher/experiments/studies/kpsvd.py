"""The study of Koroko et al. (2022): auto-encoders in training, errors of the Fisher's blocks and of their spectra.

The three auto-encoders with rectified units on CURVES, MNIST and FACES are trained by Adam. Now and then the Fisher of
a quarter of a batch with one sampled label for each example is approximated by every fit, from the same samples and
without averages over time, and compared with the true blocks of these samples. FACES is trained in batches of 256 where
the paper has 1,024, and all for fewer epochs, so that the study takes minutes.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from statistics import fmean, median
from typing import Any, Self

from torch import nn

from kronfisher.errors import MemoryBudgetError, NumericalError, UnsupportedError
from kronfisher.estimation.error import Distance
from kronfisher.estimation.estimate import estimate
from kronfisher.estimation.recipe import Recipe
from kronfisher.experiments.data import Dataset
from kronfisher.experiments.progress import Say, Step
from kronfisher.experiments.studies.experiment import Experiment
from kronfisher.experiments.studies.figures import Curve, Panel, bands
from kronfisher.experiments.studies.findings import Findings, Record
from kronfisher.experiments.studies.problems import Problem
from kronfisher.experiments.studies.spectrum import Spectrum, spectra
from kronfisher.fits import EKFAC, KFAC, KFOC, KPSVD, Fit, KFACCorrected, KroneckerSum
from kronfisher.tables import Table, duration, number

__all__ = ["KPSVDFindings", "KPSVDStudy"]

ENTRANTS: Mapping[str, Fit] = {
    "K-FAC": KFAC(),
    "KPSVD": KPSVD(),
    "KFAC-corrected": KFACCorrected(),
    "deflation": KroneckerSum(rank=2, method="deflation"),
    "Lanczos": KroneckerSum(rank=2, method="lanczos"),
    "nonnegative": KroneckerSum(rank=2, method="nonnegative"),
    "EKFAC on K-FAC": EKFAC(),
    "EKFAC on K-FOC": EKFAC(basis=KFOC()),
}
RELU: dict[str, Any] = {"network": "autoencoder", "activation": "relu", "test_size": 1000}
PROBLEMS = (
    Problem("CURVES", "curves", epochs=10, batch_size=256, lr=1e-3, limit=64, **RELU),
    Problem("MNIST", "mnist", epochs=3, batch_size=512, lr=1e-3, limit=128, **RELU),
    Problem("FACES", "faces", epochs=1, batch_size=256, lr=3e-4, limit=256, **RELU),
)
QUANTITIES = {
    "error": "relative error of all blocks together",
    "typical": "relative error, mean over the layers",
    "spectrum": "relative error of the leading eigenvalues, all blocks together",
}
QUICK = (Problem("digits", "digits", epochs=4, batch_size=128, lr=1e-3, limit=32, **RELU),)


@dataclass(frozen=True)
class KPSVDStudy(Experiment):
    """The settings of the study.

    Attributes:
        problems: the auto-encoders.
        points: how often the fits are measured: at the start, at the end, and at geometric steps between.
        leading: eigenvalues of every block that are compared, at most; a block has no more than its Fisher has samples.
        seed: of data, initial weights, order of training and sampled labels.
        entrants: the fits compared, by the name they are shown under.
        data_dir: folder of the data sets' files; None takes KRONFISHER_DATA.
    """

    problems: Sequence[Problem] = PROBLEMS
    points: int = 7
    leading: int = 20
    seed: int = 0
    entrants: Mapping[str, Fit] = field(default_factory=lambda: ENTRANTS)
    data_dir: Path | None = None

    @classmethod
    def quick(cls, data_dir: Path | None = None) -> Self:
        """The same in seconds, on a small auto-encoder of the digits of 8×8 pixels, which need no files."""
        return cls(QUICK, points=3, data_dir=data_dir)

    def check(self) -> None:
        for problem in self.problems:
            problem.check(self.data_dir)

    def measure(self, networks: list[Record], rows: list[Record], say: Say, step: Step) -> None:
        for problem in self.problems:
            start = time.perf_counter()
            step(f"{problem.title}: loading", 0, 1)
            dataset, model = problem.load(self.seed, self.data_dir)
            networks.append(self._train(problem, dataset, model, rows, step))
            loss = networks[-1]["test_loss"]
            say(f"{problem.title}: test loss {loss:.3g}, {duration(time.perf_counter() - start)}")

    def findings(self, networks: list[Record], rows: list[Record], finished: bool) -> "KPSVDFindings":
        return KPSVDFindings(self._settings(), networks, rows, finished)

    def _train(
        self, problem: Problem, dataset: Dataset, model: nn.Module, rows: list[Record], step: Callable
    ) -> Record:
        """Train, and measure on the way."""
        total = problem.epochs * -(-len(dataset.train_inputs) // problem.batch_size)
        due = {round(total ** (k / (self.points - 2))) for k in range(self.points - 1)} if self.points > 2 else {total}

        def measure_fits(done: int) -> None:
            for row in self._measure_fits(problem, dataset, model):
                rows.append({"problem": problem.title, "step": done, **row})
                step(f"{problem.title}, step {done:,}: {row['fit']}", done, total)

        def on_step(done: int, total: int, loss: float) -> None:
            step(f"{problem.title}: training, loss {loss:.3g}", done, total)
            if done in due:
                measure_fits(done)

        measure_fits(0)
        return {**problem.train(dataset, model, self.seed, on_step), "steps": total}

    def _measure_fits(self, problem: Problem, dataset: Dataset, model: nn.Module) -> Iterator[dict[str, Any]]:
        """One record a fit, for the weights as they are."""
        (batch,) = dataset.batches(problem.limit or problem.batch_size, problem.limit or problem.batch_size)
        truth = spectra(Recipe(model, dataset.likelihood, seed=self.seed), batch, self.leading)
        for name, fit in self.entrants.items():
            start = time.process_time()
            try:
                fisher = estimate(model, batch, dataset.likelihood, fit=fit, seed=self.seed)
            except (UnsupportedError, MemoryBudgetError, NumericalError) as reason:
                yield {"fit": name, "failure": str(reason)}
                continue
            seconds = time.process_time() - start
            error, spectrum = fisher.error(batch), _spectrum(fisher.blocks, truth)
            yield {
                "fit": name,
                "seconds": seconds,
                "error": error.relative,
                "typical": fmean(error.blocks.values()),
                "layers": error.blocks,
                "spectrum": spectrum.relative,
                "spectrum_layers": spectrum.blocks,
            }

    def _settings(self) -> dict[str, Any]:
        return {
            "study": "kpsvd",
            "seed": self.seed,
            "leading": self.leading,
            "problems": [asdict(problem) for problem in self.problems],
            "fits": {name: repr(fit) for name, fit in self.entrants.items()},
        }


def _spectrum(blocks: Mapping[str, Any], truth: Mapping[str, Spectrum]) -> Distance:
    """Distances of the leading eigenvalues, in the form of distances of matrices."""
    distances = {name: truth[name].distance(block) for name, block in blocks.items()}
    return Distance(distances, {name: truth[name].norm() for name in blocks}, inf)


@dataclass(frozen=True, eq=False)
class KPSVDFindings(Findings):
    """Errors of the blocks and of their spectra by fit and training step."""

    def tables(self) -> list[Table]:
        """For every auto-encoder the errors over the steps; then the seconds of an estimate."""
        tables = []
        for problem in self.distinct("problem"):
            steps = self.distinct("step", problem=problem)
            for quantity, meaning in QUANTITIES.items():
                header = ("fit", *(f"step {step:,}" for step in steps))
                table = Table(f"{problem}: {meaning}", header)
                for fit in self.settings["fits"]:
                    errors = {row["step"]: row[quantity] for row in self.select(problem=problem, fit=fit)}
                    table.add(fit, *(number(errors.get(step, float("nan"))) for step in steps))
                tables.append(table)
        problems = self.distinct("problem")
        table = Table("seconds of one thread for one estimate (medians)", ("fit", *problems))
        for fit in self.settings["fits"]:
            cells = []
            for problem in problems:
                seconds = [row["seconds"] for row in self.select(problem=problem, fit=fit)]
                cells.append(duration(median(seconds)) if seconds else "–")
            table.add(fit, *cells)
        return [*tables, table]

    def draw(self, folder: str | Path) -> list[Path]:
        """The errors over the training steps: a column an auto-encoder, a row an error."""
        problems, panels = self.distinct("problem"), []
        for quantity in QUANTITIES:
            for problem in problems:
                curves = []
                for fit in self.settings["fits"]:
                    if rows := self.select(problem=problem, fit=fit):
                        steps, values = [row["step"] for row in rows], [(row[quantity], 0.0) for row in rows]
                        curves.append(Curve(fit, steps, values))
                what = {"error": "all blocks", "typical": "mean over layers", "spectrum": "eigenvalues"}[quantity]
                panels.append(Panel(problem, curves, f"relative error, {what}"))
        return bands(panels, folder, "kpsvd", x="training step", columns=max(1, len(problems)))
