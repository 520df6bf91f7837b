"""Fashion-MNIST with MNIST as data from elsewhere: calibration, and how well uncertainty tells the two apart."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from kronfisher.errors import MemoryBudgetError, NumericalError, UnsupportedError
from kronfisher.estimation.estimate import estimate
from kronfisher.experiments import data
from kronfisher.experiments.networks import for_data
from kronfisher.experiments.progress import Say, Step
from kronfisher.experiments.studies.experiment import Experiment
from kronfisher.experiments.studies.findings import Findings, Record, deviation
from kronfisher.experiments.training import train
from kronfisher.experiments.uncertainty import laplace_torch
from kronfisher.experiments.uncertainty.classification import judge
from kronfisher.fits import EKFAC, KFAC, KFOC, TKFAC, Diagonal, Fit
from kronfisher.laplace import Laplace
from kronfisher.likelihoods import Categorical
from kronfisher.tables import Table, duration

__all__ = ["CALIBRATED", "FITS", "OODFindings", "OODStudy"]

FITS: Mapping[str, Fit] = {
    "diagonal": Diagonal(),
    "K-FAC": KFAC(),
    "TKFAC": TKFAC(),
    "K-FOC": KFOC(),
    "EKFAC on K-FAC": EKFAC(),
    "EKFAC on K-FOC": EKFAC(KFOC()),
}
CALIBRATED = ", calibrated"
COLUMNS = {
    "accuracy": "accuracy",
    "nll": "negative log likelihood",
    "ece": "calibration error",
    "auroc": "AUROC",
    "estimate": "estimate",
    "tune": "tune",
    "predict": "predict",
}


@dataclass(frozen=True)
class OODStudy(Experiment):
    """The settings of the study: a network of all weights, the linearised predictive with the probit link.

    The prior precision is one number, where the marginal likelihood is largest, and again where the predictions of
    validation data are best.

    Attributes:
        inside: data to train and to test on.
        outside: whose test data come from elsewhere.
        network: see `kronfisher.experiments.networks.names`.
        seeds: networks trained.
        train_size: data to train and to estimate the Fisher matrix on.
        validation_size: further data to calibrate on.
        test_size: test data of each kind.
        epochs: of training.
        fits: by the name they are shown under.
        peers: structures of laplace-torch to run beside, where it is installed.
        data_dir: folder of the data sets' files; None takes KRONFISHER_DATA.
    """

    inside: str = "fashion-mnist"
    outside: str = "mnist"
    network: str = "lenet5"
    seeds: int = 3
    train_size: int = 5_000
    validation_size: int = 1_000
    test_size: int = 1_000
    epochs: int = 15
    fits: Mapping[str, Fit] = field(default_factory=lambda: FITS)
    peers: Sequence[str] = ("kron",)
    data_dir: Path | None = None

    @classmethod
    def quick(cls, data_dir: Path | None = None) -> Self:
        """The same in seconds."""
        fits = {name: FITS[name] for name in ("diagonal", "K-FAC", "EKFAC on K-FAC")}
        return cls(
            seeds=1,
            train_size=300,
            validation_size=100,
            test_size=100,
            epochs=2,
            fits=fits,
            peers=(),
            data_dir=data_dir,
        )

    def check(self) -> None:
        for name in (self.inside, self.outside):
            data.load(name, data_dir=self.data_dir)

    def measure(self, networks: list[Record], rows: list[Record], say: Say, step: Step) -> None:
        whole = data.load(self.inside, data_dir=self.data_dir)
        inside = whole.head(self.train_size, self.test_size)
        kept = whole.head(self.train_size + self.validation_size)
        validation = (kept.train_inputs[self.train_size :], kept.train_targets[self.train_size :])
        outside = data.load(self.outside, data_dir=self.data_dir).head(1, self.test_size)
        batches = inside.batches(500)
        for seed in range(self.seeds):
            start = time.perf_counter()
            step(f"seed {seed}: training", seed, self.seeds)
            model = for_data(self.network, inside, seed=seed)
            history = train(model, inside, epochs=self.epochs, seed=seed)
            networks.append({"problem": self.inside, "seed": seed, "loss": history[-1]})
            tests = (inside.test_inputs, outside.test_inputs, inside.test_targets)

            def plain(x: Tensor, model: nn.Module = model) -> Tensor:
                with torch.no_grad():
                    return model(x).log_softmax(-1)

            rows.append(self._row("MAP", seed, judge(plain, *tests)))
            for label, fit in self.fits.items():
                step(f"seed {seed}: {label}", seed, self.seeds)
                try:
                    posterior, record = self._ours(model, batches, fit, seed)
                    rows.append(self._row(label, seed, record | judge(log_probabilities_of(posterior), *tests)))
                    record = self._calibrate(posterior, validation)
                    rows.append(
                        self._row(f"{label}{CALIBRATED}", seed, record | judge(log_probabilities_of(posterior), *tests))
                    )
                except (UnsupportedError, MemoryBudgetError, NumericalError) as reason:
                    rows.append(self._row(label, seed, {"failure": str(reason)}))
            for structure in self.peers if laplace_torch.available() else ():
                step(f"seed {seed}: laplace-torch, {structure}", seed, self.seeds)
                posterior, estimating, tuning = laplace_torch.classifier(model, batches, structure)

                def theirs(x: Tensor, posterior: Any = posterior) -> Tensor:
                    return posterior(x, pred_type="glm", link_approx="probit").detach().log()

                record = {
                    "estimate": estimating,
                    "tune": tuning,
                    **judge(theirs, *tests, at_once=laplace_torch.AT_ONCE),
                }
                rows.append(self._row(f"laplace-torch {structure}", seed, record))
            say(f"seed {seed}: {duration(time.perf_counter() - start)}")

    def findings(self, networks: list[Record], rows: list[Record], finished: bool) -> "OODFindings":
        return OODFindings(self._settings(), networks, rows, finished)

    def _row(self, fit: str, seed: int, record: Mapping[str, Any]) -> Record:
        return {"problem": self.inside, "seed": seed, "fit": fit, **record}

    @staticmethod
    def _ours(
        model: nn.Module, batches: list[tuple[Tensor, Tensor]], fit: Fit, seed: int
    ) -> tuple[Laplace, dict[str, Any]]:
        start = time.process_time()
        fisher = estimate(model, batches, Categorical(), fit=fit, labels="exact", seed=seed)
        estimated = time.process_time()
        posterior = Laplace(model, fisher).optimize_prior()
        seconds = {"estimate": estimated - start, "tune": time.process_time() - estimated}
        return posterior, {**seconds, **_prior(posterior), "bytes": fisher.bytes}

    @staticmethod
    def _calibrate(posterior: Laplace, validation: tuple[Tensor, Tensor]) -> dict[str, Any]:
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # candidates below the rounding of the largest eigenvalue
            posterior.calibrate(list(zip(*(part.split(250) for part in validation), strict=True)))
        return {"tune": time.process_time() - start, **_prior(posterior)}

    def _settings(self) -> dict[str, Any]:
        names = ("inside", "outside", "network", "seeds", "train_size", "validation_size", "test_size", "epochs")
        fits = {name: repr(fit) for name, fit in self.fits.items()}
        return {"study": "ood", **{name: getattr(self, name) for name in names}, "fits": fits}


def log_probabilities_of(posterior: Laplace) -> Callable[[Tensor], Tensor]:
    """The function from inputs to the logarithms of predicted probabilities."""

    def predict(x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a prior below the rounding of the largest eigenvalue
            logits = posterior.predict(x).logits
        assert logits is not None
        return logits.log_softmax(-1)

    return predict


def _prior(posterior: Laplace) -> dict[str, float]:
    precision = float(next(iter(posterior.prior_precision.values())))
    return {"prior_precision": precision, "evidence": float(posterior.log_marginal_likelihood())}


@dataclass(frozen=True, eq=False)
class OODFindings(Findings):
    """Accuracy, likelihood and calibration of each posterior's probabilities."""

    def tables(self) -> list[Table]:
        """Means and deviations over the seeds."""
        settings = self.settings
        title = f"{settings['network']} on {settings['inside']}, {settings['outside']} from elsewhere"
        table = Table(f"{title}; mean ± deviation over seeds, seconds of one thread", ("", *COLUMNS.values()))
        for fit in self.distinct("fit"):
            rows = self.select(fit=fit)
            cells = []
            for key in COLUMNS:
                values = [row[key] for row in rows if key in row]
                if key in ("estimate", "tune", "predict"):
                    cells.append(duration(deviation(values)[0]) if values else "–")
                else:
                    average, spread = deviation(values)
                    cells.append(f"{average:.4f} ± {spread:.4f}" if len(values) > 1 else f"{average:.4f}")
            table.add(fit, *cells)
        return [table]

    def draw(self, folder: str | Path) -> list[Path]:
        """The four measures of every fit side by side; one PNG file."""
        from kronfisher.experiments.uncertainty.figures import measures

        names = {key: name for key, name in COLUMNS.items() if key in ("nll", "ece", "auroc")}
        return measures(self, folder, names, same=CALIBRATED)
