"""Burgers' equation with a shock, against the formula of Cole and Hopf."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.experiments.equations.equation import Equation, by_autograd

__all__ = ["BURGERS", "VISCOSITY"]

VISCOSITY = 0.01 / math.pi
_REACH, _NODES = 12.0, 481  # of the quadrature, in units of 2√(νt)


def _cole_hopf(points: Tensor) -> Tensor:
    """The solution of ``u_t + u u_s = ν u_ss`` with s = 2x − 1 and ``u(s, 0) = −sin πs`` (Basdevant et al. 1986).

    The mean of ``−sin πy`` over y = s − 2√(νt) z under the density ``exp(−z² − cos(πy)/(2πν))``. It is analytic and
    falls like a normal density, so that the trapezoid rule converges faster than any power of the step.
    """
    z = torch.linspace(-_REACH, _REACH, _NODES, dtype=points.dtype)
    return torch.cat([_mean_start(part, z) for part in points.split(1024)])


def _mean_start(points: Tensor, z: Tensor) -> Tensor:
    y = math.pi * ((2 * points[:, :1] - 1) - 2 * (VISCOSITY * points[:, 1:]).sqrt() * z)
    weights = torch.softmax(-z.square() - torch.cos(y) / (2 * math.pi * VISCOSITY), dim=1)
    return -(weights * torch.sin(y)).sum(1)


def _residuals(network: nn.Module, x: Tensor, edge: Tensor, derive: Any = by_autograd) -> dict[str, Tensor]:
    found = derive(network, x, second=[(0, 0)])
    u, along, later = found.value[:, 0], found.first[:, 0, 0], found.first[:, 1, 0]
    start = torch.where(edge[:, 1] == 0, torch.sin(2 * math.pi * edge[:, 0]), 0.0)  # −sin πs; zero at both ends
    return {
        "equation": later + u * along / 2 - VISCOSITY * found.second[0, 0][:, 0] / 4,  # d/ds = ½ d/dx
        "boundary and start": network(edge)[:, 0] - start,
    }


BURGERS = Equation(
    "burgers", "Burgers, viscosity .01/π", (2, 24, 24, 24, 1), (1500, 300), _residuals, _cole_hopf, 300, start=True
)
"""On the unit square of (x, t), with x from one end to the other."""
