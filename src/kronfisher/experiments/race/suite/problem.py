"""A problem of the suite: data, network, batch; loss, likelihood and test metric follow from the kind of targets."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfisher.experiments.data import Dataset
from kronfisher.likelihoods import Likelihood

__all__ = ["PROBLEMS", "Loaded", "Problem", "penalty_of", "register", "require"]

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """One of the suite's problems.

    Attributes:
        name: what the command line calls it.
        family: the kind of network or task.
        data: makes the data set from the folder of all files, or None.
        network: makes the network for a data set, with a seed of its initial weights.
        batch: the baselines' first batch; None: all data.
        evaluated: the first so many examples of each part are evaluated.
        pretrain: makes the weights that `network` starts from, from the folder of all files; `network` then takes them
            as its third argument.
    """

    name: str
    family: str
    data: Callable[[Path | None], Dataset]
    network: Callable[..., nn.Module]
    batch: int | None = 128
    evaluated: int = 2_000
    pretrain: Callable[[Path | None], State] | None = None

    def load(self, data_dir: Path | None = None, folder: Path | None = None) -> "Loaded":
        """The problem with its data, the same for every run; what is pre-trained is kept in `folder`, if given."""
        return Loaded(self, self.data(data_dir), self._pretrained(data_dir, folder))

    def _pretrained(self, data_dir: Path | None, folder: Path | None) -> State | None:
        if self.pretrain is None:
            return None
        path = None if folder is None else folder / "pretrained" / f"{self.name}.pt"
        if path is not None and path.exists():
            return torch.load(path, weights_only=True)
        state = self.pretrain(data_dir)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(dict(state), path)
        return state


PROBLEMS: dict[str, Problem] = {}
"""Name → problem."""


def register(problem: Problem) -> None:
    """Make a problem part of the suite."""
    PROBLEMS[problem.name] = problem


def require(problems: Sequence[str], seeds: Sequence[int], *seconds: float) -> None:
    """ValueError unless the problems are known, the seeds possible, and the times positive."""
    if odd := [name for name in problems if name not in PROBLEMS]:
        raise ValueError(f"there is no problem {odd[0]!r} in the suite; there are {', '.join(PROBLEMS)}")
    if not problems or not seeds or min(seeds) < 0:
        raise ValueError("the suite needs at least one problem and one seed, from 0 on")
    if not min(seconds) > 0:
        raise ValueError(f"times and batches must be positive, not {min(seconds):g}")


@dataclass(frozen=True, eq=False)
class Loaded:
    """A problem with its data in memory."""

    problem: Problem
    dataset: Dataset
    state: State | None = None

    @property
    def likelihood(self) -> Likelihood:
        """Its negative logarithm is `loss`, but for constants."""
        return self.dataset.likelihood

    @property
    def size(self) -> int:
        """Training examples."""
        return len(self.dataset.train_inputs)

    @property
    def batch(self) -> int:
        """The baselines' first batch."""
        return min(self.problem.batch or self.size, self.size)

    def model(self, seed: int) -> nn.Module:
        """The network at the initial weights of that seed, in train mode."""
        given: tuple[Any, ...] = () if self.state is None else (self.state,)
        return self.problem.network(self.dataset, seed, *given).train()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over examples of cross-entropy, Bernoulli or Poisson loss, or half the squared error, all summed.

        The Poisson loss is half the deviance, so that no loss is negative.
        """
        task = self.dataset.task
        if task == "classes":
            total = functional.cross_entropy(_classes_second(outputs, targets), targets, reduction="sum")
        elif task == "probabilities":
            total = functional.binary_cross_entropy_with_logits(outputs.flatten(1), targets.flatten(1), reduction="sum")
        elif task == "counts":
            total = (outputs.exp() - targets * outputs + torch.xlogy(targets, targets) - targets).sum()
        else:
            total = 0.5 * functional.mse_loss(outputs, targets, reduction="sum")
        return total / len(outputs)

    @property
    def metric(self) -> str:
        """What is measured beside the loss: "accuracy" of classes, else the squared "error" per example."""
        return "accuracy" if self.dataset.task == "classes" else "error"

    @torch.no_grad()
    def evaluate(self, model: nn.Module, *, test: bool = False) -> tuple[float, float]:
        """Loss, with the model's own penalty, and `metric` of training or test data, in eval mode."""
        loss, metric, count = 0.0, 0.0, 0
        with _eval_mode(model):
            for x, y in self.dataset.batches(500, self.problem.evaluated, test=test):
                outputs = model(x)
                total = self.loss(outputs, y)
                if (penalty := penalty_of(model)) is not None:
                    total = total + penalty
                loss, metric, count = loss + total.item() * len(x), metric + self._measure(outputs, y), count + len(x)
        return loss / count, metric / count

    def _measure(self, outputs: Tensor, targets: Tensor) -> float:
        task = self.dataset.task
        if task == "classes":
            hits = (_classes_second(outputs, targets).argmax(1) == targets).double()
            return hits.flatten(1).mean(1).sum().item() if hits.dim() > 1 else hits.sum().item()
        means = {"probabilities": torch.sigmoid, "counts": torch.exp}.get(task, lambda each: each)(outputs)
        return (means - targets).square().sum().item()


def penalty_of(model: nn.Module) -> Tensor | None:
    """The term of the loss that a model has besides its likelihood's, from its last forward pass."""
    return getattr(model, "penalty", None)


def _classes_second(outputs: Tensor, targets: Tensor) -> Tensor:
    """Logits ``[N, T, C]`` as ``[N, C, T]``; ``[N, C]`` and ``[N, C, S, S]`` as they are."""
    return outputs.movedim(-1, 1) if outputs.shape[:-1] == targets.shape and outputs.dim() > 2 else outputs


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
