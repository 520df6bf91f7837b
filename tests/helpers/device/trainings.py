"""Four small networks with their data; estimates and trainings of them on any device."""

import copy
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import kronfisher as kf
from kronfisher.likelihoods import Likelihood
from kronfisher.optim.layerwise import output_changes
from tests.helpers.device.simulated import Wait, waits
from tests.helpers.networks import Tied, images, normalised, perceptron


class Problem(NamedTuple):
    """A network, its likelihood and its batches."""

    model: nn.Module
    likelihood: Likelihood
    batches: list[tuple[Tensor, Tensor]]

    def on(self, device: torch.device) -> "Problem":
        batches = [(x.to(device), y.to(device)) for x, y in self.batches]
        return Problem(copy.deepcopy(self.model).to(device), self.likelihood, batches)


NETWORKS = ("perceptron", "convolutions", "normalised", "positions")


def problem(network: str) -> Problem:
    """One of the `NETWORKS`, or "deep", in float64, with four batches."""
    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(7)

    def inputs(*shape: int) -> list[Tensor]:
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)]

    def labels(*shape: int) -> list[Tensor]:
        return [torch.randint(3, shape, generator=generator) for _ in range(4)]

    model, likelihood, x, y = {
        "perceptron": lambda: (perceptron(4, 6, 3), kf.Categorical(), inputs(16, 4), labels(16)),
        "convolutions": lambda: (images(), kf.Gaussian(), inputs(8, 2, 4, 4), inputs(8, 3)),
        "normalised": lambda: (normalised(), kf.Categorical(), inputs(12, 4), labels(12)),
        "positions": lambda: (Tied(), kf.Categorical(), inputs(6, 5, 4), labels(6, 5)),
        "deep": lambda: (deep(), kf.Categorical(), inputs(64, 4), labels(64)),
    }[network]()
    return Problem(model.double(), likelihood, list(zip(x, y, strict=True)))


def estimate(device: torch.device, network: str, fit: Any) -> Tensor:
    """The dense estimate, on the CPU."""
    model, likelihood, batches = problem(network).on(device)
    return kf.estimate(model, batches, likelihood, fit=fit).to_dense().cpu()


class Training(NamedTuple):
    """A training and what the host waited for.

    Attributes:
        weights: after the last step, flat, on the CPU.
        losses: one for each step.
        waits: step → what was waited for.
        renewals: step → what was renewed: the statistics of the batch count once, and each inverse once.
    """

    weights: Tensor
    losses: list[float]
    waits: list[list[Wait]]
    renewals: list[int]


def train(device: torch.device, network: str, fit: Any, steps: int, options: dict[str, Any]) -> Training:
    """Train with `kf.NaturalGradient`."""
    model, likelihood, batches = problem(network).on(device)
    optimizer = kf.NaturalGradient(model, likelihood, fit=fit, **options)
    losses, waited, renewals = [], [], []
    for step in range(steps):
        x, y = batches[step % len(batches)]
        due = int(optimizer.parts.statistics.is_due(step))
        with waits() as found:
            losses.append(optimizer.step(lambda x=x: model(x), y))
        made = sum(one.made == step for one in optimizer.parts.direction.inverses)
        waited.append(found)
        renewals.append(due + made)
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).cpu()
    return Training(weights, [float(loss) for loss in losses], waited, renewals)


def deep() -> nn.Module:
    """Weights of two shapes between the first and the last layer, one of them wider than high."""
    sizes = ((4, 6), (6, 6), (6, 9), (9, 6), (6, 6), (6, 3))
    return nn.Sequential(*[part for size in sizes for part in (nn.Linear(*size), nn.Tanh())][:-1])


def train_evened(device: torch.device, fit: Any, affordable: float, steps: int) -> Training:
    """Train a network whose output changes are evened, as those of large ones are, for this share of a pass."""
    with mock.patch.object(output_changes, "AFFORDABLE", affordable), mock.patch.object(output_changes, "CALLS", 0.0):
        return train(device, "deep", fit, steps, {})


def precondition(device: torch.device, network: str, fit: Any, steps: int) -> Training:
    """Train with `kf.Preconditioner` and SGD."""
    model, likelihood, batches = problem(network).on(device)
    preconditioner = kf.Preconditioner(model, likelihood, fit=fit)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses, waited, renewals = [], [], []
    for step in range(steps):
        x, y = batches[step % len(batches)]
        due = int(preconditioner.statistics.is_due(step))
        with waits() as found:
            optimizer.zero_grad()
            loss = -likelihood.log_prob(preconditioner(x, targets=y), y).mean()
            loss.backward()
            preconditioner.step()
            optimizer.step()
        made = sum(one.made == step for one in preconditioner.direction.inverses)
        losses.append(loss.detach())
        waited.append(found)
        renewals.append(due + made)
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).cpu()
    return Training(weights, [float(loss) for loss in losses], waited, renewals)
