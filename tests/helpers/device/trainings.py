"""Four small networks with their data; estimates and trainings of them on any device."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import kronfisher as kf
from kronfisher.likelihoods import Likelihood
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
    """One of the `NETWORKS`, in float64, with four batches."""
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
    }[network]()
    return Problem(model.double(), likelihood, list(zip(x, y, strict=True)))


def estimate(device: torch.device, network: str, fit: Any) -> Tensor:
    """The dense estimate, on the CPU."""
    model, likelihood, batches = problem(network).on(device)
    return kf.estimate(model, batches, likelihood, fit=fit).to_dense().cpu()
