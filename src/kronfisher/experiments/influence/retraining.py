"""Training networks on some of the data, for studies that compare scores with it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from kronfisher.experiments.data import Dataset
from kronfisher.experiments.data.dataset import generator
from kronfisher.experiments.networks.feedforward import mlp

__all__ = ["OTHER_SEED", "Regressors", "Trainer"]

OTHER_SEED = 1000  # of the first network that is scored: those that are trained again have seeds from 0


@dataclass(frozen=True, eq=False)
class Trainer:
    """Training of a network by stochastic gradients with momentum, or Adam, and the loss of every query after it.

    The loss of training is a mean over examples and, of a text, over its characters.

    Attributes:
        dataset: training data, and queries in the place of test data.
        make: seed → network.
        epochs: of training.
        batch_size: examples of a step.
        lr: the first step size; it falls to zero along a cosine.
        decay: weight decay.
        adam: in the place of momentum.
    """

    dataset: Dataset
    make: Callable[[int], nn.Module]
    epochs: int
    batch_size: int
    lr: float
    decay: float
    adam: bool = False

    def train(self, kept: Tensor, seed: int) -> nn.Module:
        """A network, in evaluation mode, trained on the examples with the indices `kept`."""
        x, y = self.dataset.train_inputs[kept], self.dataset.train_targets[kept]
        model, order = self.make(seed).train(), generator(seed, 1)
        steps = self.epochs * -(-len(x) // self.batch_size)
        if self.adam:
            optimizer = torch.optim.AdamW(model.parameters(), self.lr, weight_decay=self.decay)
        else:
            optimizer = torch.optim.SGD(model.parameters(), self.lr, momentum=0.9, weight_decay=self.decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(self.epochs):
            for some in torch.randperm(len(x), generator=order).split(self.batch_size):
                optimizer.zero_grad()
                (-self.dataset.likelihood.log_prob(model(x[some]), y[some]).mean() / y[0].numel()).backward()
                optimizer.step()
                schedule.step()
        optimizer.zero_grad()
        return model.eval()

    def __call__(self, kept: Tensor, seed: int) -> Tensor:
        """The loss of every query ``[Q]``."""
        model = self.train(kept, seed)
        with torch.no_grad():
            return -self.dataset.likelihood.log_prob(model(self.dataset.test_inputs), self.dataset.test_targets)

    @property
    def everything(self) -> Tensor:
        """The indices of all training examples."""
        return torch.arange(len(self.dataset.train_inputs))


@dataclass(frozen=True, eq=False)
class Regressors:
    """Perceptrons of several seeds that are trained side by side on the same examples, and their squared errors.

    Weights ``[S, O, I]`` of all S networks are multiplied in one product, so that ten take little longer than one.

    Attributes:
        dataset: training data, and queries in the place of test data.
        hidden: widths of the hidden layers, with rectified units.
        seeds: S.
        epochs: of training.
        batch_size: examples of a step.
        lr: step size of stochastic gradients.
        decay: weight decay.
        first_seed: that of the first network; the others follow it.
    """

    dataset: Dataset
    hidden: tuple[int, ...] = (128, 128, 128)
    seeds: int = 10
    epochs: int = 40
    batch_size: int = 32
    lr: float = 0.03
    decay: float = 1e-5
    first_seed: int = 0
    _last: dict[str, Tensor] = field(default_factory=dict, init=False)  # errors of all seeds after the last training

    def network(self, seed: int) -> nn.Sequential:
        """The network of one seed before training."""
        inputs, outputs = self.dataset.train_inputs.shape[1], self.dataset.train_targets.shape[1]
        return mlp(inputs, self.hidden, outputs, seed=seed)

    def train(self, kept: Tensor) -> list[Tensor]:
        """Weights ``[S, O, I]`` and biases ``[S, O]`` of all layers after training on the examples `kept`."""
        x, y = self.dataset.train_inputs[kept], self.dataset.train_targets[kept]
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        networks = [[p.detach() for p in self.network(seed).parameters()] for seed in seeds]
        weights = [torch.stack(each).requires_grad_() for each in zip(*networks, strict=True)]
        orders = [generator(seed, 1) for seed in seeds]
        for _ in range(self.epochs):
            places = torch.stack([torch.randperm(len(x), generator=order) for order in orders])
            whole = max(len(x) // self.batch_size * self.batch_size, min(len(x), self.batch_size))
            for some in places[:, :whole].split(self.batch_size, dim=1):  # a last batch of one would be all noise
                errors = (self.predict(weights, x[some]) - y[some]).square().mean(dim=(1, 2))
                gradients = torch.autograd.grad(errors.sum(), weights)
                with torch.no_grad():
                    for weight, gradient in zip(weights, gradients, strict=True):
                        weight.mul_(1 - self.lr * self.decay).sub_(gradient, alpha=self.lr)
        return [weight.detach() for weight in weights]

    @staticmethod
    def predict(weights: list[Tensor], x: Tensor) -> Tensor:
        """The outputs ``[S, n, O]`` of all networks for inputs ``[S, n, I]``."""
        layers = list(pairwise(weights))[::2]
        for number, (weight, bias) in enumerate(layers):
            x = torch.baddbmm(bias.unsqueeze(1), x if number == 0 else x.relu(), weight.mT)
        return x

    def first(self, weights: list[Tensor]) -> nn.Sequential:
        """The network of the first seed with its trained weights."""
        model = self.network(self.first_seed)
        with torch.no_grad():
            for parameter, values in zip(model.parameters(), weights, strict=True):
                parameter.copy_(values[0])
        return model.eval()

    def __call__(self, kept: Tensor, seed: int) -> Tensor:
        """The squared error of every query ``[Q]`` in one of the networks, from 0; the others' are kept for later."""
        if not torch.equal(kept, self._last.get("kept", kept[:0])):
            weights = self.train(kept)
            outputs = self.predict(weights, self.dataset.test_inputs.expand(self.seeds, -1, -1))
            self._last.update(kept=kept, errors=(outputs - self.dataset.test_targets).square().mean(dim=2))
        return self._last["errors"][seed]
