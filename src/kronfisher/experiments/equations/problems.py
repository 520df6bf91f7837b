"""Equations with known solutions on the unit cube."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kronfisher.experiments.equations.burgers import BURGERS
from kronfisher.experiments.equations.equation import Equation, slopes
from kronfisher.experiments.equations.inverse import INVERSE

__all__ = ["EQUATIONS"]

Residuals = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]


def _laplacian(network: nn.Module, x: Tensor) -> Tensor:
    first = slopes(network(x), x)
    return torch.stack([slopes(first[:, i], x)[:, i] for i in range(x.shape[1])]).sum(0)


def _poisson(source: Callable[[Tensor], Tensor], solution: Callable[[Tensor], Tensor]) -> Residuals:
    def residuals(network: nn.Module, x: Tensor, edge: Tensor) -> dict[str, Tensor]:
        x = x.requires_grad_()
        return {
            "equation": _laplacian(network, x) + source(x.detach()),
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


def _cooling(network: nn.Module, x: Tensor, edge: Tensor) -> dict[str, Tensor]:
    x = x.requires_grad_()
    first = slopes(network(x), x)
    second = slopes(first[:, 0], x)[:, 0]
    return {"equation": first[:, 1] - second / 4, "boundary and start": network(edge)[:, 0] - _heat(edge)}


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
