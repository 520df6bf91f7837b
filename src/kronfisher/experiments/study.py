"""One comparison from names: which data, which network, how long trained, which fits."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kronfisher.estimation.compare import measure, parameters
from kronfisher.estimation.comparison import Comparison
from kronfisher.experiments import data, networks
from kronfisher.experiments.data import Dataset
from kronfisher.experiments.progress import Say, Step, ignore
from kronfisher.experiments.training import evaluate, train
from kronfisher.fits import FITS
from kronfisher.tables import duration

__all__ = ["Study"]


@dataclass(frozen=True)
class Study:
    """The settings of a comparison; every one has a default that gives an answer in seconds.

    Attributes:
        data: name of the data set, see `kronfisher.experiments.data.names`.
        network: name of the network, see `kronfisher.experiments.networks.names`; an "autoencoder" learns the inputs.
        fits: names of the fits, see `kronfisher.fits.FITS`.
        labels: "sampled", "exact" or "observed".
        samples: label draws an example, for sampled labels.
        limit: examples that the Fisher is estimated from, the first of the training set.
        train_size: examples that the network is trained on; None takes all.
        batch_size: examples in a batch, of the training and of the estimate.
        epochs: of training; 0 compares at the initial weights.
        lr: Adam's learning rate.
        seed: of data, initial weights, training and label draws.
        split: published split of a UCI set.
        data_dir: folder of the data sets' files; None takes KRONFISHER_DATA.
        memory_budget: bytes that an estimate may take; None sets no limit.

    Raises:
        ValueError: a setting is not possible; the message is one line.

    Example:
        >>> Study(fits=("kfac", "psvd"))
        Traceback (most recent call last):
        ValueError: there is no fit 'psvd'; there are auto, block-tridiagonal, diagonal, ...
    """

    data: str = "digits"
    network: str = "convnet"
    fits: tuple[str, ...] = ("kfac", "kfoc", "ekfac", "diagonal")
    labels: str = "sampled"
    samples: int = 1
    limit: int = 500
    train_size: int | None = None
    batch_size: int = 64
    epochs: int = 5
    lr: float = 3e-3
    seed: int = 0
    split: int = 0
    data_dir: Path | None = None
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be run before anything is loaded."""
        for kind, given, known in (
            ("data set", (self.data,), data.names()),
            ("network", (self.network,), networks.names()),
            ("fit", self.fits, sorted(FITS)),
            ("kind of labels", (self.labels,), ("sampled", "exact", "observed")),
        ):
            for name in given:
                if name not in known:
                    raise ValueError(f"there is no {kind} {name!r}; there are {', '.join(known)}")
        if not self.fits:
            raise ValueError(f"name at least one fit: {', '.join(sorted(FITS))}")
        least = {"samples": 1, "limit": 1, "batch_size": 1, "epochs": 0, "seed": 0, "split": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name.replace('_', '-')} is {getattr(self, name)} and must be at least {bound}")
        for name in ("train_size", "memory_budget", "lr"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name.replace('_', '-')} is {getattr(self, name)} and must be positive")

    def load(self) -> tuple[Dataset, nn.Module]:
        """The data set and the network at its initial weights.

        Raises:
            ValueError: the network cannot take such data.
            FileNotFoundError: a file of the data set is missing.
        """
        size = None if self.train_size is None else max(self.train_size, self.limit)
        dataset = data.load(self.data, data_dir=self.data_dir, train_size=size, seed=self.seed, split=self.split)
        dataset = networks.task_for(self.network, dataset)
        return dataset, networks.for_data(self.network, dataset, seed=self.seed)

    def run(
        self,
        dataset: Dataset,
        model: nn.Module,
        say: Say = ignore,
        step: Step = ignore,
    ) -> Comparison:
        """Train the model, in place, and compare the fits.

        A `KeyboardInterrupt` while fits are compared ends the comparison early: what is finished is returned, and its
        `finished` is False. During training there is nothing to save, and it passes through.

        Args:
            dataset: from `load`.
            model: from `load`.
            say: called with a line of text whenever a part is done.
            step: called with what is being done, how many steps of it are done, and of how many.

        Returns:
            One row per finished fit, the settings beside them.
        """
        learned = dataset.head(self.train_size)
        say(f"{dataset.name}: {len(learned.train_inputs):,} examples to train on, {len(dataset.test_inputs):,} to test")
        start, settings = time.perf_counter(), self._settings(model)
        if self.epochs:
            what = f"training {self.network}"
            train(
                model,
                learned,
                epochs=self.epochs,
                batch_size=self.batch_size,
                lr=self.lr,
                seed=self.seed,
                on_step=lambda done, total, loss: step(f"{what}, loss {loss:.3g}", done, total),
            )
        model.eval()
        settings |= {f"test_{name}": value for name, value in evaluate(model, dataset).items()}
        quality = f"test loss {settings['test_loss']:.3g}"
        if "test_accuracy" in settings:
            quality += f", accuracy {settings['test_accuracy']:.1%}"
        say(f"{self.network}: trained in {duration(time.perf_counter() - start)}, {quality}")
        rows, options = [], {k: settings[k] for k in ("labels", "samples", "seed", "memory_budget")}
        batches = dataset.batches(self.batch_size, self.limit)

        def progress(text: str) -> None:
            fit = self.fits[min(len(rows), len(self.fits) - 1)]
            step(f"{fit}: {text}" if text else fit, len(rows), len(self.fits))

        try:
            for row in measure(model, batches, dataset.likelihood, self.fits, progress=progress, **options):
                rows.append(row)
                say(f"  {row}")
        except KeyboardInterrupt:
            return Comparison(tuple(rows), settings, finished=False)
        return Comparison(tuple(rows), settings)

    def _settings(self, model: nn.Module) -> dict[str, Any]:
        settings = asdict(self) | {"parameters": parameters(model)}
        return {key: value for key, value in settings.items() if key not in ("data_dir", "fits")}
