"""Regression on the UCI sets with their published splits: the test log likelihood of every fit's posterior."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from kronfisher.errors import MemoryBudgetError, NumericalError, UnsupportedError
from kronfisher.estimation.estimate import estimate
from kronfisher.experiments import data
from kronfisher.experiments.data import Dataset
from kronfisher.experiments.data.uci import NAMES
from kronfisher.experiments.networks.feedforward import mlp
from kronfisher.experiments.progress import Say, Step
from kronfisher.experiments.studies.experiment import Experiment
from kronfisher.experiments.studies.findings import Record
from kronfisher.experiments.training import train
from kronfisher.experiments.uncertainty import laplace_torch
from kronfisher.experiments.uncertainty.uci_findings import TRUTH, TUNED, UCIFindings
from kronfisher.fits import EKFAC, KFAC, KFOC, KL, TKFAC, Diagonal, Fit, Full, KroneckerSum, Prototypes
from kronfisher.laplace import Laplace
from kronfisher.likelihoods import Gaussian
from kronfisher.tables import duration

__all__ = ["FITS", "UCIStudy"]

FITS: Mapping[str, Fit] = {
    "diagonal": Diagonal(),
    "K-FAC": KFAC(),
    "TKFAC": TKFAC(),
    "K-FOC": KFOC("exact"),
    "KL": KL(damping=1e-6),
    "EKFAC on K-FAC": EKFAC(),
    "EKFAC on K-FOC": EKFAC(KFOC("exact")),
    "nonnegative rank 2": KroneckerSum(rank=2, method="nonnegative"),
    "nonnegative rank 4": KroneckerSum(rank=4, method="nonnegative"),
    "prototypes": Prototypes(),
    "exact blocks": Full(),
    "exact": Full(across_layers=True),
}


@dataclass(frozen=True)
class UCIStudy(Experiment):
    """The settings of the study: networks in→50→1 with tanh, trained with a little weight decay.

    The prior precision of all blocks is one number, where the marginal likelihood is largest. The variance of the noise
    is that of the training residuals, or is found together with the prior; or both are those that the exact blocks
    like best, which tells what a fit costs as a posterior apart from what it costs as evidence. Predictions are
    linearised, so that all fits and the plain network (MAP) have the same mean and the same RMSE.

    Attributes:
        sets: names of UCI sets.
        splits: how many of the published splits, from the first.
        hidden: units of the hidden layer.
        steps: of Adam, half at a rate of 0.01 and half at 0.001, with 64 data each.
        decay: prior precision in training, times the noise variance that it supposes; in units of the standardised
            targets.
        fits: by the name they are shown under.
        peers: structures of laplace-torch to run beside, where it is installed.
        peer_splits: how many splits these have: they are slow.
        data_dir: folder of the data sets' files; None takes KRONFISHER_DATA.
    """

    sets: Sequence[str] = NAMES
    splits: int = 20
    hidden: int = 50
    steps: int = 1500
    decay: float = 0.1
    fits: Mapping[str, Fit] = field(default_factory=lambda: FITS)
    peers: Sequence[str] = ("diag", "kron", "full")
    peer_splits: int = 2
    data_dir: Path | None = None

    @classmethod
    def quick(cls, data_dir: Path | None = None) -> Self:
        """The same in seconds, on two small sets."""
        names = ("K-FAC", "K-FOC", "EKFAC on K-FAC", "exact blocks")
        fits = {name: FITS[name] for name in ("diagonal", *names)}
        return cls(("bostonHousing", "yacht"), 2, 10, 200, fits=fits, peers=("kron",), peer_splits=1, data_dir=data_dir)

    def check(self) -> None:
        for name in self.sets:
            data.load(name, data_dir=self.data_dir)

    def measure(self, networks: list[Record], rows: list[Record], say: Say, step: Step) -> None:
        splits = [(name, split) for name in self.sets for split in range(min(self.splits, _split_count(name)))]
        for done, (name, split) in enumerate(splits):
            what, start = f"{name}, split {split}", time.perf_counter()
            step(f"{what}: training", done, len(splits))
            dataset = data.load(name, data_dir=self.data_dir, split=split)
            network = self._train(dataset, split)
            problem = _Problem(dataset, network)
            networks.append({"problem": name, "split": split, "data": len(problem.x), **problem.plain()})
            for label in sorted(self.fits, key=lambda label: label != TRUTH):  # the others borrow from it
                step(f"{what}: {label}", done, len(splits))
                record = problem.ours(self.fits[label])
                if label == TRUTH and "marginal" in record:
                    problem.borrowed = record["marginal"]["prior_precision"], record["marginal"]["noise"]
                rows.append({"problem": name, "split": split, "fit": label, **record})
            for structure in self.peers if laplace_torch.available() and split < self.peer_splits else ():
                step(f"{what}: laplace-torch, {structure}", done, len(splits))
                record = problem.theirs(structure)
                rows.append({"problem": name, "split": split, "fit": f"laplace-torch {structure}", **record})
            say(f"{what}: test RMSE {networks[-1]['rmse']:.3g}, {duration(time.perf_counter() - start)}")

    def findings(self, networks: list[Record], rows: list[Record], finished: bool) -> "UCIFindings":
        return UCIFindings(self._settings(), networks, rows, finished)

    def _train(self, dataset: Dataset, seed: int) -> nn.Module:
        model = mlp(dataset.input_shape[0], (self.hidden,), 1, activation="tanh", seed=seed)
        size = len(dataset.train_inputs)
        epochs = max(1, math.ceil(self.steps / 2 / math.ceil(size / 64)))
        for half, rate in enumerate((1e-2, 1e-3)):
            train(model, dataset, epochs=epochs, lr=rate, weight_decay=self.decay / size, seed=2 * seed + half)
        return model.double()

    def _settings(self) -> dict[str, Any]:
        names = ("splits", "hidden", "steps", "decay", "peer_splits")
        fits = {name: repr(fit) for name, fit in self.fits.items()}
        return {"study": "uci", "sets": list(self.sets), **{name: getattr(self, name) for name in names}, "fits": fits}


class _Problem:
    """One trained network with its data, in float64; log likelihoods are of the targets in their own units."""

    def __init__(self, dataset: Dataset, model: nn.Module) -> None:
        self.model, self.scale = model, dataset.scale
        self.borrowed: tuple[float, float] | None = None
        self.x, self.y = dataset.train_inputs.double(), dataset.train_targets.double()
        self.new, self.targets = dataset.test_inputs.double(), dataset.test_targets.double()
        with torch.no_grad():
            self.residual = float((model(self.x) - self.y).square().mean())
            self.error = (model(self.new) - self.targets).square()

    def density(self, variance: Tensor | float) -> float:
        """Mean log density of the test targets under normal distributions around the network's outputs."""
        variance = torch.as_tensor(variance, dtype=torch.float64)
        terms = -0.5 * (self.error / variance + (2 * math.pi * variance).log())
        return float(terms.mean()) - math.log(self.scale)

    def plain(self) -> dict[str, float]:
        """Of the network alone, whose noise is the training residual."""
        return {"rmse": float(self.error.mean().sqrt()) * self.scale, "log_likelihood": self.density(self.residual)}

    def ours(self, fit: Fit) -> dict[str, Any]:
        """Test log likelihoods, hyper-parameters, and the seconds of estimating, tuning and predicting."""
        record: dict[str, Any] = {}
        try:
            start = time.process_time()
            batches = list(zip(self.x.split(512), self.y.split(512), strict=True))
            fisher = estimate(self.model, batches, Gaussian(self.residual), fit=fit, labels="exact")
            record |= {"bytes": fisher.bytes, "seconds": time.process_time() - start}
            for name in TUNED if self.borrowed else list(TUNED)[:2]:
                start = time.process_time()
                if name == "borrowed" and self.borrowed:
                    posterior = Laplace(self.model, fisher, self.borrowed[0], noise=self.borrowed[1])
                else:
                    posterior = Laplace(self.model, fisher).optimize_prior(noise=name == "marginal")
                tuned = time.process_time()
                variance = posterior.predict(self.new).variance
                precision = next(iter(posterior.prior_precision.values()))
                record[name] = {
                    "log_likelihood": self.density(variance),
                    "prior_precision": float(precision),
                    "noise": posterior.noise,
                    "evidence": float(posterior.log_marginal_likelihood()),
                    "seconds": [tuned - start, time.process_time() - tuned],
                }
        except (UnsupportedError, MemoryBudgetError, NumericalError) as reason:
            return {"failure": str(reason)}
        return record

    def theirs(self, structure: str) -> dict[str, Any]:
        """The same by laplace-torch."""
        record = laplace_torch.regression(self.model, self.x, self.y, self.new, structure)
        variance, seconds = record.pop("variance"), record.pop("estimate")
        return {"seconds": seconds, "marginal": {"log_likelihood": self.density(variance), **record}}


def _split_count(name: str) -> int:
    return 5 if name == "protein-tertiary-structure" else 20
