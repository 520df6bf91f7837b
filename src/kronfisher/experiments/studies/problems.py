"""The networks that the studies look at: which data, how trained, and what their Fisher matrix is estimated from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kronfisher.experiments import data, networks
from kronfisher.experiments.data import Dataset
from kronfisher.experiments.training import evaluate, train

__all__ = ["Problem"]


@dataclass(frozen=True)
class Problem:
    """A network, its data and its training by Adam.

    Attributes:
        title: what tables and pictures call it.
        data: name of the data set.
        network: name of the network; an "autoencoder" learns the inputs.
        activation: of its units; None takes the network's own.
        train_size: data to train on; None takes all.
        test_size: data to test on; None takes all.
        epochs: of training, at most.
        batch_size: data in a step.
        lr: Adam's learning rate.
        weight_decay: of the training.
        patience: epochs without a better test loss before training ends; None trains all epochs.
        limit: data that the Fisher is estimated from, the first of the training data; None takes all.
    """

    title: str
    data: str
    network: str
    activation: str | None = None
    train_size: int | None = None
    test_size: int | None = None
    epochs: int = 5
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.0
    patience: int | None = None
    limit: int | None = None

    def load(self, seed: int, data_dir: Path | None = None) -> tuple[Dataset, nn.Module]:
        """Data and initial weights by `seed`, which also chooses the published split of a UCI set.

        Raises:
            FileNotFoundError: a file of the data set is missing.
        """
        dataset = self._data(seed, data_dir, self.train_size, self.test_size)
        return dataset, networks.for_data(self.network, dataset, activation=self.activation, seed=seed)

    def check(self, data_dir: Path | None = None) -> None:
        """Find the files of the data set before hours of work.

        Raises:
            FileNotFoundError: one is missing; the message says which, and where it comes from.
        """
        self._data(0, data_dir, 10, 10)

    def _data(self, seed: int, data_dir: Path | None, train_size: int | None, test_size: int | None) -> Dataset:
        sizes = {"train_size": train_size, "test_size": test_size}
        dataset = data.load(self.data, data_dir=data_dir, seed=seed, split=seed, **sizes)
        return networks.task_for(self.network, dataset)

    def train(
        self,
        dataset: Dataset,
        model: nn.Module,
        seed: int,
        on_step: Callable[[int, int, float], None] | None = None,
    ) -> dict[str, Any]:
        """Train `model` in place; what became of it, as a record."""
        options = {"epochs": self.epochs, "batch_size": self.batch_size, "lr": self.lr, "seed": seed}
        options |= {"weight_decay": self.weight_decay, "patience": self.patience}
        history = train(model, dataset, on_step=on_step, **options)
        tested = {f"test_{name}": value for name, value in evaluate(model, dataset).items()}
        return {"problem": self.title, "seed": seed, "epochs": len(history), "train_loss": history[-1], **tested}
