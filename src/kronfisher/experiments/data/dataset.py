"""A data set in memory: tensors to train and to test on, and the likelihood that fits the targets."""

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kronfisher.likelihoods import Bernoulli, Categorical, Gaussian, Poisson

Task = Literal["classes", "values", "probabilities", "counts"]


@dataclass(frozen=True, repr=False, eq=False)
class Dataset:
    """A data set in memory, float32 (text: int64), split into training and test data.

    Attributes:
        name: the name `load` knows it by.
        train_inputs: ``[N, *input_shape]``.
        train_targets: ``[N]`` class indices (int64), of text ``[N, T]``, of pixels ``[N, S, S]``, or
            ``[N, outputs]`` values, probabilities or counts.
        test_inputs: as `train_inputs`.
        test_targets: as `train_targets`.
        task: what the targets are: "classes", real "values", "probabilities" of ones or "counts".
        outputs: how many numbers a network predicts for one example, or for one character of a text.
        scale: standard deviation of the targets in their own units, where they were standardised.
    """

    name: str
    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    task: Task
    outputs: int
    scale: float = 1.0

    def __repr__(self) -> str:
        train, test = list(self.train_inputs.shape), list(self.test_inputs.shape)
        return f"Dataset({self.name!r}, train {train}, test {test}, {self.task})"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example, without the batch's dimension."""
        return tuple(self.train_inputs.shape[1:])

    @property
    def text(self) -> bool:
        """Whether inputs are indices into a vocabulary of `outputs`."""
        return not self.train_inputs.is_floating_point()

    @property
    def likelihood(self) -> "Categorical | Gaussian | Bernoulli | Poisson":
        """The likelihood of a network's outputs: categorical, Gaussian of unit variance, Bernoulli or Poisson."""
        from kronfisher.likelihoods import Bernoulli, Categorical, Gaussian, Poisson

        kinds = {"classes": Categorical, "values": Gaussian, "probabilities": Bernoulli, "counts": Poisson}
        return kinds[self.task]()

    def batches(self, size: int = 128, limit: int | None = None, *, test: bool = False) -> list[tuple[Tensor, Tensor]]:
        """The first `limit` examples as a list of ``(inputs, targets)`` of `size` each; views, nothing is copied.

        Example:
            >>> from kronfisher.experiments import data
            >>> [len(x) for x, y in data.load("digits").batches(400, limit=1000)]
            [400, 400, 200]
        """
        inputs, targets = (self.test_inputs, self.test_targets) if test else (self.train_inputs, self.train_targets)
        return list(zip(inputs[:limit].split(size), targets[:limit].split(size), strict=True))

    def reconstruction(self) -> "Dataset":
        """The same inputs, flattened, with themselves as targets: the task of an auto-encoder.

        Inputs within [0, 1] become probabilities of ones (Bernoulli), any others are values (Gaussian).

        Example:
            >>> from kronfisher.experiments import data
            >>> digits = data.load("digits").reconstruction()
            >>> digits.task, digits.outputs, digits.train_targets is digits.train_inputs
            ('probabilities', 64, True)
        """
        train, test = self.train_inputs.flatten(1), self.test_inputs.flatten(1)
        within = all(bool((x >= 0).all() & (x <= 1).all()) for x in (train, test))
        task: Task = "probabilities" if within else "values"
        return Dataset(self.name, train, train, test, test, task, prod(self.input_shape))

    def flat(self) -> "Dataset":
        """The same with inputs that are vectors."""
        return replace(self, train_inputs=self.train_inputs.flatten(1), test_inputs=self.test_inputs.flatten(1))

    def head(self, train_size: int | None = None, test_size: int | None = None) -> "Dataset":
        """At most the first `train_size` and `test_size` examples."""
        return replace(
            self,
            train_inputs=self.train_inputs[:train_size],
            train_targets=self.train_targets[:train_size],
            test_inputs=self.test_inputs[:test_size],
            test_targets=self.test_targets[:test_size],
        )


def generator(seed: int, stream: int = 0) -> torch.Generator:
    """A generator of its own for each `stream` of one `seed`; torch's global one is never touched."""
    return torch.Generator().manual_seed(seed * 1_000_003 + stream)
