"""The problems of the races: data, network, loss, and how much is evaluated how often."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfisher.experiments import data, networks
from kronfisher.experiments.data import Dataset
from kronfisher.likelihoods import Likelihood

__all__ = ["PROBLEMS", "Problem", "Task"]


@dataclass(frozen=True)
class Problem:
    """A network on a data set, and the budget of a race on it.

    Attributes:
        name: what the command line calls it.
        data: name of the data set.
        network: name of the network; an "autoencoder" learns the inputs.
        seconds: training time of one run, by default.
        train_size: at most so many data are trained on; None takes all.
        evaluated: the first so many data of each part are evaluated along the way; at the end all test data are.
        evaluations: how often.
        activation: of the network, None for its own.
        mean: the loss of an example is averaged over its outputs, instead of summed.
        weight_decay: of AdamW, Muon and SOAP.
    """

    name: str
    data: str
    network: str
    seconds: float
    train_size: int | None = None
    evaluated: int = 5_000
    evaluations: int = 40
    activation: str | None = None
    mean: bool = False
    weight_decay: float = 0.0

    def load(self, data_dir: str | Path | None = None, device: str | torch.device = "cpu") -> "Task":
        """The problem with its data, which are the same for every seed of a race.

        Raises:
            FileNotFoundError: a file of the data set is missing.
        """
        dataset = networks.task_for(self.network, data.load(self.data, data_dir=data_dir).head(self.train_size))
        parts = ("train_inputs", "train_targets", "test_inputs", "test_targets")
        return Task(self, replace(dataset, **{part: getattr(dataset, part).to(device) for part in parts}))


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("curves", "curves", "autoencoder", seconds=180),
        Problem("mnist", "mnist", "autoencoder", seconds=600),
        Problem("faces", "faces", "autoencoder", seconds=600),
        Problem("alexnet", "fashion-mnist", "alexnet", 600, evaluated=2_000, evaluations=20, weight_decay=0.01),
        Problem("digits", "digits", "autoencoder", seconds=10, evaluations=20),
    )
}
"""The classic auto-encoders (Martens & Grosse 2015), an AlexNet on Fashion-MNIST, and one that needs no files."""


@dataclass(frozen=True, eq=False)
class Task:
    """A problem with its data in memory, on the device of the race.

    Example:
        >>> task = PROBLEMS["digits"].load()
        >>> sorted(task.evaluate(task.model(seed=0)))
        ['test_error', 'test_loss', 'train_error', 'train_loss']
    """

    problem: Problem
    dataset: Dataset

    @property
    def likelihood(self) -> Likelihood:
        """Its negative logarithm is `loss`, but for constants and the mean over outputs."""
        return self.dataset.likelihood

    @property
    def scale(self) -> float:
        """`loss` over the negative log-likelihood of an example."""
        return 1 / self.dataset.outputs if self.problem.mean and self.dataset.task != "classes" else 1.0

    def model(self, seed: int) -> nn.Module:
        """The network at the initial weights of that seed."""
        model = networks.for_data(self.problem.network, self.dataset, activation=self.problem.activation, seed=seed)
        return model.to(self.dataset.train_inputs.device)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over data of cross-entropy, of Bernoulli loss summed over outputs, or of half the squared error."""
        if self.dataset.task == "classes":
            return functional.cross_entropy(outputs, targets)
        if self.dataset.task == "probabilities":
            total = functional.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")
        else:
            total = 0.5 * functional.mse_loss(outputs, targets, reduction="sum")
        return total * (self.scale / len(outputs))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, *, all_test: bool = False) -> dict[str, float]:
        """Loss, and accuracy (classes) or squared error per example, of training and test data; in eval mode.

        Args:
            model: is back in its own mode afterwards.
            all_test: all test data instead of the first `Problem.evaluated`; the training data are left out.
        """
        modes: list[Callable[[], object]] = [
            lambda m=m, on=m.training: setattr(m, "training", on) for m in model.modules()
        ]
        model.eval()
        measures = {}
        for part in ("test",) if all_test else ("train", "test"):
            limit = None if all_test else self.problem.evaluated
            batches = self.dataset.batches(500, limit, test=part == "test")
            loss, error, count = 0.0, 0.0, sum(len(x) for x, _ in batches)
            for x, y in batches:
                outputs = model(x)
                loss += self.loss(outputs, y).item() * len(x)
                error += self._errors(outputs, y)
            name = "accuracy" if self.dataset.task == "classes" else "error"
            measures |= {f"{part}_loss": loss / count, f"{part}_{name}": error / count}
        for restore in modes:
            restore()
        return measures

    def _errors(self, outputs: Tensor, targets: Tensor) -> float:
        if self.dataset.task == "classes":
            return float((outputs.argmax(1) == targets).sum())
        means = outputs.sigmoid() if self.dataset.task == "probabilities" else outputs
        return (means - targets).square().sum().item()

    def __repr__(self) -> str:
        return f"Task({self.problem.name!r}, {len(self.dataset.train_inputs):,} × {prod(self.dataset.input_shape)})"
