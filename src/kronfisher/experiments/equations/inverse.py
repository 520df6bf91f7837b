"""A conductivity from few noisy observations of the solution: constants that are trained beside a network."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kronfisher.experiments.equations.equation import Equation, slopes, tanh_network
from kronfisher.likelihoods import Residuals

__all__ = ["INVERSE", "Conductivity", "Inverse"]

TRUTH = (1.0, 0.5)  # κ(x) = 1 + x₁/2
OBSERVATIONS, NOISE = 50, 0.01
START = (0.5, 0.0)


class Conductivity(nn.Module):
    """A network u(x), the constants of κ(x) = κ₀ + κ₁x₁, and what was observed.

    Attributes:
        constants: κ₀ and κ₁, trained.
        places: of the observations ``[n, 2]``.
        observed: the solution there under the true κ, with noise, ``[n]``.
    """

    places: Tensor
    observed: Tensor

    def __init__(self, sizes: tuple[int, ...], seed: int) -> None:
        super().__init__()
        self.sizes, self.solution = sizes, tanh_network(sizes)
        self.constants = nn.Parameter(torch.tensor(START, dtype=torch.float64))
        generator = torch.Generator().manual_seed(seed)
        places = torch.rand(OBSERVATIONS, 2, dtype=torch.float64, generator=generator)
        noise = torch.randn(OBSERVATIONS, dtype=torch.float64, generator=generator)
        self.register_buffer("places", places)
        self.register_buffer("observed", _solution(places) + NOISE * noise)

    def restart(self) -> None:
        """Draw other weights for the same observations, and forget the constants."""
        self.solution = tanh_network(self.sizes)
        with torch.no_grad():
            self.constants.copy_(torch.tensor(START))

    def forward(self, x: Tensor) -> Tensor:
        """The solution u ``[n, 1]``."""
        return self.solution(x)


@dataclass(frozen=True)
class Inverse(Equation):
    """``−∇·(κ∇u) = f`` with zero boundary, f known, and κ and u unknown.

    The equation and the boundary hold up to a deviation that is small beside what the observations leave open.
    """

    def network(self, seed: int) -> Conductivity:
        torch.manual_seed(seed)
        return Conductivity(self.sizes, seed)

    def likelihood(self) -> Residuals:
        return Residuals(noise={"equation": 0.03, "boundary": 0.003, "observations": NOISE})


def _solution(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x).prod(1)


def _source(x: Tensor) -> Tensor:
    """``−∇·(κ∇u)`` of the true κ and u."""
    conductivity = TRUTH[0] + TRUTH[1] * x[:, 0]
    along = math.pi * torch.cos(math.pi * x[:, 0]) * torch.sin(math.pi * x[:, 1])
    return 2 * math.pi**2 * conductivity * _solution(x) - TRUTH[1] * along


def _residuals(network: nn.Module, x: Tensor, edge: Tensor) -> dict[str, Tensor]:
    assert isinstance(network, Conductivity)
    x = x.requires_grad_()
    conductivity = network.constants[0] + network.constants[1] * x[:, 0]
    flux = conductivity[:, None] * slopes(network(x)[:, 0], x)
    divergence = slopes(flux[:, 0], x)[:, 0] + slopes(flux[:, 1], x)[:, 1]
    return {
        "equation": -divergence - _source(x.detach()),
        "boundary": network(edge)[:, 0],
        "observations": network(network.places)[:, 0] - network.observed,
    }


INVERSE = Inverse(
    "inverse", "Conductivity from 50 observations", (2, 32, 1), (300, 80), _residuals, _solution, 30, propagates=False
)
"""On the unit square; a seed draws places and noise of the observations, too."""
