"""The study of Schnaus, Lee and Triebel (2021): the relative error of every layer against the Fisher's batch size.

One hidden layer of 50 rectified units on three UCI sets, and LeNet-5 on MNIST; the networks are trained, then the
Fisher matrix with one sampled label for each example is estimated in batches of 1, 10, 100 and all data. Beside the
paper's figure there is the runtime table that it does not give.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import inf, nan
from pathlib import Path
from statistics import median
from typing import Any, Self

import torch
from torch import nn

from kronfisher.errors import MemoryBudgetError, NumericalError, UnsupportedError
from kronfisher.estimation.estimate import estimate
from kronfisher.experiments.data import Dataset
from kronfisher.experiments.progress import Say, Step
from kronfisher.experiments.studies.divergence import DAMPING, divergences, small_blocks
from kronfisher.experiments.studies.experiment import Experiment
from kronfisher.experiments.studies.figures import Curve, Panel, bands
from kronfisher.experiments.studies.findings import Findings, Record, deviation
from kronfisher.experiments.studies.problems import Problem
from kronfisher.fits import KFAC, KFOC, KL, TKFAC, Diagonal, Fit, KroneckerSum
from kronfisher.tables import Table, duration, number

__all__ = ["KFOCFindings", "KFOCStudy"]

UCI: dict[str, Any] = {"network": "mlp", "epochs": 1000, "weight_decay": 1e-5, "patience": 20}
PROBLEMS = (
    Problem("Boston", "bostonHousing", **UCI),
    Problem("Concrete", "concrete", **UCI),
    Problem("Energy", "energy", **UCI),
    Problem("LeNet-5", "mnist", "lenet5", epochs=1, limit=1000),
)
QUICK = (
    Problem("digits, fully connected", "digits", "mlp", train_size=500, epochs=4, lr=1e-2, limit=60),
    Problem("digits, convolutions", "digits", "convnet", train_size=500, epochs=4, lr=1e-2, limit=60),
)
PLAIN = "forward and backward"


@dataclass(frozen=True)
class Entrant:
    """A fit under the name that tables and pictures have for it.

    Attributes:
        fit: the fit.
        batched: whether its estimate depends on how the data are batched; if not, sums are carried over the batches.
        swept: whether the first seed looks at all batch sizes although they make no difference; too slow for some.
    """

    fit: Fit
    batched: bool = False
    swept: bool = True


ENTRANTS: Mapping[str, Entrant] = {
    "diagonal": Entrant(Diagonal()),
    "K-FAC": Entrant(KFAC()),
    "TKFAC": Entrant(TKFAC()),
    "KL": Entrant(KL(damping=1e-6), swept=False),
    "K-FOC approx": Entrant(KFOC("approx"), batched=True),
    "K-FOC running": Entrant(KFOC("running"), batched=True),
    "K-FOC memory": Entrant(KFOC("memory"), batched=True),
    "K-FOC exact": Entrant(KFOC("exact"), swept=False),
    "rank 2": Entrant(KroneckerSum(rank=2)),
    "rank 4": Entrant(KroneckerSum(rank=4)),
    "nonnegative rank 2": Entrant(KroneckerSum(rank=2, method="nonnegative"), swept=False),
    "nonnegative rank 4": Entrant(KroneckerSum(rank=4, method="nonnegative"), swept=False),
}


@dataclass(frozen=True)
class KFOCStudy(Experiment):
    """The settings of the study.

    Attributes:
        problems: the networks.
        seeds: networks trained for each problem; a seed decides the data's split, the initial weights, the order of
            training and the sampled labels.
        batch_sizes: data in a batch of the Fisher's estimate; None: all in one.
        entrants: the fits compared, by the name they are shown under.
        data_dir: folder of the data sets' files; None takes KRONFISHER_DATA.
    """

    problems: Sequence[Problem] = PROBLEMS
    seeds: int = 10
    batch_sizes: Sequence[int | None] = (1, 10, 100, None)
    entrants: Mapping[str, Entrant] = field(default_factory=lambda: ENTRANTS)
    data_dir: Path | None = None

    @classmethod
    def quick(cls, data_dir: Path | None = None) -> Self:
        """The same in seconds, on the digits of 8×8 pixels, which need no files."""
        return cls(QUICK, seeds=2, batch_sizes=(5, None), data_dir=data_dir)

    def check(self) -> None:
        for problem in self.problems:
            problem.check(self.data_dir)

    def measure(self, networks: list[Record], rows: list[Record], say: Say, step: Step) -> None:
        seeds = [(problem, seed) for problem in self.problems for seed in range(self.seeds)]
        total = sum(len(list(self._cells(seed))) for _, seed in seeds)
        for problem, seed in seeds:
            what, start = f"{problem.title}, seed {seed}", time.perf_counter()
            step(f"{what}: training", len(rows), total)
            dataset, model = problem.load(seed, self.data_dir)
            networks.append(problem.train(dataset, model, seed))
            whole = dataset.batches(len(dataset.train_inputs), problem.limit)
            truth = small_blocks(model, whole, dataset.likelihood, seed)
            for name, entrant, size in self._cells(seed):
                step(f"{what}: {name}", len(rows), total)
                record = self._measure_entrant(problem, dataset, model, entrant, size, seed)
                if (fisher := record.pop("fisher", None)) is not None and size == self.batch_sizes[-1]:
                    record["divergence"] = _by_layer(divergences(fisher, truth))
                rows.append({"problem": problem.title, "seed": seed, "fit": name, "batch_size": size, **record})
            say(f"{what}: test loss {networks[-1]['test_loss']:.3g}, {duration(time.perf_counter() - start)}")

    def findings(self, networks: list[Record], rows: list[Record], finished: bool) -> "KFOCFindings":
        return KFOCFindings(self._settings(), networks, rows, finished)

    def _cells(self, seed: int) -> Iterator[tuple[str, Entrant | None, int | None]]:
        """The measurements of one network: where batches make no difference, all sizes for the first seed only."""
        for name, entrant in {PLAIN: None, **self.entrants}.items():
            every = entrant.batched or (entrant.swept and seed == 0) if entrant else seed == 0
            for size in self.batch_sizes if every else self.batch_sizes[-1:]:
                yield name, entrant, size

    @staticmethod
    def _measure_entrant(
        problem: Problem, dataset: Dataset, model: nn.Module, entrant: Entrant | None, size: int | None, seed: int
    ) -> dict[str, Any]:
        """Seconds of one thread for one estimate, and its errors; of a plain training pass where there is no fit."""
        whole = len(dataset.train_inputs[: problem.limit])
        batches = dataset.batches(size or whole, problem.limit)
        start = time.process_time()
        if entrant is None:
            for x, y in batches:
                loss = -dataset.likelihood.log_prob(model(x), y).sum()
                torch.autograd.grad(loss, list(model.parameters()))
            return {"seconds": time.process_time() - start}
        try:
            fisher = estimate(model, batches, dataset.likelihood, fit=entrant.fit, seed=seed)
        except (UnsupportedError, MemoryBudgetError, NumericalError) as reason:
            return {"failure": str(reason)}
        seconds = time.process_time() - start
        error = fisher.error(dataset.batches(whole, whole))
        numbers = {
            "seconds": seconds,
            "bytes": fisher.bytes,
            "error": error.relative,
            "layers": _by_layer(error.blocks),
        }
        return {"fisher": fisher, **numbers}

    def _settings(self) -> dict[str, Any]:
        return {
            "study": "kfoc",
            "seeds": self.seeds,
            "batch_sizes": list(self.batch_sizes),
            "problems": [asdict(problem) for problem in self.problems],
            "fits": {name: {"fit": repr(it.fit), "batched": it.batched} for name, it in self.entrants.items()},
        }


@dataclass(frozen=True, eq=False)
class KFOCFindings(Findings):
    """Errors of every layer by fit and batch size, and the seconds that the estimates took."""

    def tables(self) -> list[Table]:
        """Means for all data at once; by batch size, with deviations; divergences; and the medians of the seconds."""
        return [self._overview(), *self._errors(), *self._divergences(), *self._seconds()]

    def _layers(self, problem: str) -> list[str]:
        return list(dict.fromkeys(name for row in self.select(problem=problem) for name in row.get("layers", ())))

    def _overview(self) -> Table:
        layers = [(problem, layer) for problem in self.distinct("problem") for layer in self._layers(problem)]
        header = ("fit", *(f"{problem}, {layer}" for problem, layer in layers))
        last = self.settings["batch_sizes"][-1]
        table = Table(f"Relative error, batches of {_size(last)}, mean over the seeds", header)
        for fit in self.settings["fits"]:
            cells = [self.errors(problem, layer, fit, last) for problem, layer in layers]
            table.add(fit, *(number(deviation(errors)[0]) if errors else "–" for errors in cells))
        return table

    def _errors(self) -> Iterator[Table]:
        for problem in self.distinct("problem"):
            for layer in self._layers(problem):
                table = Table(
                    f"{problem}, {layer}: relative error, mean ± deviation over {self._seeds(problem)} seeds",
                    ("fit", *map(_size, self.settings["batch_sizes"])),
                )
                for fit in self.settings["fits"]:
                    table.add(fit, *(self._cell(problem, layer, fit, size) for size in self.settings["batch_sizes"]))
                yield table

    def _seeds(self, problem: str) -> int:
        return len(self.distinct("seed", problem=problem))

    def errors(self, problem: str, layer: str, fit: str, size: int | None) -> list[float]:
        """The errors of one layer, one for every seed; of the last batch size where batches make no difference."""
        if not self.settings["fits"][fit]["batched"]:
            size = self.settings["batch_sizes"][-1]
        return [row["layers"][layer] for row in self.select(problem=problem, fit=fit, batch_size=size)]

    def _cell(self, problem: str, layer: str, fit: str, size: int | None) -> str:
        if not (errors := self.errors(problem, layer, fit, size)):
            return "–"
        if not self.settings["fits"][fit]["batched"] and size != self.settings["batch_sizes"][-1]:
            return "same"
        average, spread = deviation(errors)
        return f"{number(average)} ± {number(spread)}"

    def _divergences(self) -> Iterator[Table]:
        for problem in self.distinct("problem"):
            last = self.select(problem=problem, batch_size=self.settings["batch_sizes"][-1])
            names = list(dict.fromkeys(name for row in last for name in row.get("divergence", ())))
            table = Table(
                f"{problem}: divergence KL(F + λ ‖ X + λ) for each dimension, λ = {DAMPING:g} tr F / D, medians",
                ("fit", *names),
            )
            for fit in self.settings["fits"]:
                rows = [row["divergence"] for row in last if row["fit"] == fit]
                values = [median(row[name] for row in rows) if rows else nan for name in names]
                table.add(fit, *("indefinite" if value == inf else number(value) for value in values))
            if names:
                yield table

    def _seconds(self) -> Iterator[Table]:
        for problem in self.distinct("problem"):
            table = Table(
                f"{problem}: seconds of one thread for the whole estimate, by batch size (medians)",
                ("fit", *map(_size, self.settings["batch_sizes"])),
            )
            for fit in (PLAIN, *self.settings["fits"]):
                cells = []
                for size in self.settings["batch_sizes"]:
                    seconds = [row["seconds"] for row in self.select(problem=problem, fit=fit, batch_size=size)]
                    cells.append(duration(median(seconds)) if seconds else "–")
                table.add(fit, *cells)
            yield table

    def notes(self) -> list[str]:
        """The influence of the batch size where there should be none, and the reasons for missing numbers."""
        carried = [fit for fit, it in self.settings["fits"].items() if not it["batched"]]
        most = 0.0
        for problem in self.distinct("problem"):
            for fit in carried:
                rows = [row["layers"] for row in self.select(problem=problem, fit=fit, seed=0)]
                most = max([most, *(abs(row[layer] - rows[0][layer]) for row in rows for layer in row)])
        same = f"same: carried over the batches. Largest difference between batch sizes, where measured: {most:.1e}."
        return [same, *super().notes()]

    def draw(self, folder: str | Path) -> list[Path]:
        """The paper's figure: for every layer the relative error (mean, and a band of one deviation) by batch size."""
        sizes = self.settings["batch_sizes"]
        panels = []
        for problem in self.distinct("problem"):
            for layer in self._layers(problem):
                curves = []
                for fit in self.settings["fits"]:
                    points = [self.errors(problem, layer, fit, size) for size in sizes]
                    if all(points):
                        curves.append(Curve(fit, range(len(sizes)), [deviation(errors) for errors in points]))
                panels.append(Panel(f"{problem}: {layer}", curves, "relative error"))
        labels = dict(enumerate(map(_size, sizes)))
        return bands(panels, folder, "kfoc", x="data in a batch of the Fisher", ticks=labels)


def _by_layer(values: Mapping[str, float]) -> dict[str, float]:
    """The values by the names of the layers."""
    return {name.removesuffix(".weight"): value for name, value in values.items()}


def _size(size: int | None) -> str:
    return "all" if size is None else f"{size:,}"
