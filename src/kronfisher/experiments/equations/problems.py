"""Equations with known solutions on the unit cube."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.experiments.equations.burgers import BURGERS
from kronfisher.experiments.equations.equation import Equation, by_autograd
from kronfisher.experiments.equations.inverse import INVERSE

__all__ = ["EQUATIONS"]

Residuals = Callable[..., dict[str, Tensor]]


def _poisson(source: Callable[[Tensor], Tensor], solution: Callable[[Tensor], Tensor]) -> Residuals:
    def residuals(network: nn.Module, x: Tensor, edge: Tensor, derive: Any = by_autograd) -> dict[str, Tensor]:
        return {
            "equation": derive(network, x, laplacian=True).laplacian[:, 0] + source(x.detach()),
            "boundary": network(edge)[:, 0] - solution(edge),
        }

    return residuals


def _sines(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x).prod(1)


def _cosines(x: Tensor) -> Tensor:
    return torch.cos(math.pi * x).sum(1)


def _heat(x: Tensor) -> Tensor:
    """``exp(−π²t/4) sin πx`` at (x, t)."""
    return torch.exp(-(math.pi**2) / 4 * x[:, 1]) * torch.sin(math.pi * x[:, 0])


def _cooling(network: nn.Module, x: Tensor, edge: Tensor, derive: Any = by_autograd) -> dict[str, Tensor]:
    found = derive(network, x, second=[(0, 0)])
    return {
        "equation": found.first[:, 1, 0] - found.second[0, 0][:, 0] / 4,
        "boundary and start": network(edge)[:, 0] - _heat(edge),
    }


_WAVES = _poisson(lambda x: 2 * math.pi**2 * _sines(x), _sines)
EQUATIONS = {
    equation.name: equation
    for equation in (
        Equation("poisson2d", "Poisson 2-D, 2-64-1", (2, 64, 1), (900, 120), _WAVES, _sines, 120),
        Equation("poisson2d-deep", "Poisson 2-D, deep", (2, 64, 64, 48, 48, 1), (900, 120), _WAVES, _sines, 300),
        Equation(
            "poisson5d", "Poisson 5-D, 5-64-1", (5, 64, 1), (3000, 500),
            _poisson(lambda x: math.pi**2 * _cosines(x), _cosines), _cosines, 300,
        ),
        Equation("heat1d", "Heat 1-D, 2-64-1", (2, 64, 1), (900, 240), _cooling, _heat, 120, start=True),
        BURGERS,
        INVERSE,
    )
}  # fmt: skip
"""Name → equation."""
